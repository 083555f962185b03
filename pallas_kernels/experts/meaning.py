"""Meaning of the routed experts: scores and choice, clamped SwiGLU, and the weighted sum of the chosen experts' outputs.

Source: `Gate` and `Expert` of the reference inference code; gguf.md §6.
"""

from __future__ import annotations

import math
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp

from pallas_kernels.formats import Quantized
from pallas_kernels.linear.cut import Cut, completed, filled, own_part, rows_of
from pallas_kernels.linear.meaning import Weight, as_float32, expert_dot

# The weights of a row's experts are divided by their sum, but at least by this.
MIN_WEIGHT_SUM = 2.0**-14
# Values of a small stack. It is kept in float32 beside the stored one while a program runs.
SMALL = 2**20

Formats = tuple[type[Quantized], ...]


def scores(logits_TE: jax.Array) -> jax.Array:
    """Router scores, float32 [T, E]: sqrt(softplus(logit))."""
    return jnp.sqrt(jax.nn.softplus(logits_TE))


def choose(scores_TE: jax.Array, bias_E: jax.Array, *, active: int) -> tuple[jax.Array, jax.Array]:
    """Choose the K = `active` experts with the largest score + bias, int32 [T, K]; of equal ones the lower number.

    The bias changes the choice but not the scores of the chosen, float32 [T, K]. Hash-routed layers look the choice up in a table
    instead.
    """
    _, chosen_TK = jax.lax.top_k(scores_TE + bias_E, active)
    return chosen_TK, scores_of(scores_TE, chosen_TK)


def scores_of(scores_TE: jax.Array, chosen_TK: jax.Array) -> jax.Array:
    """The scores of each row's chosen experts, float32 [T, K]."""
    return jnp.take_along_axis(scores_TE, chosen_TK, axis=1)


def weigh(best_TK: jax.Array, scale: float) -> jax.Array:
    """Weights of the chosen experts, float32 [T, K]: their scores, divided by their sum, times `scale`."""
    total = jnp.maximum(jnp.sum(best_TK, axis=1, keepdims=True), MIN_WEIGHT_SUM)
    return best_TK / total * scale


def swiglu(gate: jax.Array, up: jax.Array, limit: float) -> jax.Array:
    """silu(min(gate, limit)) · clip(up, ±limit): the gate is clamped from above only."""
    return jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)


def gathered(
    x_TD: jax.Array, chosen_TK: jax.Array, weights_TK: jax.Array, gate: Weight | Cut, up: Weight | Cut, down: Weight | Cut,
    *, limit: float, in_float: Formats = (), precision: jax.lax.PrecisionLike = None,
) -> jax.Array:  # fmt: skip
    """Weighted sum of the chosen experts' outputs, float32 [T, D]. Gathers the matrices of each row.

    Hidden values of cut stacks are gathered. If the down stack is cut, only the outputs of this device's rows are made.

    Args:
        x_TD: float32 [T, D].
        chosen_TK, weights_TK: int32 and float32 [T, K]; the weight is applied before the last product.
        gate, up: stacks [E, F, D], float or quantised.
        down: stack [E, D, F].
        limit: of the SwiGLU.
        in_float: formats whose weights are dequantised. Weights of other formats are multiplied by quantised activations, as in
            the kernels.
        precision: of the float products.
    """
    stacks = (_small_in_float(stack, in_float) for stack in (gate, down, up))
    gate_TKFD, down_TKDF, up_TKFD = (filled(_take_chosen(stack, chosen_TK)) for stack in stacks)

    def gate_or_up(weight: Weight) -> jax.Array:
        if _quantises(weight, in_float):
            return expert_dot(x_TD[:, None], weight)
        # With the matrices on the left, a CPU multiplies them as they lie in memory; otherwise it copies them for each row.
        return jnp.einsum("tkfd,td->tkf", as_float32(weight), x_TD, precision=precision, preferred_element_type=jnp.float32)

    gate_TKF, up_TKF = gate_or_up(gate_TKFD), gate_or_up(up_TKFD)
    hidden_TKF = completed(swiglu(gate_TKF, up_TKF, limit) * weights_TK[..., None], up)
    if _quantises(down_TKDF, in_float):
        return own_part(expert_dot(hidden_TKF, down_TKDF, add_up=True), down)
    down_TKDF = as_float32(down_TKDF)
    products = jnp.einsum("tkdf,tkf->tkd", down_TKDF, hidden_TKF, precision=precision, preferred_element_type=jnp.float32)
    return own_part(jnp.sum(products, axis=1), down)


def small(rows: Weight) -> bool:
    """Whether a stack, or a device's part of it, is that of a small model."""
    return math.prod(rows.shape) <= SMALL


def _small_in_float(stack: Weight | Cut, in_float: Formats) -> Weight | Cut:
    """A stack of a small model as float32, if its products are float32 ones; any other stack as it is.

    A compiler takes the conversion of a whole stack out of a loop of decode steps, but not that of the chosen matrices.
    """
    rows = rows_of(stack)
    if not isinstance(rows, Quantized) or _quantises(rows, in_float) or not small(rows):
        return stack
    values = rows.dequantize()
    return Cut(values, stack.devices) if isinstance(stack, Cut) else values


def _take_chosen(stack: Weight | Cut, chosen_TK: jax.Array) -> Weight | Cut:
    """Matrices [T, K, ...] of the chosen experts from a stack [E, ...]."""
    return stack.take(chosen_TK) if isinstance(stack, Quantized | Cut) else stack[chosen_TK]


def _quantises(weight: Weight, in_float: Formats) -> TypeGuard[Quantized]:
    """Whether the product with this weight quantises its activations."""
    return isinstance(weight, Quantized) and not isinstance(weight, in_float)


def one_by_one(
    x_TD: jax.Array, chosen_TK: jax.Array, weights_TK: jax.Array, gate: Weight | Cut, up: Weight | Cut, down: Weight | Cut,
    *, limit: float,
) -> jax.Array:  # fmt: skip
    """`gathered` in float32 for many rows. Reads every expert once and multiplies it by all rows, with weight 0 if not chosen."""
    cut_up, cut_down = up, down
    query = jnp.arange(x_TD.shape[0], dtype=jnp.int32)[:, None]
    share_TE = jnp.zeros((x_TD.shape[0], gate.shape[0]), jnp.float32).at[query, chosen_TK].add(weights_TK)

    def add_expert(y_TD: jax.Array, expert: tuple[Any, Any, Any, jax.Array]) -> tuple[jax.Array, None]:
        (gate, down, up), share_T = map(filled, expert[:3]), expert[3]
        gate_TF = jnp.einsum("td,fd->tf", x_TD, as_float32(gate), preferred_element_type=jnp.float32)
        up_TF = jnp.einsum("td,fd->tf", x_TD, as_float32(up), preferred_element_type=jnp.float32)
        hidden_TF = completed(swiglu(gate_TF, up_TF, limit) * share_T[:, None], cut_up)
        return y_TD + jnp.einsum("tf,df->td", hidden_TF, as_float32(down), preferred_element_type=jnp.float32), None

    experts = (gate, down, up, share_TE.T)
    return own_part(jax.lax.scan(add_expert, jnp.zeros_like(x_TD), experts)[0], cut_down)

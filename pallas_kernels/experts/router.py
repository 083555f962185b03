"""The router: chooses experts and their weights from the router's logits, in one small launch; of a prompt, from their scores.

Source: `Gate` of the reference inference code; gguf.md §6.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.experts.meaning import MIN_WEIGHT_SUM

NAME, CHOICE = "router", "router_choice"


def _score(logits: jax.Array) -> jax.Array:
    """`meaning.scores` inside a kernel. max(x, 0) + log(1 + e^-|x|) neither overflows nor loses small values."""
    return jnp.sqrt(jnp.maximum(logits, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(logits))))


def _best(values: jax.Array, places: int, experts: int, active: int) -> jax.Array:
    """The experts of the largest values [width], in order and then zeros, int32 [places]."""
    expert = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
    place = jax.lax.broadcasted_iota(jnp.int32, (places,), 0)
    chosen = jnp.zeros((places,), jnp.int32)
    left = jnp.where(expert < experts, values, -jnp.inf)
    for k in range(active):
        # Of equal scores the lower number. A NaN equals nothing, so the last expert is chosen.
        best = jnp.minimum(jnp.min(jnp.where(left == jnp.max(left, axis=0), expert, expert.shape[0]), axis=0), experts - 1)
        left = jnp.where(expert == best, -jnp.inf, left)
        chosen = jnp.where(place == k, best, chosen)
    return chosen


def _store(row: jax.Array, active: int, *results: tuple[Any, jax.Array]) -> None:
    """Store the first `active` values of a row's results."""
    for ref, values in results:
        place = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
        # The index of a masked place is past the end; interpret mode drops it.
        plt.store(ref.at[row, jnp.where(place < active, place, active)], values, mask=place < active)


def _kernel(logits_ref: Any, *refs: Any, experts: int, active: int, scale: float, hashed: bool) -> None:
    *given, chosen_ref, share_ref = refs
    row = pl.program_id(0)
    width, places = pl.next_power_of_2(experts), pl.next_power_of_2(active)
    expert = jax.lax.broadcasted_iota(jnp.int32, (width,), 0)
    there = expert < experts
    logits = plt.load(logits_ref.at[row, expert], mask=there, other=0.0)
    place = jax.lax.broadcasted_iota(jnp.int32, (places,), 0)
    if hashed:
        ids_ref, table_ref = given
        chosen = plt.load(table_ref.at[ids_ref[row], jnp.minimum(place, active - 1)])
    else:
        biased = _score(logits) + plt.load(given[0].at[expert], mask=there, other=0.0)
        chosen = _best(biased, places, experts, active)
    share = jnp.where(place < active, _score(plt.load(logits_ref.at[row, chosen])), 0.0)
    share = share / jnp.maximum(jnp.sum(share, axis=0), MIN_WEIGHT_SUM) * scale
    _store(row, active, (chosen_ref, chosen), (share_ref, share))


@functools.partial(jax.jit, static_argnames=("active", "scale", "interpret"))
def route(
    logits: jax.Array, *, active: int, scale: float, bias: jax.Array | None = None,
    ids: jax.Array | None = None, table: jax.Array | None = None, interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Choose K experts for each row. Their weights are sqrt(softplus(logit)), divided by their sum and multiplied by `scale`.

    Args:
        logits: float32 [M, E].
        active: K.
        bias: float32 [E], added to the scores for the choice only; of equal ones the lower number is chosen.
        ids, table: int32 [M] and [V, K]: a hash-routed layer looks up the choice in a table. Give these or a bias.

    Returns:
        Expert numbers int32 [M, K] and their weights float32 [M, K].
    """
    m, experts = logits.shape
    given = (bias,) if bias is not None else (ids, table)
    kernel = functools.partial(_kernel, experts=experts, active=active, scale=scale, hashed=bias is None)
    shapes = (jax.ShapeDtypeStruct((m, active), jnp.int32), jax.ShapeDtypeStruct((m, active), jnp.float32))
    chosen, share = pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid=(m,),
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name=NAME,
    )(logits, *given)
    return chosen, share


def _choice(scores_ref: Any, bias_ref: Any, chosen_ref: Any, best_ref: Any, *, experts: int, active: int) -> None:
    row = pl.program_id(0)
    expert = jax.lax.broadcasted_iota(jnp.int32, (pl.next_power_of_2(experts),), 0)
    there = expert < experts
    biased = plt.load(scores_ref.at[row, expert], mask=there, other=0.0) + plt.load(bias_ref.at[expert], mask=there, other=0.0)
    chosen = _best(biased, pl.next_power_of_2(active), experts, active)
    _store(row, active, (chosen_ref, chosen), (best_ref, plt.load(scores_ref.at[row, chosen])))


def choose(scores: jax.Array, bias: jax.Array, *, active: int, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """`meaning.choose` of many rows, float32 [M, E], and the scores of the chosen: int32 and float32 [M, K].

    A sort, which finds the same, orders all experts of a row.
    """
    m, experts = scores.shape
    shapes = (jax.ShapeDtypeStruct((m, active), jnp.int32), jax.ShapeDtypeStruct((m, active), jnp.float32))
    chosen, best = pl.pallas_call(
        functools.partial(_choice, experts=experts, active=active),
        out_shape=shapes,
        grid=(m,),
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name=CHOICE,
    )(scores, bias)
    return chosen, best

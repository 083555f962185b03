"""The router: chooses experts and their weights from the router's logits, in one small launch, and orders the choice.

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

NAME, ORDER = "router", "expert_order"
# Pairs of rows and experts that a program of the order places.
PLACED = 32


def _score(logits: jax.Array) -> jax.Array:
    """`meaning.scores` inside a kernel. max(x, 0) + log(1 + e^-|x|) neither overflows nor loses small values."""
    return jnp.sqrt(jnp.maximum(logits, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(logits))))


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
        chosen = jnp.zeros((places,), jnp.int32)
        left = jnp.where(there, _score(logits) + plt.load(given[0].at[expert], mask=there, other=0.0), -jnp.inf)
        for k in range(active):
            # Of equal scores the lower number. A NaN equals nothing, so the last expert is chosen.
            best = jnp.minimum(jnp.min(jnp.where(left == jnp.max(left, axis=0), expert, width), axis=0), experts - 1)
            left = jnp.where(expert == best, -jnp.inf, left)
            chosen = jnp.where(place == k, best, chosen)
    share = jnp.where(place < active, _score(plt.load(logits_ref.at[row, chosen])), 0.0)
    share = share / jnp.maximum(jnp.sum(share, axis=0), MIN_WEIGHT_SUM) * scale
    real = place < active
    # The index of a masked place is past the end; interpret mode drops it.
    column = jnp.where(real, place, active)
    plt.store(chosen_ref.at[row, column], chosen, mask=real)
    plt.store(share_ref.at[row, column], share, mask=real)


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


def _order_kernel(chosen_ref: Any, order_ref: Any, *, pairs: int) -> None:
    other = jax.lax.broadcasted_iota(jnp.int32, (pl.next_power_of_2(pairs),), 0)
    mine = pl.program_id(0) * PLACED + jax.lax.broadcasted_iota(jnp.int32, (PLACED,), 0)
    expert = plt.load(chosen_ref.at[other], mask=other < pairs, other=0)
    own = plt.load(chosen_ref.at[mine], mask=mine < pairs, other=0)
    shape = (PLACED, other.shape[0])
    expert, other = (jnp.broadcast_to(x[None, :], shape) for x in (expert, other))
    own, number = (jnp.broadcast_to(x[:, None], shape) for x in (own, mine))
    earlier = (other < pairs) & ((expert < own) | ((expert == own) & (other < number)))
    place = jnp.sum(jnp.where(earlier, jnp.int32(1), jnp.int32(0)), axis=1)
    # The place of a masked pair is past the end; interpret mode drops it.
    plt.store(order_ref.at[jnp.where(mine < pairs, place, pairs)], mine, mask=mine < pairs)


@functools.partial(jax.jit, static_argnames="interpret")
def by_expert(chosen: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Numbers of the pairs of M rows and K experts in the order of their experts, pairs of one expert in the order of the rows.

    Args:
        chosen: int32 [M, K], expert numbers.

    Returns:
        int32 [M·K]; row m and its choice k are pair m·K + k.
    """
    pairs = chosen.size
    order: jax.Array = pl.pallas_call(
        functools.partial(_order_kernel, pairs=pairs),
        out_shape=jax.ShapeDtypeStruct((pairs,), jnp.int32),
        grid=(pl.cdiv(pairs, PLACED),),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name=ORDER,
    )(chosen.reshape(-1))
    return order

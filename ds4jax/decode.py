"""Prefill and the decode loop as compiled programs.

One executable runs the loop whoever calls it: `generate` gives it the whole budget of tokens, streaming a small one, so the
bits never depend on how it was called.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from ds4jax.cache import Cache, Rows
from ds4jax.sampling import Filters, choose

P = ParamSpec("P")
R = TypeVar("R")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What the loop carries; donated from call to call.

    Attributes:
        cache: every committed token but the last is in it.
        last: int32, the last committed token; its position is the cache's length.
        tokens: int32 [capacity], tokens generated so far.
        count: int32, how many they are.
        stopped: bool, a stop token was generated.
    """

    cache: Cache
    last: jax.Array
    tokens: jax.Array
    count: jax.Array
    stopped: jax.Array


def precise(function: Callable[P, R]) -> Callable[P, R]:
    """Run a compiled function with full float32 products, also where the hardware's default is a shorter type."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return wrapper


@precise
@functools.partial(jax.jit, static_argnames=("graph", "strict", "want_logits", "want_mtp"), donate_argnames="cache")
def extend(
    graph: nnx.GraphDef,
    weights: nnx.State,
    cache: Cache,
    ids_T: jax.Array,
    next_ids_T: jax.Array,
    count: jax.Array,
    mtp_count: jax.Array,
    *,
    strict: bool,
    want_logits: bool,
    want_mtp: bool,
) -> tuple[Cache, jax.Array | None, jax.Array | None]:
    """Take one bucket of tokens into the cache: prefill, or a decode step of known tokens.

    Args:
        ids_T: int32 [T], of which the first `count` are real; the rest is padding of any value.
        next_ids_T: int32 [T], the token after each, for the MTP block.
        count, mtp_count: int32, rows for the model and for its MTP block.
        strict: static; float32 products without Pallas kernels.
        want_logits, want_mtp: static; what is computed besides the cache.

    Returns:
        The cache, logits [T, V] or None, and the MTP block's logits [T, V] or None.
    """
    model = nnx.merge(graph, weights)
    start, width = cache.length[0], ids_T.shape[0]
    h_TND, cache = model.streams(ids_T, Rows.following(start, width, count, strict=strict), cache)
    logits_TV = model.logits(h_TND, strict=strict) if want_logits else None
    if not want_mtp:
        return cache, logits_TV, None
    mtp_rows = Rows.following(start, width, mtp_count, strict=strict)
    mtp_TND, cache = model.mtp_streams(h_TND, next_ids_T, mtp_rows, cache)
    return cache, logits_TV, model.mtp_logits(mtp_TND, strict=strict)


@precise
@functools.partial(jax.jit, static_argnames=("graph", "strict"), donate_argnames="state")
def run(
    graph: nnx.GraphDef,
    weights: nnx.State,
    state: DecodeState,
    budget: jax.Array,
    stop_ids: jax.Array,
    filters: Filters,
    *,
    strict: bool,
) -> DecodeState:
    """Generate until `budget` new tokens, a stop token or a full buffer.

    Args:
        budget: int32, tokens that this call may add.
        stop_ids: int32 [n], tokens that end the generation; a stop token is committed and counted.
        strict: static; float32 products without Pallas kernels.
    """
    model = nnx.merge(graph, weights)
    goal = jnp.minimum(state.count + budget, state.tokens.shape[0])

    def unfinished(state: DecodeState) -> jax.Array:
        return (state.count < goal) & ~state.stopped

    def step(state: DecodeState) -> DecodeState:
        position = state.cache.length[0]
        rows = Rows.following(position, 1, 1, strict=strict)
        h_TND, cache = model.streams(state.last[None], rows, state.cache)
        token = choose(model.logits(h_TND, strict=strict)[0], filters, position)
        tokens = state.tokens.at[state.count].set(token, mode="drop")
        return DecodeState(cache, token, tokens, state.count + 1, jnp.any(token == stop_ids))

    return jax.lax.while_loop(unfinished, step, state)

"""Scores known tokens: prefill with logits, and decode steps with given tokens."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ds4jax.cache.state import Cache, LayerCache, Rows
from ds4jax.decode.drafters import dspark
from ds4jax.decode.module import Weights, merged, on_devices
from ds4jax.decode.sampling import most_likely
from ds4jax.precision import precise


class Scored(NamedTuple):
    """What a call of `extend` makes.

    Attributes:
        cache, mtp: caches with the new rows; None without the MTP block.
        logits, mtp_logits: float32 [T, V], or None.
        means: for each layer of `taps` the mean float32 [T, D] over the streams after it.
    """

    cache: Cache
    mtp: LayerCache | None
    logits: jax.Array | None
    mtp_logits: jax.Array | None
    means: list[jax.Array]


@precise
@functools.partial(jax.jit, static_argnames=("graph", "strict", "want_logits", "taps"), donate_argnames=("cache", "mtp"))
@on_devices
def extend(
    graph: nnx.GraphDef,
    weights: Weights,
    cache: Cache,
    mtp: LayerCache | None,
    ids_T: jax.Array,
    next_ids_T: jax.Array,
    count: jax.Array,
    mtp_count: jax.Array,
    *,
    strict: bool,
    want_logits: bool,
    taps: tuple[int, ...] = (),
) -> Scored:
    """Append tokens to the cache of one sequence, and score them.

    Args:
        graph: static; the model's graph, see `ds4jax.decode.module`.
        weights: the model's arrays.
        cache: the cache of one sequence; donated.
        mtp: the MTP block's cache, donated; None to omit the block.
        ids_T: int32 [T]; the first `count` are tokens, the others padding of any value.
        next_ids_T: int32 [T], the token after each, for the MTP block.
        count, mtp_count: int32, number of rows for the model and for its MTP block.
        strict: static; float32 products without Pallas kernels.
        want_logits: static; whether logits are computed.
        taps: static; layers whose streams are wanted.
    """
    model = merged(graph, weights)
    start, width = cache.length[0], ids_T.shape[0]
    h_TND, cache, means = model.tapped(ids_T, Rows.following(start, width, count, strict=strict), cache, taps)
    logits_TV = model.logits(h_TND, strict=strict) if want_logits else None
    if mtp is None:
        return Scored(cache, None, logits_TV, None, means)
    mtp_rows = Rows.following(start, width, mtp_count, strict=strict)
    mtp_TND, mtp = model.mtp_streams(h_TND, next_ids_T, mtp_rows, mtp)
    return Scored(cache, mtp, logits_TV, model.mtp_logits(mtp_TND, strict=strict) if want_logits else None, means)


class Block(NamedTuple):
    """A greedy DSpark block of K slots after one position.

    Attributes:
        base_logits, logits: float32 [K, V], before and after the correction by the token before.
        tokens: int32 [K], the drafts.
        confidence: float32 [K], probability that a draft stands where the earlier ones do.
    """

    base_logits: jax.Array
    logits: jax.Array
    tokens: jax.Array
    confidence: jax.Array


@precise
@functools.partial(jax.jit, static_argnames=("graph", "strict"))
@on_devices
def draft_block(
    graph: nnx.GraphDef, weights: Weights, means: list[jax.Array], first: jax.Array, count: jax.Array, token: jax.Array,
    *, strict: bool,
) -> Block:  # fmt: skip
    """The DSpark block after known rows.

    Args:
        means: for each tapped layer float32 [W, D], the means of the window's last rows; W is the config's window.
        first: int32, position of the first row.
        count: int32, number of rows; the others are padding of any value.
        token: int32, the token after the last row.
    """
    model = merged(graph, weights)
    drafter, config = dspark.DSparkDrafter(), model.config
    rows = Rows.following(first, config.window, count, strict=strict)
    state = drafter.commit(model, dspark.empty(config, config.dspark_block, 1), jnp.zeros(()), jnp.zeros(()), rows, means)

    def choose(_: int, logits_SV: jax.Array) -> tuple[jax.Array, jax.Array]:
        return most_likely(logits_SV), logits_SV

    some = jnp.ones(1, bool)
    made = list(dspark.slots(model, state, token[None], rows.end, some, config.dspark_block, choose, strict=strict))
    base, logits, tokens, confidence = (
        jnp.stack([getattr(slot, name)[0] for slot in made]) for name in ("base", "logits", "token", "confidence")
    )
    return Block(base, logits, tokens, confidence)

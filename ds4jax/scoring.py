"""Known tokens through the model: prefill with logits, and decode steps whose tokens are given."""

from __future__ import annotations

import functools

import jax
from flax import nnx

from ds4jax.cache import Cache, LayerCache, Rows
from ds4jax.precision import precise


@precise
@functools.partial(jax.jit, static_argnames=("graph", "strict", "want_logits"), donate_argnames=("cache", "mtp"))
def extend(
    graph: nnx.GraphDef,
    weights: nnx.State,
    cache: Cache,
    mtp: LayerCache | None,
    ids_T: jax.Array,
    next_ids_T: jax.Array,
    count: jax.Array,
    mtp_count: jax.Array,
    *,
    strict: bool,
    want_logits: bool,
) -> tuple[Cache, LayerCache | None, jax.Array | None, jax.Array | None]:
    """Take one bucket of tokens into the cache and score them.

    Args:
        mtp: the MTP block's cache, or None to leave the block out.
        ids_T: int32 [T], of which the first `count` are real; the rest is padding of any value.
        next_ids_T: int32 [T], the token after each, for the MTP block.
        count, mtp_count: int32, rows for the model and for its MTP block.
        strict: static; float32 products without Pallas kernels.
        want_logits: static; whether logits are computed.

    Returns:
        Both caches, logits [T, V] or None, and the MTP block's logits [T, V] or None.
    """
    model = nnx.merge(graph, weights)
    start, width = cache.length[0], ids_T.shape[0]
    h_TND, cache = model.streams(ids_T, Rows.following(start, width, count, strict=strict), cache)
    logits_TV = model.logits(h_TND, strict=strict) if want_logits else None
    if mtp is None:
        return cache, None, logits_TV, None
    mtp_rows = Rows.following(start, width, mtp_count, strict=strict)
    mtp_TND, mtp = model.mtp_streams(h_TND, next_ids_T, mtp_rows, mtp)
    return cache, mtp, logits_TV, model.mtp_logits(mtp_TND, strict=strict) if want_logits else None

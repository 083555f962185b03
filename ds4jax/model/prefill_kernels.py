"""Attention of a prefill by kernels. Visibility follows from positions, so no array has T x T or T x S entries.

The modules define the result by a masked product over all rows of the cache.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ds4jax.cache.state import CompressorCache, LayerCache, Rows, own
from ds4jax.cache.stored_rows import widen
from ds4jax.config import Config
from ds4jax.model.indexer import Queries
from ds4jax.model.rope import inverse_frequencies
from pallas_kernels.attention.prefill import attend_prefill
from pallas_kernels.attention.split import Chosen, Compressed, Leading
from pallas_kernels.indexer import decode as indexer

# Maximum bytes of the indexer scores that are computed at once.
SCORE_BYTES = 1 << 28


def attend(
    config: Config, ratio: int, sink_H: jax.Array, kv_TQ: jax.Array, index: Queries | None, rows: Rows,
    before: jax.Array, cache: LayerCache, q_THQ: jax.Array, *, dtype: Any = jnp.float16, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """Attend from the call's rows, all of one sequence, to their windows and to the compressed rows of the layer.

    Queries are normed and rotated, and outputs rotated back.

    Args:
        kv_TQ: float32 [T, Q], the call's own rows.
        index: the indexer's queries; None without an indexer.
        before: the windows' rings [B, ring, Q] before the call.
        cache: the layer's cache with the call's rows.
        q_THQ: float32 [T, H, Q].
        dtype: static; outputs are rounded to it.

    Returns:
        float32 [T, H, Q].
    """
    start = rows.start[rows.readers]
    past = _past(config.window, own(before, rows), start)
    keys = jnp.concatenate([past, kv_TQ]).astype(jnp.float16)
    compressed, visible = None, None
    if cache.compressor is not None:
        visible = (rows.position + 1) // ratio
        compressed_rows = widen(own(cache.compressor.rows, rows)).astype(jnp.float16)[None]
        compressed = _seen(config, compressed_rows, index, cache.indexer, rows, visible, interpret)
    cos, sin = _angles(config, rows, compressed=ratio > 0)
    out_THQ = attend_prefill(
        q_THQ, cos, sin, keys, start, sink_H.astype(jnp.float32), compressed, visible,
        window=config.window, scale=config.head_dim**-0.5, eps=config.norm_eps, dtype=dtype, interpret=interpret,
    )  # fmt: skip
    return out_THQ.astype(jnp.float32)


def _angles(config: Config, rows: Rows, *, compressed: bool) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines float32 [T, R/2] of the rows' angles."""
    angle = rows.position.astype(jnp.float32)[:, None] * jnp.asarray(inverse_frequencies(config, compressed=compressed))
    return jnp.cos(angle), jnp.sin(angle)


def _past(window: int, ring: jax.Array, start: jax.Array) -> jax.Array:
    """The ring's rows at the W positions before the call, in order [W, Q]; rows before position 0 hold arbitrary values."""
    size = ring.shape[0]
    if size == 0:
        return jnp.zeros((window, ring.shape[1]), ring.dtype)
    return ring[(start[0] - window + jnp.arange(window, dtype=jnp.int32)) % size]


def _seen(
    config: Config, compressed_rows: jax.Array, index: Queries | None, keys: CompressorCache | None, rows: Rows,
    visible: jax.Array, interpret: bool,
) -> Compressed:  # fmt: skip
    """Compressed rows that each row sees: the first ones, or the indexer's choice if there are more than `index_topk`."""
    count = compressed_rows.shape[1]
    if keys is None or index is None or count <= config.index_topk:
        return Leading(compressed_rows, visible)
    operands = (index.q, index.weights, *_angles(config, rows, compressed=True), rows.sequence, visible)

    def choose(operands: tuple[jax.Array, ...]) -> jax.Array:
        q, weights, cos, sin, sequence, visible = operands
        how: dict[str, Any] = {"topk": config.index_topk, "qat": config.qat, "one_sequence": True, "interpret": interpret}
        return indexer.index(q, weights, cos, sin, keys.rows, sequence, visible, **how)

    width = _rows_at_once(rows.position.shape[0], count)
    parts = jax.tree.map(lambda x: x.reshape(-1, width, *x.shape[1:]), operands)
    chosen = jax.lax.map(choose, parts).reshape(-1, config.index_topk)
    return Chosen(compressed_rows, chosen)


def _rows_at_once(rows: int, keys: int) -> int:
    """The largest divisor of `rows` for which the scores against `keys` keys fit in `SCORE_BYTES`."""
    return next(rows // parts for parts in range(1, rows + 1) if rows % parts == 0 and (rows // parts) * keys * 4 <= SCORE_BYTES)

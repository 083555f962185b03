"""Attention of a prefill's many rows by kernels: what each row sees follows from its place, and no array has rows by rows.

The modules say what this means; they compute a masked product over everything that the cache holds.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ds4jax.cache import CompressorCache, LayerCache, Rows
from ds4jax.config import Config
from ds4jax.model import few_rows
from ds4jax.model.rope import inverse_frequencies
from ds4jax.row_store import expanded
from pallas_kernels import indexer
from pallas_kernels.attention_prefill import attend_prefill
from pallas_kernels.attention_split import Chosen, Compressed, Leading
from pallas_kernels.dispatch import OPT_OUT
from pallas_kernels.formats import Quantized
from pallas_kernels.reference import Weight

# A tensor core's operand has at least so many columns.
LEAST_WIDTH = 16
# Bytes that the scores of the rows that choose at once take.
SCORE_BYTES = 1 << 28


class Queries(NamedTuple):
    """What the indexer makes of a call's rows.

    Attributes:
        q: float32 [T, Hi·Di], not turned yet.
        weights: float32 [T, Hi] of the heads.
    """

    q: jax.Array
    weights: jax.Array


def serves(config: Config, rows: Rows, weight: Weight) -> bool:
    """Whether the attention of a call of these rows is run by the kernels where it is lowered for CUDA.

    Args:
        weight: one of the dense weights. Where they are float32, somebody wants float32 results, or gradients.
    """
    if not isinstance(weight, Quantized) and weight.dtype == jnp.float32:
        return False
    many = rows.position.shape[0] > few_rows.MOST_ROWS and rows.start.shape[0] == 1 and not rows.strict
    powers = all(width & (width - 1) == 0 for width in (config.index_heads, config.index_dim))
    wide = config.head_dim & -config.head_dim >= LEAST_WIDTH and config.index_dim >= 32
    return many and powers and wide and os.environ.get(OPT_OUT) != "1"


def attend(
    config: Config, ratio: int, sink_H: jax.Array, kv_TQ: jax.Array, index: Queries | None, rows: Rows,
    before: jax.Array, cache: LayerCache, q_THQ: jax.Array, *, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """Attend from the call's rows to their windows and to the compressed rows of the layer.

    Args:
        kv_TQ: float32 [T, Q], the call's own rows.
        index: what the indexer made of them; None without one.
        before: the window's ring [1, ring, Q] before the call.
        cache: the layer's, the call's rows included.
        q_THQ: float32 [T, H, Q], normed and turned.

    Returns:
        float32 [T, H, Q], not turned back.
    """
    past = _past(config.window, before[0], rows.start)
    keys = jnp.concatenate([past, kv_TQ]).astype(jnp.float16)
    compressed, visible = None, None
    if cache.compressor is not None:
        visible = (rows.position + 1) // ratio
        compressed_rows = expanded(cache.compressor.rows).astype(jnp.float16)
        compressed = _seen(config, compressed_rows, index, cache.indexer, rows, visible, interpret)
    out_THQ = attend_prefill(
        q_THQ.astype(jnp.float16), keys, rows.start, sink_H.astype(jnp.float32), compressed, visible,
        window=config.window, scale=config.head_dim**-0.5, interpret=interpret,
    )  # fmt: skip
    return out_THQ.astype(jnp.float32)


def _past(window: int, ring: jax.Array, start: jax.Array) -> jax.Array:
    """The ring's rows at the positions before the call, in order [W, Q]; what lies before position 0 is of any value."""
    size = ring.shape[0]
    if size == 0:
        return jnp.zeros((window, ring.shape[1]), ring.dtype)
    return ring[(start[0] - window + jnp.arange(window, dtype=jnp.int32)) % size]


def _seen(
    config: Config, compressed_rows: jax.Array, index: Queries | None, keys: CompressorCache | None, rows: Rows,
    visible: jax.Array, interpret: bool,
) -> Compressed:  # fmt: skip
    """Which compressed rows each row sees: the first ones, or those that the indexer chooses where it has to."""
    count = compressed_rows.shape[1]
    if keys is None or index is None or count <= config.index_topk:
        return Leading(compressed_rows, visible)
    angle = rows.position.astype(jnp.float32)[:, None] * jnp.asarray(inverse_frequencies(config, compressed=True))
    operands = (index.q, index.weights, jnp.cos(angle), jnp.sin(angle), visible)

    def choose(operands: tuple[jax.Array, ...]) -> jax.Array:
        q, weights, cos, sin, visible = operands
        return indexer.index(
            q, weights, cos, sin, keys.rows, visible, topk=config.index_topk, qat=config.qat, interpret=interpret
        )

    width = _rows_at_once(rows.position.shape[0], count)
    parts = jax.tree.map(lambda x: x.reshape(-1, width, *x.shape[1:]), operands)
    chosen = jax.lax.map(choose, parts).reshape(-1, config.index_topk)
    return Chosen(compressed_rows, chosen)


def _rows_at_once(rows: int, keys: int) -> int:
    """A divisor of the number of rows, of which the scores do not take too much."""
    return next(rows // parts for parts in range(1, rows + 1) if rows % parts == 0 and (rows // parts) * keys * 4 <= SCORE_BYTES)

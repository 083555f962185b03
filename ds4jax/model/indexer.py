"""The lightning indexer of the ratio-4 layers chooses the compressed rows that a query attends to.

Source: `Indexer` of the reference inference code; DeepSeek-V3.2's lightning indexer on compressed keys.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ds4jax.cache.state import CompressorCache, Rows, own
from ds4jax.cache.stored_rows import widen
from ds4jax.config import Config
from ds4jax.model.compressor import Compressor, visible_blocks
from ds4jax.model.layers import Linear, Rngs
from ds4jax.model.rope import inverse_frequencies, rotate
from ds4jax.model.tape import Record, ignore, under
from pallas_kernels.core import rounding
from pallas_kernels.indexer.meaning import scores


class Queries(NamedTuple):
    """Indexer queries of a call's rows.

    Attributes:
        q: float32 [T, Hi·Di], not rotated yet.
        weights: float32 [T, Hi], one for each head.
    """

    q: jax.Array
    weights: jax.Array


def finish_keys(config: Config, x: jax.Array) -> jax.Array:
    """Hadamard transform and FP4 rounding of rotated queries or keys float32 [.., Di]; neither without `config.qat`.

    Without rounding the transform would cancel in every product.
    """
    return rounding.hadamard_fp4(x) if config.qat else x


class Indexer(nnx.Module):
    """Scores compressed rows against small queries and keeps the best `index_topk` of the visible ones."""

    def __init__(self, config: Config, ratio: int, *, rngs: Rngs):
        self.wq_b = Linear(config.index_heads * config.index_dim, config.q_lora_rank, rngs=rngs)
        self.weights_proj = Linear(config.index_heads, config.dim, rngs=rngs)
        self.compressor = Compressor(config, ratio, config.index_dim, rngs=rngs)
        self.config, self.ratio = config, ratio

    def append(self, x_TD: jax.Array, rows: Rows, cache: CompressorCache, record: Record = ignore) -> CompressorCache:
        """The cache with the call's rows, float32 [T, D], and the keys of the blocks that they close."""
        finish = functools.partial(finish_keys, self.config)
        return self.compressor(x_TD, rows, cache, finish=finish, record=under(record, "compressor"))

    def queries(self, x_TD: jax.Array, q_low_TL: jax.Array, rows: Rows) -> Queries:
        """Queries and weights of the call's rows.

        Args:
            x_TD: float32 [T, D], the layer's normed input.
            q_low_TL: float32 [T, q_lora_rank], the attention's low-rank query.
        """
        return Queries(
            self.wq_b(q_low_TL, strict=rows.strict, decoding=rows.decoding),
            self.weights_proj(x_TD, strict=rows.strict, decoding=rows.decoding),
        )

    def __call__(
        self, queries: Queries, rows: Rows, cache: CompressorCache, record: Record = ignore
    ) -> tuple[jax.Array, jax.Array]:
        """Choose compressed rows for each query.

        Args:
            cache: keys, with the call's own ones.

        Returns:
            Indices int32 [T, k] into the compressed rows [S] of each query's sequence with k = min(index_topk, S), and whether
            each is visible, bool [T, k]. Equal scores keep the lower index.
        """
        config = self.config
        q_THI = queries.q.reshape(-1, config.index_heads, config.index_dim)
        q_THI = finish_keys(config, rotate(q_THI, rows.position, inverse_frequencies(config, compressed=True)))
        score_TS = scores(q_THI, queries.weights, widen(own(cache.rows, rows)))
        score_TS = jnp.where(visible_blocks(cache.rows.shape[1], self.ratio, rows), score_TS, -jnp.inf)
        record("score", score_TS)
        best, index = jax.lax.top_k(score_TS, min(config.index_topk, score_TS.shape[1]))
        return index, best > -jnp.inf

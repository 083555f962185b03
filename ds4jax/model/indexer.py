"""The lightning indexer of the ratio-4 layers: which compressed rows a query attends to.

Source: `Indexer` of the reference inference code; DeepSeek-V3.2's lightning indexer on compressed keys.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from ds4jax.cache import CompressorCache, Rows
from ds4jax.config import Config
from ds4jax.model import fake_quant
from ds4jax.model.compressor import Compressor, visible_blocks
from ds4jax.model.layers import Linear, Rngs
from ds4jax.model.many_rows import Queries
from ds4jax.model.rope import inverse_frequencies, rotate
from ds4jax.model.tape import Record, ignore, under
from ds4jax.row_store import expanded


def finish_keys(config: Config, x: jax.Array) -> jax.Array:
    """Hadamard transform and FP4 rounding of rotated queries or keys.

    Without the rounding the transform would cancel in every product, and is left out.
    """
    return fake_quant.fp4(fake_quant.hadamard(x)) if config.qat else x


class Indexer(nnx.Module):
    """Scores compressed rows against small queries and keeps the best `index_topk` of the visible ones."""

    def __init__(self, config: Config, ratio: int, *, rngs: Rngs):
        self.wq_b = Linear(config.index_heads * config.index_dim, config.q_lora_rank, rngs=rngs)
        self.weights_proj = Linear(config.index_heads, config.dim, rngs=rngs)
        self.compressor = Compressor(config, ratio, config.index_dim, rngs=rngs)
        self.config, self.ratio = config, ratio

    def take_in(self, x_TD: jax.Array, rows: Rows, cache: CompressorCache, record: Record = ignore) -> CompressorCache:
        """The cache with the keys of the blocks that the call's rows, float32 [T, D], close."""
        finish = functools.partial(finish_keys, self.config)
        return self.compressor(x_TD, rows, cache, finish=finish, record=under(record, "compressor"))

    def queries(self, x_TD: jax.Array, q_low_TL: jax.Array, rows: Rows) -> Queries:
        """Queries and weights of the call's rows.

        Args:
            x_TD: float32 [T, D], the layer's normed input.
            q_low_TL: float32 [T, q_lora_rank], the attention's low-rank query.
        """
        return Queries(self.wq_b(q_low_TL, strict=rows.strict), self.weights_proj(x_TD, strict=rows.strict))

    def __call__(
        self, queries: Queries, rows: Rows, cache: CompressorCache, record: Record = ignore
    ) -> tuple[jax.Array, jax.Array]:
        """Choose compressed rows for each query.

        Args:
            cache: the call's own keys included.

        Returns:
            Indices int32 [T, k] into the flattened rows [B·S] with k = min(index_topk, B·S), and whether each is visible, bool
            [T, k]. Equal scores keep the lower index.
        """
        config = self.config
        q_THI = queries.q.reshape(-1, config.index_heads, config.index_dim)
        q_THI = finish_keys(config, rotate(q_THI, rows.position, inverse_frequencies(config, compressed=True)))
        weights_TH = queries.weights * (config.index_dim**-0.5 * config.index_heads**-0.5)
        keys_SI = expanded(cache.rows).reshape(-1, config.index_dim)
        products = jnp.einsum("thi,si->ths", q_THI, keys_SI, preferred_element_type=jnp.float32)
        score_TS = jnp.einsum("ths,th->ts", jax.nn.relu(products), weights_TH, preferred_element_type=jnp.float32)
        score_TS = jnp.where(visible_blocks(cache.rows.shape[1], self.ratio, rows), score_TS, -jnp.inf)
        record("score", score_TS)
        best, index = jax.lax.top_k(score_TS, min(config.index_topk, score_TS.shape[1]))
        return index, best > -jnp.inf

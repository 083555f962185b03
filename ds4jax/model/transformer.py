"""The whole model: embedding, blocks, head, and the MTP block beside them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from ds4jax.cache import Cache, LayerCache, Rows
from ds4jax.config import Config
from ds4jax.model import hyper_connections as hc
from ds4jax.model.block import Block
from ds4jax.model.layers import Embedding, Linear, RMSNorm, Rngs, parameter
from ds4jax.model.mtp import MTP
from ds4jax.model.tape import Record, ignore, under


class Transformer(nnx.Module):
    """DeepSeek-V4 with the parameter names of the published checkpoint; experts of a layer are stacked."""

    def __init__(self, config: Config, *, rngs: Rngs):
        self.embed = Embedding(config.vocab_size, config.dim, rngs=rngs)
        self.layers = nnx.List(
            [Block(config, i, ratio, hashed=i < config.n_hash_layers, rngs=rngs) for i, ratio in enumerate(config.layer_ratios)]
        )
        self.norm = RMSNorm(config.dim, config.norm_eps, rngs=rngs)
        self.head = Linear(config.vocab_size, config.dim, rngs=rngs)
        self.hc_head_fn = parameter(rngs, config.hc_mult, config.hc_mult * config.dim, scale=0.01)
        self.hc_head_base = parameter(rngs, config.hc_mult)
        self.hc_head_scale = parameter(rngs, 1, mean=0.1)
        self.mtp = nnx.List([MTP(config, rngs=rngs) for _ in range(config.n_mtp)])
        self.config = config

    def streams(self, ids_T: jax.Array, rows: Rows, cache: Cache, record: Record = ignore) -> tuple[jax.Array, Cache]:
        """Run T rows through every layer.

        Args:
            ids_T: int32 [T] tokens of the rows.
            rows: where they stand; the cache must hold exactly `rows.start` rows of their sequences.

        Returns:
            float32 [T, N, D] streams after the last layer, and the cache with the live rows in it and `length` = `rows.end`.
        """
        embedded_TD = self.embed(ids_T)
        h_TND = jnp.broadcast_to(embedded_TD[:, None, :], (ids_T.shape[0], self.config.hc_mult, self.config.dim))
        record("embedded", h_TND)
        layers = []
        for i, (block, layer_cache) in enumerate(zip(self.layers, cache.layers, strict=True)):
            with jax.named_scope(f"layer{i}"):
                h_TND, layer_cache = block(h_TND, ids_T, rows, layer_cache, under(record, f"layers.{i}"))
            layers.append(layer_cache)
        return h_TND, dataclasses.replace(cache, layers=tuple(layers), length=rows.end)

    def logits(self, h_TND: jax.Array, *, strict: bool = False) -> jax.Array:
        """Streams [T, N, D] → logits float32 [T, V]."""
        fn, base, scale = self.hc_head_fn.get_value(), self.hc_head_base.get_value(), self.hc_head_scale.get_value()
        with jax.named_scope("head"):
            return self.head(self.norm(hc.head(h_TND, fn, scale, base, self.config)), strict=strict)

    def mtp_streams(
        self, h_TND: jax.Array, next_ids_T: jax.Array, rows: Rows, cache: LayerCache, record: Record = ignore
    ) -> tuple[jax.Array, LayerCache]:
        """Run the MTP block over rows of positions t: streams [T, N, D] of t, tokens [T] of t+1.

        `rows` counts the block's own rows, and the cache is the block's own.
        """
        with jax.named_scope("mtp"):
            embedded_TD = self.embed(next_ids_T)
            return self.mtp[0].advance(h_TND, embedded_TD, next_ids_T, rows, cache, under(record, "mtp.0"))

    def mtp_logits(self, h_TND: jax.Array, *, strict: bool = False) -> jax.Array:
        """The MTP block's streams [T, N, D] at positions t → logits [T, V] of the token at t+2, through the shared head."""
        with jax.named_scope("mtp_head"):
            return self.head(self.mtp[0].collapse(h_TND), strict=strict)

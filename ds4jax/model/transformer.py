"""The whole model: embedding, blocks, head, and the MTP block beside them."""

from __future__ import annotations

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
from flax import nnx

from ds4jax.cache import Cache, LayerCache, Rows
from ds4jax.config import Config
from ds4jax.model import few_rows
from ds4jax.model import hyper_connections as hc
from ds4jax.model.block import Block
from ds4jax.model.layers import Embedding, Linear, RMSNorm, Rngs, parameter
from ds4jax.model.mtp import MTP
from ds4jax.model.tape import Record, ignore, under
from pallas_kernels.dispatch import OPT_OUT


@functools.partial(jax.jit, static_argnames=("graph", "opt_out"))
def _block(
    graph: nnx.GraphDef, weights: nnx.State, h_TND: jax.Array, ids_T: jax.Array, rows: Rows, cache: LayerCache,
    *, opt_out: str | None,
) -> tuple[jax.Array, LayerCache]:  # fmt: skip
    """A block of which nothing is recorded. A jitted function, so that layers of a kind are traced and lowered once.

    What the gate reads of the environment while it is traced, `opt_out`, is part of what makes a kind.
    """
    h_TND, cache = nnx.merge(graph, weights)(h_TND, ids_T, rows, cache)
    return h_TND, cache


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
        h_TND, layers = self._through(list(self.layers), h_TND, ids_T, rows, cache.layers, record, "layers")
        return h_TND, dataclasses.replace(cache, layers=layers, length=rows.end)

    def _through(
        self, blocks: list[Block], h_TND: jax.Array, ids_T: jax.Array, rows: Rows, caches: tuple[LayerCache, ...],
        record: Record, name: str,
    ) -> tuple[jax.Array, tuple[LayerCache, ...]]:  # fmt: skip
        """Streams through blocks one after the other; few rows on CUDA by kernels that know the whole of a layer."""

        def modules(h_TND: jax.Array, caches: tuple[LayerCache, ...]) -> tuple[jax.Array, tuple[LayerCache, ...]]:
            done = []
            for i, (block, cache) in enumerate(zip(blocks, caches, strict=True)):
                with jax.named_scope(f"{name.removesuffix('s')}{i}"):
                    if record is ignore:
                        h_TND, cache = _block(*nnx.split(block), h_TND, ids_T, rows, cache, opt_out=os.environ.get(OPT_OUT))
                    else:
                        h_TND, cache = block(h_TND, ids_T, rows, cache, under(record, f"{name}.{i}"))
                done.append(cache)
            return h_TND, tuple(done)

        room = few_rows.room(self.config, caches)
        if record is not ignore or not few_rows.serves(self.config, blocks, rows, room):
            return modules(h_TND, caches)
        kernels = functools.partial(few_rows.layers, self.config, blocks, ids_T=ids_T, rows=rows)
        through: tuple[jax.Array, tuple[LayerCache, ...]] = jax.lax.platform_dependent(
            h_TND, caches, cuda=lambda h, caches: kernels(h_TND=h, caches=caches), default=modules
        )
        return through

    def logits(self, h_TND: jax.Array, *, strict: bool = False) -> jax.Array:
        """Streams [T, N, D] → logits float32 [T, V]."""
        with jax.named_scope("head"):
            return self._scored(self, h_TND, strict)

    def mtp_streams(
        self, h_TND: jax.Array, next_ids_T: jax.Array, rows: Rows, cache: LayerCache, record: Record = ignore
    ) -> tuple[jax.Array, LayerCache]:
        """Run the MTP block over rows of positions t: streams [T, N, D] of t, tokens [T] of t+1.

        `rows` counts the block's own rows, and the cache is the block's own.
        """
        with jax.named_scope("mtp"):
            mixed_TND = self.mtp[0].mixed(h_TND, self.embed(next_ids_T), rows, under(record, "mtp.0"))
            h_TND, (cache,) = self._through([self.mtp[0]], mixed_TND, next_ids_T, rows, (cache,), record, "mtp")
        return h_TND, cache

    def mtp_logits(self, h_TND: jax.Array, *, strict: bool = False) -> jax.Array:
        """The MTP block's streams [T, N, D] at positions t → logits [T, V] of the token at t+2, through the shared head."""
        with jax.named_scope("mtp_head"):
            return self._scored(self.mtp[0], h_TND, strict)

    def _scored(self, part: Transformer | MTP, h_TND: jax.Array, strict: bool) -> jax.Array:
        """Logits through the shared head; `part` has the norm and the hyper-connections before it."""
        fn, scale, base = part.hc_head_fn.get_value(), part.hc_head_scale.get_value(), part.hc_head_base.get_value()

        def modules(h_TND: jax.Array) -> jax.Array:
            return self.head(part.norm(hc.head(h_TND, fn, scale, base, self.config)), strict=strict)

        if not few_rows.scores(self.config, self.head.weight.get_value(), h_TND.shape[0], strict=strict):
            return modules(h_TND)
        kernels = functools.partial(few_rows.logits, self.config, self.head.weight.get_value(), part.norm.weight.get_value())
        scored: jax.Array = jax.lax.platform_dependent(
            h_TND, cuda=lambda h: kernels(fn=fn, scale=scale, base=base, h_TND=h), default=modules
        )
        return scored

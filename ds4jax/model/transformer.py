"""The model: embedding, blocks, head, and the blocks that draft."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from ds4jax.cache.state import Cache, LayerCache, Rows
from ds4jax.config import Config
from ds4jax.model import decode_kernels, paths
from ds4jax.model.block import Block
from ds4jax.model.dspark import DSpark
from ds4jax.model.layers import Embedding, Linear, RMSNorm, Rngs, parameter
from ds4jax.model.mtp import MTP
from ds4jax.model.tape import Record, ignore, under
from pallas_kernels.core.dispatch import opt_out
from pallas_kernels.hyper_connections import meaning as hc

# Streams, caches, and means of the streams after chosen blocks.
Passed = tuple[jax.Array, tuple[LayerCache, ...], list[jax.Array]]


@functools.partial(jax.jit, static_argnames=("graph", "opt_out"))
def _block(
    graph: nnx.GraphDef, weights: nnx.State, h_TND: jax.Array, ids_T: jax.Array, rows: Rows, cache: LayerCache,
    *, opt_out: str | None,
) -> tuple[jax.Array, LayerCache]:  # fmt: skip
    """A block without recording. Jitted, so that layers of one kind are traced and lowered once.

    The gate reads `opt_out` from the environment during the trace, so it is part of the kind.
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
        self.dspark = DSpark(config, rngs=rngs) if config.n_dspark else None
        self.config = config

    def streams(self, ids_T: jax.Array, rows: Rows, cache: Cache, record: Record = ignore) -> tuple[jax.Array, Cache]:
        """`tapped` without means."""
        h_TND, cache, _ = self.tapped(ids_T, rows, cache, (), record)
        return h_TND, cache

    def tapped(
        self, ids_T: jax.Array, rows: Rows, cache: Cache, taps: tuple[int, ...], record: Record = ignore
    ) -> tuple[jax.Array, Cache, list[jax.Array]]:
        """Run T rows through every layer.

        Args:
            ids_T: int32 [T] tokens of the rows.
            rows: positions and sequences; the cache must hold exactly `rows.start` rows of each sequence.
            taps: static; layers, counted from 0.

        Returns:
            Streams float32 [T, N, D] after the last layer, the cache with the live rows and `length` = `rows.end`, and for each
            layer of `taps` the mean float32 [T, D] over the streams after it.
        """
        embedded_TD = self.embed(ids_T)
        h_TND = jnp.broadcast_to(embedded_TD[:, None, :], (ids_T.shape[0], self.config.hc_mult, self.config.dim))
        record("embedded", h_TND)
        h_TND, layers, means = self.through(list(self.layers), h_TND, ids_T, rows, cache.layers, "layers", record, taps)
        return h_TND, dataclasses.replace(cache, layers=layers, length=rows.end), means

    def through(
        self, blocks: list[Block], h_TND: jax.Array, ids_T: jax.Array, rows: Rows, caches: tuple[LayerCache, ...], name: str,
        record: Record = ignore, taps: tuple[int, ...] = (),
    ) -> Passed:  # fmt: skip
        """Run streams through blocks in order; few rows on CUDA run by the decode kernels.

        Args:
            h_TND: float32 [T, N, D].
            caches: one of each block.
            name: what the blocks are called, for profiles and records.
            taps: static; indices of blocks.

        Returns:
            The streams after the last block, the caches with the live rows, and the mean float32 [T, D] over the streams after
            each block of `taps`.
        """

        def modules(h_TND: jax.Array, caches: tuple[LayerCache, ...]) -> Passed:
            done, means = [], {}
            for i, (block, cache) in enumerate(zip(blocks, caches, strict=True)):
                with jax.named_scope(f"{name.removesuffix('s')}{i}"):
                    if record is ignore:
                        h_TND, cache = _block(*nnx.split(block), h_TND, ids_T, rows, cache, opt_out=opt_out())
                    else:
                        h_TND, cache = block(h_TND, ids_T, rows, cache, under(record, f"{name}.{i}"))
                done.append(cache)
                if i in taps:
                    means[i] = jnp.mean(h_TND, axis=1)
            return h_TND, tuple(done), [means[i] for i in taps]

        weights = map(decode_kernels.weights_of, blocks)
        if record is not ignore or paths.why_not_step(self.config, weights, rows, caches):
            return modules(h_TND, caches)
        kernels = functools.partial(decode_kernels.layers, self.config, blocks, ids_T=ids_T, rows=rows, taps=taps)
        through: Passed = jax.lax.platform_dependent(
            h_TND, caches, cuda=lambda h, caches: kernels(h_TND=h, caches=caches), default=modules
        )
        return through

    def logits(self, h_TND: jax.Array, *, strict: bool = False) -> jax.Array:
        """Logits of the next token, through the final hyper-connection, norm and head.

        Args:
            h_TND: float32 [T, N, D], streams after the last layer.
            strict: static; the product is float32 and free of Pallas kernels.

        Returns:
            float32 [T, V], not normalised.

        Source: the hyper-connection head of the reference inference code, `hyper_connections.meaning.head` here.
        """
        with jax.named_scope("head"):
            return self.scored(self, h_TND, strict)

    def mtp_streams(
        self, h_TND: jax.Array, next_ids_T: jax.Array, rows: Rows, cache: LayerCache, record: Record = ignore
    ) -> tuple[jax.Array, LayerCache]:
        """Run the MTP block over rows of positions t.

        Args:
            h_TND: float32 [T, N, D], the main model's streams at t, or this block's own for deeper drafts.
            next_ids_T: int32 [T], tokens at t+1.
            rows: positions and sequences in the block's own cache.
            cache: the block's own.

        Returns:
            The block's streams float32 [T, N, D], and its cache with the live rows.
        """
        with jax.named_scope("mtp"):
            mixed_TND = self.mtp[0].mixed(h_TND, self.embed(next_ids_T), rows, under(record, "mtp.0"))
            h_TND, (cache,), _ = self.through([self.mtp[0]], mixed_TND, next_ids_T, rows, (cache,), "mtp", record)
        return h_TND, cache

    def mtp_logits(self, h_TND: jax.Array, *, strict: bool = False) -> jax.Array:
        """The MTP block's streams [T, N, D] at positions t → logits [T, V] of the token at t+2, through the shared head."""
        with jax.named_scope("mtp_head"):
            return self.scored(self.mtp[0], h_TND, strict)

    def scored(self, part: Transformer | MTP | DSpark, h_TND: jax.Array, strict: bool) -> jax.Array:
        """Logits [T, V] through the shared head; `part` holds the hyper-connection and the norm before it."""
        fn, scale, base = part.hc_head_fn.get_value(), part.hc_head_scale.get_value(), part.hc_head_base.get_value()

        def modules(h_TND: jax.Array) -> jax.Array:
            x_TD = hc.head(h_TND, fn, scale, base, eps=self.config.hc_eps, norm_eps=self.config.norm_eps)
            return self.head(part.norm(x_TD), strict=strict)

        if paths.why_not_head(self.config, self.head.weight.get_value(), h_TND.shape[0], strict=strict):
            return modules(h_TND)
        kernels = functools.partial(
            decode_kernels.logits, self.config, self.head.weight.get_value(), part.norm.weight.get_value()
        )
        scored: jax.Array = jax.lax.platform_dependent(
            h_TND, cuda=lambda h: kernels(fn=fn, scale=scale, base=base, h_TND=h), default=modules
        )
        return scored

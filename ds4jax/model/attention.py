"""Attention of one layer: a window of recent rows, a sink, and the compressed rows that the layer's ratio gives it.

Keys and values are one shared row per token; queries and the output go through low-rank projections. Source: `Attention` of the
reference inference code and the V4 report's compressed sparse and heavily compressed attention.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from ds4jax.cache.state import OVERLAP_RATIO, LayerCache, Rows, own, ring_and_rows, with_ring, write_ring
from ds4jax.cache.stored_rows import taken, widen
from ds4jax.config import Config
from ds4jax.model import paths, prefill_kernels
from ds4jax.model.compressor import Compressor, visible_blocks
from ds4jax.model.indexer import Indexer, Queries
from ds4jax.model.layers import GroupedLinear, Linear, RMSNorm, Rngs, parameter, together
from ds4jax.model.rope import inverse_frequencies, rotate
from ds4jax.model.row_slices import in_slices, slice_rows
from ds4jax.model.tape import Record, ignore, under
from pallas_kernels.attention.meaning import Segment, attend, in_window, ring_positions, round_rows
from pallas_kernels.core.norm import rms_scale
from pallas_kernels.formats import Quantized
from pallas_kernels.linear.cut import gathered, own_part, rows_of, spread


class Attention(nnx.Module):
    """One layer's attention; `ratio` 0, 4 or anything larger selects what it sees beyond the window."""

    def __init__(self, config: Config, ratio: int, *, rngs: Rngs):
        heads = config.n_heads * config.head_dim
        self.attn_sink = parameter(rngs, config.n_heads)
        self.wq_a = Linear(config.q_lora_rank, config.dim, rngs=rngs)
        self.q_norm = RMSNorm(config.q_lora_rank, config.norm_eps, rngs=rngs)
        self.wq_b = Linear(heads, config.q_lora_rank, rngs=rngs)
        self.wkv = Linear(config.head_dim, config.dim, rngs=rngs)
        self.kv_norm = RMSNorm(config.head_dim, config.norm_eps, rngs=rngs)
        self.wo_a = GroupedLinear(config.o_groups, config.o_lora_rank, heads // config.o_groups, rngs=rngs)
        self.wo_b = Linear(config.dim, config.o_groups * config.o_lora_rank, rngs=rngs)
        if ratio:
            self.compressor = Compressor(config, ratio, config.head_dim, rngs=rngs)
        if ratio == OVERLAP_RATIO:
            self.indexer = Indexer(config, ratio, rngs=rngs)
        self.config, self.ratio = config, ratio

    def __call__(self, x_TD: jax.Array, rows: Rows, cache: LayerCache, record: Record = ignore) -> tuple[jax.Array, LayerCache]:
        """Attend from the call's rows, float32 [T, D] → [T, D], and take them into the cache."""
        config = self.config
        q_low_TL, kv_TQ = together(x_TD, self.wq_a, self.wkv, strict=rows.strict, decoding=rows.decoding)
        q_low_TL = self.q_norm(q_low_TL)
        record("q_low", q_low_TL)
        by_heads = self.wq_b.weight.get_value()
        q_THQ = self.wq_b.part(q_low_TL, strict=rows.strict, decoding=rows.decoding).reshape(x_TD.shape[0], -1, config.head_dim)
        kv_TQ = self._key_rows(kv_TQ, rows)
        record("kv", kv_TQ)

        before, cache = cache.window, self._append(x_TD, kv_TQ, rows, cache, record)
        index = self.indexer.queries(x_TD, q_low_TL, rows) if cache.indexer is not None else None

        def modules(q_THQ: jax.Array) -> jax.Array:
            if record is ignore:
                q_THQ = spread(q_THQ, by_heads, 1)
            else:
                # A record has all heads.
                q_THQ = gathered(q_THQ.reshape(len(q_THQ), -1), by_heads).reshape(len(q_THQ), -1, config.head_dim)
            # The sum over a head has the shape of all heads: XLA may sum in another order for fewer.
            frequencies = inverse_frequencies(config, compressed=self.ratio > 0)
            q_THQ = rotate(q_THQ * rms_scale(q_THQ, config.norm_eps), rows.position, frequencies)
            window, visible_TS = self._window(kv_TQ, rows, before, cache.window)
            sink_H = self.attn_sink.get_value().astype(jnp.float32)
            gather = rows.decoding or not rows.single

            def some(queries: tuple[jax.Array, jax.Array, Queries | None, jax.Array]) -> jax.Array:
                q, visible, index, position = queries
                compressed = self._compressed(index, rows.some(position), cache, gather, record)
                out, weights = attend(q, [(window, visible), *compressed], sink_H, config.head_dim**-0.5)
                for name, weight in zip(("sink", "window", "compressed"), (weights[-1], *weights[:-1]), strict=False):
                    record(f"{name}_weights", weight)
                return out

            # Recorded scores are for all rows at once, and few rows gather instead of scoring all.
            count = len(q_THQ)
            columns = window.shape[-2] + (cache.compressor.rows.shape[1] if cache.compressor else 0)
            size = count if gather or record is not ignore else slice_rows(config, count, columns)
            out_THQ = in_slices(some, (q_THQ, visible_TS, index, rows.position), count, size)
            return own_part(rotate(out_THQ, rows.position, frequencies, inverse=True), by_heads, 1)

        if record is ignore and paths.why_not_prefill_attention(config, rows, rows_of(by_heads)) is None:
            # The product with quantised weights rounds its activations to bfloat16.
            dtype = jnp.bfloat16 if isinstance(rows_of(self.wo_a.weight.get_value()), Quantized) else jnp.float16
            sink_H = own_part(self.attn_sink.get_value(), by_heads)
            kernels = functools.partial(prefill_kernels.attend, config, self.ratio, sink_H, kv_TQ, index, rows, dtype=dtype)
            out_THQ = jax.lax.platform_dependent(q_THQ, cuda=lambda q: kernels(before, cache, q), default=modules)
        else:
            out_THQ = modules(q_THQ)
        out = self.wo_a(out_THQ.reshape(x_TD.shape[0], -1), strict=rows.strict, decoding=rows.decoding)
        return self.wo_b(out, strict=rows.strict, decoding=rows.decoding), cache

    def keep(self, x_TD: jax.Array, rows: Rows, window: jax.Array) -> jax.Array:
        """The window's ring [B, ring, Q] with rows made of inputs float32 [T, D], without attending."""
        return write_ring(window, self._key_rows(self.wkv(x_TD, strict=rows.strict, decoding=rows.decoding), rows), rows)

    def _key_rows(self, kv_TQ: jax.Array, rows: Rows) -> jax.Array:
        """Keys and values of projected rows [T, Q]: normed, rotated at their positions, and rounded as in training."""
        frequencies = inverse_frequencies(self.config, compressed=self.ratio > 0)
        return self._finish_rows(rotate(self.kv_norm(kv_TQ), rows.position, frequencies))

    def _finish_rows(self, x: jax.Array) -> jax.Array:
        """Round the part of rows [.., Q] that does not rotate, as training did."""
        return round_rows(x, self.config.rope_dim) if self.config.qat else x

    def _window(self, kv_TQ: jax.Array, rows: Rows, before: jax.Array, written: jax.Array) -> Segment:
        """Rows that may be in the window, and which of them each query sees.

        A call that leaves the ring enough of the past reads the written ring, where a row's place follows from its position
        alone: its sums have the same order and the same bits, whether the rows before it came in this call or in earlier ones.
        """
        if rows.sees is not None:
            return with_ring(before, kv_TQ), rows.sees
        size, window = written.shape[1], self.config.window
        if rows.per_sequence <= size - window + 1:
            held, position = own(written, rows), ring_positions(size, rows.end[rows.readers])
        else:
            held, position = ring_and_rows(before, kv_TQ, rows)
        return held, in_window(rows.horizon, position, rows.reach(window))

    def _append(self, x_TD: jax.Array, kv_TQ: jax.Array, rows: Rows, cache: LayerCache, record: Record) -> LayerCache:
        """The cache with the call's rows in its window and the blocks that they close among the compressed rows."""
        cache = dataclasses.replace(cache, window=write_ring(cache.window, kv_TQ, rows))
        if cache.compressor is not None:
            finished = self.compressor(x_TD, rows, cache.compressor, finish=self._finish_rows, record=under(record, "compressor"))
            cache = dataclasses.replace(cache, compressor=finished)
        if cache.indexer is not None:
            keys = self.indexer.append(x_TD, rows, cache.indexer, under(record, "indexer"))
            cache = dataclasses.replace(cache, indexer=keys)
        return cache

    def _compressed(self, index: Queries | None, rows: Rows, cache: LayerCache, gather: bool, record: Record) -> list[Segment]:
        """Compressed rows and which of them each query sees, as far as the layer has any; `gather` is for few rows."""
        if cache.compressor is None:
            return []
        held = cache.compressor.rows
        if cache.indexer is None or index is None:
            return [(widen(own(held, rows)), visible_blocks(held.shape[1], self.ratio, rows))]
        index_TK, visible_TK = self.indexer(index, rows, cache.indexer, under(record, "indexer"))
        record("indexer.selected", jnp.where(visible_TK, index_TK, -1))
        if gather:
            return [(taken(held, rows.sequence, index_TK), visible_TK)]
        # For many rows a masked product over all compressed rows is cheaper than gathering each query's own.
        query = jnp.arange(index_TK.shape[0], dtype=jnp.int32)[:, None]
        chosen = jnp.zeros((index_TK.shape[0], held.shape[1]), bool).at[query, index_TK].max(visible_TK)
        return [(widen(own(held, rows)), chosen)]

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

from ds4jax.cache import OVERLAP_RATIO, LayerCache, Rows, held_positions, ring_positions, with_ring, write_ring
from ds4jax.config import Config
from ds4jax.model import fake_quant, many_rows
from ds4jax.model.compressor import Compressor, visible_blocks
from ds4jax.model.indexer import Indexer
from ds4jax.model.layers import GroupedLinear, Linear, RMSNorm, Rngs, parameter, rms_scale, together
from ds4jax.model.many_rows import Queries
from ds4jax.model.rope import inverse_frequencies, rotate
from ds4jax.model.tape import Record, ignore, under
from ds4jax.row_store import expanded, taken

# Above this many rows a masked product over all compressed rows is cheaper than gathering each query's own.
GATHER_ROWS = 8

Segment = tuple[jax.Array, jax.Array]


def attend(
    q_THQ: jax.Array, segments: list[Segment], sink_H: jax.Array, scale: float, record: Record = ignore
) -> tuple[jax.Array, list[jax.Array]]:
    """Softmax attention with a sink over several sets of rows that are keys and values at once.

    Args:
        q_THQ: float32 [T, H, Q].
        segments: pairs of rows, [S, Q] shared by the queries or [T, S, Q] each query's own, and which of them each query sees,
            bool [T, S]. Every query must see at least one row.
        sink_H: one logit a head, which takes part in the denominator alone.

    Returns:
        float32 [T, H, Q], and the attention probabilities [T, H, S] of each segment.
    """
    scores = []
    for rows, visible in segments:
        keys = "sq" if rows.ndim == 2 else "tsq"
        score = jnp.einsum(f"thq,{keys}->ths", q_THQ, rows, preferred_element_type=jnp.float32) * scale
        scores.append(jnp.where(visible[:, None, :], score, -jnp.inf))
    top = jnp.max(jnp.concatenate(scores, axis=-1), axis=-1, keepdims=True)
    top = jnp.maximum(top, sink_H[None, :, None])
    weights = [jnp.exp(score - top) for score in scores]
    total = jnp.exp(sink_H[None, :, None] - top) + sum(jnp.sum(w, axis=-1, keepdims=True) for w in weights)
    record("sink_weights", (jnp.exp(sink_H[None, :, None] - top) / total)[..., 0])
    weights = [w / total for w in weights]
    out = jnp.zeros_like(q_THQ)
    for (rows, _), weight in zip(segments, weights, strict=True):
        keys = "sq" if rows.ndim == 2 else "tsq"
        out += jnp.einsum(f"ths,{keys}->thq", weight, rows, preferred_element_type=jnp.float32)
    return out, weights


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
        frequencies = inverse_frequencies(config, compressed=self.ratio > 0)
        q_low_TL, kv_TQ = together(x_TD, self.wq_a, self.wkv, strict=rows.strict)
        q_low_TL = self.q_norm(q_low_TL)
        record("q_low", q_low_TL)
        q_THQ = self.wq_b(q_low_TL, strict=rows.strict).reshape(-1, config.n_heads, config.head_dim)
        q_THQ = rotate(q_THQ * rms_scale(q_THQ, config.norm_eps), rows.position, frequencies)
        kv_TQ = self._finish_rows(rotate(self.kv_norm(kv_TQ), rows.position, frequencies))
        record("kv", kv_TQ)

        before, cache = cache.window, self._take_in(x_TD, kv_TQ, rows, cache, record)
        index = self.indexer.queries(x_TD, q_low_TL, rows) if cache.indexer is not None else None

        def modules(q_THQ: jax.Array) -> jax.Array:
            segments = [self._window(kv_TQ, rows, before, cache.window), *self._compressed(index, rows, cache, record)]
            sink_H = self.attn_sink.get_value().astype(jnp.float32)
            out_THQ, weights = attend(q_THQ, segments, sink_H, config.head_dim**-0.5, record)
            for name, weight in zip(("window", "compressed"), weights, strict=False):
                record(f"{name}_weights", weight)
            return out_THQ

        if record is ignore and many_rows.serves(config, rows, self.wq_b.weight.get_value()):
            kernels = functools.partial(many_rows.attend, config, self.ratio, self.attn_sink.get_value(), kv_TQ, index, rows)
            out_THQ = jax.lax.platform_dependent(q_THQ, cuda=lambda q: kernels(before, cache, q), default=modules)
        else:
            out_THQ = modules(q_THQ)
        out_THQ = rotate(out_THQ, rows.position, frequencies, inverse=True)
        out = self.wo_a(out_THQ.reshape(x_TD.shape[0], -1), strict=rows.strict)
        return self.wo_b(out, strict=rows.strict), cache

    def _finish_rows(self, x: jax.Array) -> jax.Array:
        """Round the part of rows [.., Q] that does not rotate, as training did."""
        if not self.config.qat:
            return x
        still, turning = jnp.split(x, [x.shape[-1] - self.config.rope_dim], axis=-1)
        return jnp.concatenate([fake_quant.fp8(still), turning], axis=-1)

    def _window(self, kv_TQ: jax.Array, rows: Rows, before: jax.Array, written: jax.Array) -> Segment:
        """Rows that may be in the window, and which of them each query sees.

        A call that leaves the ring enough of the past reads the written ring, where a row's place follows from its position
        alone: its sums have the same order and the same bits, whether the rows before it came in this call or in earlier ones.
        """
        size, window = written.shape[1], self.config.window
        if kv_TQ.shape[0] <= size - window + 1:
            position, sequence = ring_positions(size, rows.end)
            held = written.reshape(-1, written.shape[-1])
        else:
            position, sequence = held_positions(size, rows)
            held = with_ring(before, kv_TQ)
        age = rows.position[:, None] - position[None, :]
        seen = (age >= 0) & (age < window) & (position >= 0)[None, :]
        return held, seen & (sequence[None, :] == rows.sequence[:, None])

    def _take_in(self, x_TD: jax.Array, kv_TQ: jax.Array, rows: Rows, cache: LayerCache, record: Record) -> LayerCache:
        """The cache with the call's rows in its window and the blocks that they close among the compressed rows."""
        cache = dataclasses.replace(cache, window=write_ring(cache.window, kv_TQ, rows))
        if cache.compressor is not None:
            finished = self.compressor(x_TD, rows, cache.compressor, finish=self._finish_rows, record=under(record, "compressor"))
            cache = dataclasses.replace(cache, compressor=finished)
        if cache.indexer is not None:
            keys = self.indexer.take_in(x_TD, rows, cache.indexer, under(record, "indexer"))
            cache = dataclasses.replace(cache, indexer=keys)
        return cache

    def _compressed(self, index: Queries | None, rows: Rows, cache: LayerCache, record: Record) -> list[Segment]:
        """Compressed rows and which of them each query sees, as far as the layer has any."""
        if cache.compressor is None:
            return []
        rows_SQ = expanded(cache.compressor.rows).reshape(-1, self.config.head_dim)
        if cache.indexer is None or index is None:
            return [(rows_SQ, visible_blocks(cache.compressor.rows.shape[1], self.ratio, rows))]
        index_TK, visible_TK = self.indexer(index, rows, cache.indexer, under(record, "indexer"))
        record("indexer.selected", jnp.where(visible_TK, index_TK, -1))
        if index_TK.shape[0] <= GATHER_ROWS:
            return [(taken(cache.compressor.rows, index_TK), visible_TK)]
        query = jnp.arange(index_TK.shape[0], dtype=jnp.int32)[:, None]
        chosen = jnp.zeros((index_TK.shape[0], rows_SQ.shape[0]), bool).at[query, index_TK].max(visible_TK)
        return [(rows_SQ, chosen)]

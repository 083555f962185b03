"""How many rows a prefill call takes: as many as what it computes beside weights and cache leaves room for."""

from __future__ import annotations

import jax

from ds4jax.buckets import BUCKETS, PREFILL
from ds4jax.cache import OVERLAP_RATIO
from ds4jax.config import Config
from ds4jax.model.many_rows import SCORE_BYTES
from pallas_kernels.grouped_matmul import MOST_VALUES
from pallas_kernels.ops import MOST_TILE_VALUES

# What a call may take beside weights and cache, however much there is.
MOST_BYTES = 8_000_000_000


def call_bytes(config: Config, rows: int, capacity: int, *, logits: bool = False) -> int:
    """About what a prefill call of so many rows computes with beside weights and cache, in bytes.

    Args:
        capacity: rows of the cache, whose compressed rows the indexer scores.
        logits: whether the logits of all rows are wanted.

    The sum of what its parts have at their largest: four copies of the streams, queries in float32 and bfloat16 and the output,
    each row's chosen experts with inputs, hidden values and outputs, one slice of expanded weights, scores, and a layer's
    compressed rows in float16.
    """
    streams = 4 * config.hc_mult * config.dim * 4
    queries = config.n_heads * config.head_dim * (4 + 2 + 4)
    experts = config.n_active * (2 * config.dim + 2 * 2 * config.moe_dim + 4 * config.dim)
    stack = config.n_experts * config.moe_dim * config.dim
    # Of experts in bfloat16, of a dense matrix in float32.
    expanded = max(2 * min(stack, MOST_VALUES), 4 * MOST_TILE_VALUES)
    keys = capacity // OVERLAP_RATIO * 4 if OVERLAP_RATIO in config.layer_ratios else 0
    # A single row's are never cut.
    scores = min(rows * keys, max(SCORE_BYTES, keys))
    # A layer's compressed rows as the tensor cores want them.
    compressed = capacity // OVERLAP_RATIO * config.head_dim * 2 if keys else 0
    return rows * (streams + queries + experts + (config.vocab_size * 4 if logits else 0)) + expanded + scores + compressed


def chunk_for(config: Config, capacity: int, free: int | None, *, logits: bool = False) -> int:
    """Rows of a prefill call: the largest bucket that fits into `free` bytes and `MOST_BYTES`, at least the smallest.

    Args:
        free: bytes that weights and cache leave of an accelerator's memory; None on a CPU, where calls of 512 rows are as fast
            as longer ones.
    """
    if free is None:
        return PREFILL[-1]
    room = min(free, MOST_BYTES)
    fitting = [bucket for bucket in BUCKETS if call_bytes(config, bucket, capacity, logits=logits) <= room]
    return max(fitting, default=BUCKETS[0])


def chunk_here(config: Config, capacity: int, held: int, *, logits: bool = False) -> int:
    """`chunk_for` on the default device when weights and cache are `held` bytes.

    What the device has in all decides and not what is free of it now: the same prompt gets the same calls and the same bits.
    """
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
    return chunk_for(config, capacity, None if limit is None else limit - held, logits=logits)

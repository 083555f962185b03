"""How many rows a prefill call has: the largest chunk whose temporary arrays fit in memory next to weights and cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from ds4jax.cache.capacity import KERNEL_PREFILL, PREFILL, needed
from ds4jax.cache.state import OVERLAP_RATIO
from ds4jax.config import Config
from ds4jax.device import device_memory, host_memory
from ds4jax.model.prefill_kernels import SCORE_BYTES
from ds4jax.model.row_slices import COPIES, score_bytes, slice_rows
from pallas_kernels.experts.prefill import MAX_VALUES
from pallas_kernels.ops import MAX_TILE_VALUES

# Called with the number of prompt rows that are computed and the number that must be.
Progress = Callable[[int, int], None]

# Maximum bytes of a call's temporary arrays, whatever the size of the memory.
MAX_BYTES = 8_000_000_000
# Maximum rows of a call where the free memory is unknown.
UNKNOWN_ROWS = 1024


def call_bytes(config: Config, rows: int, capacity: int, *, logits: bool = False, kernels: bool = True) -> int:
    """Estimate the temporary arrays of a prefill call of `rows` rows, in bytes.

    Args:
        capacity: rows of the cache. The indexer scores its compressed rows.
        logits: whether the call returns the logits of all rows.
        kernels: whether attention runs by kernels, as on CUDA, or by the modules, as on a CPU.

    The sum of each part's maximum: four copies of the streams, queries in float32 and bfloat16 and the output, each row's chosen
    experts with inputs, hidden values and outputs, one slice of dequantised weights, and what attention takes of the cache.
    """
    streams = 4 * config.hc_mult * config.dim * 4
    queries = config.n_heads * config.head_dim * (4 + 2 + 4)
    experts = config.n_active * (2 * config.dim + 2 * 2 * config.moe_dim + 4 * config.dim)
    stack = config.n_experts * config.moe_dim * config.dim
    # Experts in bfloat16, a dense matrix in float32.
    dequantised = max(2 * min(stack, MAX_VALUES), 4 * MAX_TILE_VALUES)
    attention = _kernel_bytes(config, rows, capacity) if kernels else _module_bytes(config, rows, capacity)
    return rows * (streams + queries + experts + (config.vocab_size * 4 if logits else 0)) + dequantised + attention


def _kernel_bytes(config: Config, rows: int, capacity: int) -> int:
    """Indexer scores, and a layer's compressed rows in float16, as the tensor cores read them."""
    if OVERLAP_RATIO not in config.layer_ratios:
        return 0
    keys = capacity // OVERLAP_RATIO * 4
    # The scores of a single row are never sliced.
    scores = min(rows * keys, max(SCORE_BYTES, keys))
    return scores + capacity // OVERLAP_RATIO * config.head_dim * 2


def _module_bytes(config: Config, rows: int, capacity: int) -> int:
    """Scores of a slice of rows against window and compressed rows, and a layer's compressed rows and keys in float32."""
    compressed = max((capacity // ratio + 1 for ratio in config.layer_ratios if ratio), default=0)
    # A call longer than its ring reads the ring and its own rows.
    columns = 2 * config.window + rows + compressed
    scores = COPIES * score_bytes(config, slice_rows(config, rows, columns), columns)
    return scores + compressed * (config.head_dim + config.index_dim) * 4


def chunk_for(config: Config, capacity: int, free: int | None, *, logits: bool = False, kernels: bool = True) -> int:
    """Rows of a prefill call: the largest bucket that fits in `free` bytes and `MAX_BYTES`, or the smallest bucket.

    A bucket that no prompt in a cache of this capacity needs is left out.

    Args:
        free: bytes of memory next to weights and cache; None where it is unknown.
        logits, kernels: as for `call_bytes`. Without kernels, as on a CPU, 512 rows are as fast as more and are the maximum.
    """
    usual = needed(buckets(kernels=kernels), capacity)
    if free is None:
        return max(rows for rows in usual if rows <= UNKNOWN_ROWS)
    room = min(free, MAX_BYTES)
    fitting = [rows for rows in usual if call_bytes(config, rows, capacity, logits=logits, kernels=kernels) <= room]
    return max(fitting, default=usual[0])


def buckets(*, kernels: bool) -> tuple[int, ...]:
    """Usual widths of a prefill call, ascending, by kernels or as on a CPU."""
    return KERNEL_PREFILL if kernels else PREFILL


def buckets_here() -> tuple[int, ...]:
    """`buckets` on the default device."""
    return buckets(kernels=jax.devices()[0].platform != "cpu")


def chunk_here(config: Config, capacity: int, held: int, *, logits: bool = False) -> int:
    """`chunk_for` on the default device when weights and cache take `held` bytes.

    On an accelerator the memory's size decides, not what is free now, so that a prompt is always cut in the same way and gets
    the same bits. On a CPU other processes share the memory, so the chunk also fits in what is free now.
    """
    if jax.devices()[0].platform != "cpu":
        memory = device_memory()
        return chunk_for(config, capacity, None if memory is None else memory.limit - held, logits=logits)
    host = host_memory()
    room = None if host is None else min(host.limit - held, host.limit - host.used)
    return chunk_for(config, capacity, room, logits=logits, kernels=False)


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree; `jax.ShapeDtypeStruct` counts as the array it describes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

"""Shapes that calls are rounded up to, so that ordinary use compiles little."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

# Each holds four of the one before. The last is for accelerators with room for what so many rows compute.
BUCKETS = (32, 128, 512, 4096)
PREFILL = BUCKETS[:3]
# A call's least share of rows that are real, where smaller calls could do it.
LEAST_REAL = 4
LEAST_CAPACITY = 512


def capacity_for(rows: int, max_context: int) -> int:
    """Rows that a cache is made for: a power of two, so that prompts of like length share an executable."""
    return min(max(LEAST_CAPACITY, 1 << (rows - 1).bit_length()), max(max_context, rows))


def capacities(context: int, max_context: int) -> list[int]:
    """Every size of cache that texts of up to `context` tokens get, ascending."""
    rows = [context, *(LEAST_CAPACITY << i for i in range(context.bit_length()))]
    return sorted({capacity_for(min(count, context), max_context) for count in rows})


def widths(chunk: int) -> tuple[int, ...]:
    """Rows that a prefill call may have when at most `chunk` of them are real, ascending.

    All buckets below the chunk and the chunk itself, which need not be one. A chunk below the smallest bucket is padded to that:
    a call of a few rows is computed as a decode step is, with other rounding, and would be one program more.
    """
    return (*(bucket for bucket in BUCKETS if bucket < chunk), max(chunk, BUCKETS[0]))


def chunks(total: int, decode_from: int, chunk: int = PREFILL[-1]) -> Iterator[tuple[int, int, int]]:
    """Start, width and number of real rows of each call that takes `total` tokens in, one at a time from `decode_from` on.

    Args:
        chunk: real rows that a call has at most, 1 or more. What is left at the end is one padded call, or several where most
            of that one would be padding.
    """
    allowed = widths(chunk)
    start = 0
    while start < total:
        left = decode_from - start
        width, count = _call(allowed, chunk, left) if left > 0 else (1, 1)
        yield start, width, count
        start += count


def _call(allowed: tuple[int, ...], chunk: int, left: int) -> tuple[int, int]:
    """Width and real rows of the next of the calls that take `left` rows in."""
    count = min(left, chunk)
    below, width = 0, 0
    for width in allowed:
        if width >= count:
            break
        below = width
    if below and count * LEAST_REAL < width:
        return below, below
    return width, count


def padded(ids_T: np.ndarray, start: int, width: int) -> jax.Array:
    """The tokens from `start` on as int32 [width], filled up with zeros."""
    part = ids_T[start : start + width]
    return jnp.asarray(np.pad(part, (0, width - len(part))))

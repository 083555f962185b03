"""Numbers of rows that calls and caches are rounded up to, so that few programs are compiled."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

# Rows of a prefill call. The last is for accelerators with enough memory for its temporary arrays.
BUCKETS = (32, 128, 512, 4096)
PREFILL = BUCKETS[:3]
# A call has at least one real row in this many; with fewer, a smaller bucket is taken.
MIN_REAL = 4
MIN_CAPACITY = 512


def capacity_for(rows: int, max_context: int) -> int:
    """Capacity of a cache for `rows` rows: a power of two, so that prompts of similar length share a program."""
    return min(max(MIN_CAPACITY, 1 << (rows - 1).bit_length()), max(max_context, rows))


def capacities(context: int, max_context: int) -> list[int]:
    """All capacities of caches for texts of up to `context` tokens, ascending."""
    rows = [context, *(MIN_CAPACITY << i for i in range(context.bit_length()))]
    return sorted({capacity_for(min(count, context), max_context) for count in rows})


def widths(chunk: int) -> tuple[int, ...]:
    """Possible widths of a prefill call with at most `chunk` real rows, ascending.

    All buckets below the chunk, and the chunk itself. A chunk below the smallest bucket is padded to it: a call of few rows
    would be one more program, with the rounding of a decode step.
    """
    return (*(bucket for bucket in BUCKETS if bucket < chunk), max(chunk, BUCKETS[0]))


def chunks(total: int, decode_from: int, chunk: int = PREFILL[-1]) -> Iterator[tuple[int, int, int]]:
    """Start, width and number of real rows of each call that appends `total` tokens, one at a time from `decode_from` on.

    Args:
        chunk: maximum real rows of a call, 1 or more. The rest at the end is one padded call, or several if most of that call
            would be padding.
    """
    allowed = widths(chunk)
    start = 0
    while start < total:
        left = decode_from - start
        width, count = _call(allowed, chunk, left) if left > 0 else (1, 1)
        yield start, width, count
        start += count


def _call(allowed: tuple[int, ...], chunk: int, left: int) -> tuple[int, int]:
    """Width and real rows of the next call when `left` rows are to be appended."""
    count = min(left, chunk)
    below, width = 0, 0
    for width in allowed:
        if width >= count:
            break
        below = width
    if below and count * MIN_REAL < width:
        return below, below
    return width, count


def padded(ids_T: np.ndarray, start: int, width: int) -> np.ndarray:
    """The tokens from `start` on, padded with zeros to int32 [width]."""
    part = ids_T[start : start + width]
    return np.pad(part, (0, width - len(part)))

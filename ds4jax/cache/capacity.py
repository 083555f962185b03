"""Numbers of rows that calls and caches are rounded up to, so that few programs are compiled."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np

# Rows of a prefill call on a CPU, and by kernels.
PREFILL = (32, 128, 512)
KERNEL_PREFILL = (64, 256, 1024, 4096)
# A call takes as long as this many rows more, because it reads nearly all weights.
CALL_ROWS = 1000
MIN_CAPACITY = 512


def capacity_for(rows: int, max_context: int) -> int:
    """Capacity of a cache for `rows` rows: a power of two, so that prompts of similar length share a program."""
    return min(max(MIN_CAPACITY, 1 << (rows - 1).bit_length()), max(max_context, rows))


def capacities(context: int, max_context: int) -> list[int]:
    """All capacities of caches for texts of up to `context` tokens, ascending."""
    rows = [context, *(MIN_CAPACITY << i for i in range(context.bit_length()))]
    return sorted({capacity_for(min(count, context), max_context) for count in rows})


def widths(chunk: int, buckets: Sequence[int] = PREFILL) -> tuple[int, ...]:
    """Possible widths of a prefill call with at most `chunk` real rows, ascending.

    All buckets below the chunk, and the chunk itself. A chunk below the smallest bucket is padded to it: a call of few rows
    would be one more program, with the rounding of a decode step.
    """
    return (*(bucket for bucket in buckets if bucket < chunk), max(chunk, buckets[0]))


def needed(allowed: tuple[int, ...], rows: int) -> tuple[int, ...]:
    """The widths among `allowed` that a prompt of up to `rows` rows may use, ascending; at least the smallest."""
    return tuple(width for width in allowed if width == allowed[0] or width in _tail(allowed, min(rows, width))[1])


def chunks(
    total: int, decode_from: int, chunk: int = PREFILL[-1], buckets: Sequence[int] = PREFILL
) -> Iterator[tuple[int, int, int]]:
    """Start, width and number of real rows of each call that appends `total` tokens, one at a time from `decode_from` on.

    Args:
        chunk: maximum real rows of a call, 1 or more.
        buckets: usual widths of a call on this device.
    """
    start = 0
    for width, count in cut(min(total, decode_from), widths(chunk, buckets), chunk):
        yield start, width, count
        start += count
    for position in range(start, total):
        yield position, 1, 1


def cut(rows: int, allowed: tuple[int, ...], chunk: int | None = None) -> Iterator[tuple[int, int]]:
    """Width and number of real rows of each call that appends `rows` rows.

    The widest calls come first. The rest is cut so that the calls together have the fewest rows, `CALL_ROWS` more for each and
    padding included. The cut depends on nothing else, so the same prompt always has the same calls.

    Args:
        allowed: the widths, ascending.
        chunk: maximum real rows of a call; by default the widest.
    """
    chunk = allowed[-1] if chunk is None else chunk
    for _ in range(rows // chunk):
        yield allowed[-1], chunk
    left = rows % chunk
    for width in _tail(allowed, left)[1]:
        yield width, min(width, left)
        left -= min(width, left)


@functools.lru_cache(1 << 12)
def _tail(allowed: tuple[int, ...], rows: int) -> tuple[int, tuple[int, ...]]:
    """Rows, padding and `CALL_ROWS` included, and widths of the calls for the last `rows` rows, at most the widest."""
    if rows <= 0:
        return 0, ()
    width = next(width for width in allowed if width >= rows)
    best: tuple[int, tuple[int, ...]] = width + CALL_ROWS, (width,)
    for full in reversed(allowed[: allowed.index(width)]):
        cost, rest = _tail(allowed, rows - full)
        if full + CALL_ROWS + cost < best[0]:
            best = full + CALL_ROWS + cost, (full, *rest)
    return best


def padded(ids_T: np.ndarray, start: int, width: int) -> np.ndarray:
    """The tokens from `start` on, padded with zeros to int32 [width]."""
    part = ids_T[start : start + width]
    return np.pad(part, (0, width - len(part)))

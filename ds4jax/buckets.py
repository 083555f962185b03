"""Shapes that calls are rounded up to, so that ordinary use compiles little."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

PREFILL = (32, 128, 512)
LEAST_CAPACITY = 512


def capacity_for(rows: int, max_context: int) -> int:
    """Rows that a cache is made for: a power of two, so that prompts of like length share an executable."""
    return min(max(LEAST_CAPACITY, 1 << (rows - 1).bit_length()), max(max_context, rows))


def chunks(total: int, decode_from: int) -> Iterator[tuple[int, int, int]]:
    """Start, width and number of real rows of each call that takes `total` tokens in, one at a time from `decode_from` on."""
    start = 0
    while start < total:
        left = decode_from - start
        count = min(left, PREFILL[-1]) if left > 0 else 1
        width = next(bucket for bucket in PREFILL if bucket >= count) if left > 0 else 1
        yield start, width, count
        start += count


def padded(ids_T: np.ndarray, start: int, width: int) -> jax.Array:
    """The tokens from `start` on as int32 [width], filled up with zeros."""
    part = ids_T[start : start + width]
    return jnp.asarray(np.pad(part, (0, width - len(part))))

"""Slices of a call's rows: attention scores of a long cache stay within a byte bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax

from ds4jax.config import Config

# Maximum bytes of one array of scores [n, H, S] in float32. A program holds up to `COPIES` of them at once.
MAX_SCORE_BYTES = 1 << 28
COPIES = 3

Arrays = TypeVar("Arrays")


def slice_rows(config: Config, rows: int, columns: int) -> int:
    """Rows of a slice: `rows`, halved until the scores fit into `MAX_SCORE_BYTES`. An odd number of rows is not halved.

    Args:
        rows: T, of the call.
        columns: S, cache rows that a query is scored against.
    """
    size = rows
    while size % 2 == 0 and score_bytes(config, size, columns) > MAX_SCORE_BYTES:
        size //= 2
    return size


def score_bytes(config: Config, rows: int, columns: int) -> int:
    """Bytes of the scores of `rows` queries against `columns` cache rows: float32 [T, H, S], H of attention or indexer."""
    return rows * max(config.n_heads, config.index_heads) * columns * 4


def in_slices(function: Callable[[Arrays], jax.Array], arguments: Arrays, rows: int, size: int) -> jax.Array:
    """`function` of arrays [T, ..] for `size` rows at a time, one slice after another.

    Args:
        function: takes the tree `arguments` with `size` rows in each array and returns an array [size, ..].
        arguments: a tree of arrays [T, ..].
        rows: T, a multiple of `size`.
    """
    if size == rows:
        return function(arguments)
    slices = jax.tree.map(lambda x: x.reshape(rows // size, size, *x.shape[1:]), arguments)
    out: jax.Array = jax.lax.map(function, slices)
    return out.reshape(rows, *out.shape[2:])

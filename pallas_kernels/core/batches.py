"""Rows of activations in batches: the registers of a program hold the sums of few rows, at most eight.

The programs of the same weight rows are neighbours, one for each batch. So one of them reads the weights from memory, and the
others find them in the L2 cache. A row's arithmetic does not depend on its batch.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.core.limits import MAX_ROWS


@dataclasses.dataclass(frozen=True)
class Batch:
    """The rows of activations of one program.

    Attributes:
        total: M, rows of the call.
        size: rows of a batch. The last batch repeats row M - 1 if M is not a multiple, and does not store the repeats.
        first: int32 [], number of the first row; None if all rows are in one batch.
    """

    total: int
    size: int
    first: jax.Array | None

    @property
    def only(self) -> bool:
        """Whether all rows are in one batch, so that no other program loads the same weights."""
        return self.first is None

    def row(self, m: int) -> jax.Array | int:
        """Number of row `m` of the batch, to load it."""
        if self.first is None:
            return m
        row = self.first + m
        return jnp.minimum(row, self.total - 1) if self.total % self.size else row

    def place(self, m: jax.Array) -> jax.Array:
        """Numbers of rows `m` of the batch, to store them; some of the last batch are past the end."""
        return m if self.first is None else self.first + m

    def real(self, m: jax.Array) -> jax.Array | None:
        """Which of the rows `m` are no repeats; None if there are no repeats."""
        return None if self.first is None or self.total % self.size == 0 else self.first + m < self.total


def count(total: int, maximum: int = MAX_ROWS) -> int:
    """Number of batches of M rows, each of at most `maximum`."""
    return -(-total // maximum)


def rows_of(total: int, maximum: int = MAX_ROWS) -> int:
    """Rows of a batch of M rows: the batches are as equal as possible."""
    return -(-total // count(total, maximum))


def split(program: jax.Array, total: int, maximum: int = MAX_ROWS) -> tuple[jax.Array, Batch]:
    """The number of a program among those of its batch, and the batch."""
    batches, size = count(total, maximum), rows_of(total, maximum)
    if batches == 1:
        return program, Batch(total, size, None)
    return program // batches, Batch(total, size, program % batches * size)

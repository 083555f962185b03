"""The float weights of a launch: which of them a program works on, its loads, its passes over K, and the sums that it stores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.core import arithmetic, loads
from pallas_kernels.core.arithmetic import LANES
from pallas_kernels.core.batches import Batch

NAME = "float_matmul"

Sums = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Matrix:
    """One weight of a launch.

    Attributes:
        weight, out: references.
        n: rows of the weight.
        row: the program's first row.
        selected: whether the program works on it; None if the launch has one weight.
    """

    weight: Any
    out: Any
    n: int
    row: jax.Array
    selected: jax.Array | None

    def load(self, r: int, rows: int, place: jax.Array, inside: jax.Array | None, width: int, batch: Batch) -> jax.Array:
        """Load `width` values per lane of the program's row r of `rows`, from chunk `place` on."""
        row = self.row + r
        real = loads.all_of(row < self.n if self.n % rows else None, inside)
        return loads.load(self.weight, row, pl.ds(place, LANES), slice(None), real=real, width=width, once=batch.only)


def matrices(program: jax.Array, weights: Sequence[Any], outs: Sequence[Any], sizes: Sequence[int], rows: int) -> list[Matrix]:
    """The weights of a launch as a program sees them that owns `rows` rows of one of them."""
    first, made = 0, []
    for weight, out, n in zip(weights, outs, sizes, strict=True):
        tiles = pl.cdiv(n, rows)
        selected = (program >= first) & (program < first + tiles) if len(sizes) > 1 else None
        made.append(Matrix(weight, out, n, (program - first) * rows, selected))
        first += tiles
    return made


def loaded_chunks(
    owned: Sequence[Matrix], start: jax.Array, chunks: int, shape: tuple[int, int, int], batch: Batch, interpret: bool
) -> list[tuple[jax.Array, jax.Array | None, list[jax.Array]]]:
    """Load a program's rows of some chunks of K from place `start` on, all before the first product.

    Args:
        shape: places along K, values of each, and rows of the program.

    Returns:
        For each chunk its place, which lanes have a place, bool [32] or None if all do, and the rows, [32, values] each.
    """
    columns, width, rows = shape
    places = [start + c * LANES for c in range(chunks)]
    inside = [place + loads.numbers() < columns if columns % LANES else None for place in places]

    def weights_of(matrix: Matrix) -> list[list[jax.Array]]:
        return [
            [matrix.load(r, rows, place, real, width, batch) for r in range(rows)]
            for place, real in zip(places, inside, strict=True)
        ]

    loaded = loads.load_selected(owned, weights_of)
    if not interpret:
        # Start all loads before the first product.
        plt.debug_barrier()
    return list(zip(places, inside, loaded, strict=True))


def in_passes(chunks: int, unroll: int, size: int, one_pass: Callable[[jax.Array, int, Sums], Sums], sums: Sums) -> Sums:
    """Add all chunks of K to sums, `unroll` of them at a time.

    Args:
        size: of a chunk, in the unit of places.
        one_pass: called with the first chunk's place, how many chunks, and the sums.
    """
    passes, rest = divmod(chunks, unroll)
    if passes > 1:
        sums = jax.lax.fori_loop(0, passes, lambda i, sums: one_pass(i * unroll * size, unroll, sums), sums)
    elif passes:
        sums = one_pass(loads.value(0), unroll, sums)
    return one_pass(loads.value(passes * unroll * size), rest, sums) if rest else sums


def store_sums(matrices: Sequence[Matrix], sums: Sequence[jax.Array], rows: int, batch: Batch, interpret: bool) -> None:
    """Sum over the lanes and store, up to 32 sums at once; sum m · rows + r is of the batch's row m and the program's row r."""
    lane = loads.numbers()
    for first in range(0, len(sums), LANES):
        total, place, owner = arithmetic.sum_lanes(sums[first : first + LANES], lane, interpret=interpret)
        m, r = (first + place) // rows, (first + place) % rows
        for matrix in matrices:
            inside = matrix.row + r < matrix.n if matrix.n % rows else None
            real = loads.all_of(owner, matrix.selected, inside, batch.real(m))
            assert real is not None
            # The index of a lane without a value is past the end; interpret mode drops it.
            column = jnp.where(real, matrix.row + r, matrix.out.shape[1])
            plt.store(matrix.out.at[batch.place(m), column], total, mask=real)


def part_name(m: int, k: int, weights: Sequence[jax.Array]) -> str:
    """A launch part's name: rows of each weight, K and M."""
    return "_".join(map(str, (NAME, *(weight.shape[0] for weight in weights), k))) + f"_m{m}"


def traffic(weights: Sequence[jax.Array]) -> int:
    """Bytes of the weights."""
    return sum(weight.size * weight.dtype.itemsize for weight in weights)

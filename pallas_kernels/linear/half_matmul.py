"""Products of float32 rows and float16 weights on tensor cores; a row of activations is two float16 numbers a value.

Blocks of 32 values along K whose numbers agree modulo 8 have a sum of their own, a chain of tensor core instructions. The eight
sums are added in one fixed tree. Two kernels have this order, so that a row has the same bits in both:

* Few rows: a program is one warp with two or four weight rows. Two weight rows times eight blocks are the rows of a tile, the
  eight blocks of one row of activations its columns. Only products of the same block are used.
* Many rows: a program is eight warps, one for each sum. Sixteen weight rows are the rows of a tile, eight rows of activations its
  columns.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.core import batches, loads, mma
from pallas_kernels.core.arithmetic import LANES
from pallas_kernels.core.launch import Part
from pallas_kernels.linear.halves import LOW_SCALE
from pallas_kernels.linear.matrices import Matrix, in_passes, loaded_chunks, matrices, part_name, store_sums, traffic

# Sums of a row, and warps of a program of many rows.
RESIDUES = 8
# Values along K of all residues, eight a lane: what a warp of few rows takes at a time.
CHUNK = RESIDUES * mma.BLOCK
# The kernel of many rows is faster from so many rows on, and if it has so many programs for eight rows each.
MANY_ROWS = 5
MANY_TILES = 64
# Below so many weight rows, a program of one warp loads all of its weights at once.
FEW_HEIGHTS = 512


def _sum_of_halves(sums: jax.Array) -> jax.Array:
    """Sums [n, 8] of both halves → [n, 4]. The scaled sum of the low halves is exact, so the addition rounds once."""
    half = jax.lax.broadcasted_iota(jnp.int32, (sums.shape[0], 2, 4), 1)
    both = sums.reshape(sums.shape[0], 2, 4)
    return jnp.sum(jnp.where(half == 1, both * jnp.float32(1 / LOW_SCALE), both), axis=1)


def few_rows(
    program: jax.Array, inputs: Sequence[Any], outputs: Sequence[Any],
    *, sizes: tuple[int, ...], rows: int, unroll: int, together: int, interpret: bool,
) -> None:  # fmt: skip
    """Body of a program of one warp. `rows`: weight rows of a program, 1, 2 or 4."""
    x_ref, *weight_refs = inputs
    tokens, _, columns, width = x_ref.shape
    program, batch = batches.split(program, tokens, together)
    owned = matrices(program, weight_refs, outputs, sizes, rows)
    pairs = pl.cdiv(rows, 2)

    def one_pass(start: jax.Array, chunks: int, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out = list(sums)
        for place, real, weights in loaded_chunks(owned, start, chunks, (columns, width, rows), batch, interpret):
            for m in range(batch.size):
                span = pl.ds(place, LANES)
                high, low = (loads.load(x_ref, batch.row(m), half, span, slice(None), real=real, width=width) for half in (0, 1))
                for pair in range(pairs):
                    # A program of one row multiplies it twice.
                    first, second = weights[2 * pair], weights[min(2 * pair + 1, rows - 1)]
                    i = m * pairs + pair
                    out[i] = mma.multiply_tile(first, second, high, low, out[i], interpret=interpret, diagonal=True)
        return tuple(out)

    sums = tuple(jnp.zeros((LANES, width), jnp.float32) for _ in range(batch.size * pairs))
    sums = in_passes(pl.cdiv(columns, LANES), unroll, LANES, one_pass, sums)
    lanes = [value for pair in map(_own_blocks, sums) for value in pair]
    values = [lanes[2 * m * pairs + r] for m in range(batch.size) for r in range(rows)]
    store_sums(owned, values, rows, batch, interpret)


def _own_blocks(sums: jax.Array) -> list[jax.Array]:
    """Of a tile's sums, the products of the same block, of two weight rows: float32 [32] each, zero in the other lanes."""
    lane = jax.lax.broadcasted_iota(jnp.int32, sums.shape, 0)
    place = jax.lax.broadcasted_iota(jnp.int32, sums.shape, 1)
    block, pair = lane >> 2, lane & 3
    scaled = jnp.where(place < 4, sums, sums * jnp.float32(1 / LOW_SCALE))
    own = (block >> 1) == pair
    return [jnp.sum(jnp.where(own & ((place & 3) == 2 * r + (block & 1)), scaled, 0.0), axis=1) for r in (0, 1)]


@dataclasses.dataclass(frozen=True)
class _Threads:
    """The 256 threads of a program of many rows. Warp w has the blocks whose numbers are w modulo 8.

    Attributes:
        row: int32 [256], the row or column of a tile that a thread holds values of.
        own: int32 [256], where along K its values of a chunk begin.
        width: K.
    """

    row: jax.Array
    own: jax.Array
    width: int

    @classmethod
    def of(cls, width: int) -> _Threads:
        """All threads, for weights of this K."""
        thread = jnp.arange(RESIDUES * LANES, dtype=jnp.int32)
        return cls((thread >> 2) & 7, thread // LANES * mma.BLOCK + (thread & 3) * mma.VALUES, width)

    def load(self, ref: Any, *index: jax.Array | int, place: jax.Array, real: jax.Array | None = None) -> jax.Array:
        """Eight values of each thread from `place` on along the last axis; `index` are the other axes, `real` which there are."""
        shape = (self.row.shape[0], mma.VALUES)
        present = [x for x in (real, place < self.width if self.width % CHUNK else None) if x is not None]
        mask = jnp.broadcast_to(functools.reduce(jnp.logical_and, present)[:, None], shape) if present else None
        columns = place[:, None] + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        others = (jnp.broadcast_to(jnp.full_like(place, x)[:, None] if isinstance(x, int) else x[:, None], shape) for x in index)
        return plt.load(ref.at[(*others, columns)], mask=mask, other=None if mask is None else 0.0)

    def weights(self, matrix: Matrix, place: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Both halves of a tile of 16 weight rows."""
        rows = (matrix.row + self.row, matrix.row + self.row + mma.TILE_ROWS // 2)
        real = (row < matrix.n if matrix.n % mma.TILE_ROWS else None for row in rows)
        first, second = (self.load(matrix.weight, row, place=place, real=there) for row, there in zip(rows, real, strict=True))
        return first, second


def many_rows(
    program: jax.Array, inputs: Sequence[Any], outputs: Sequence[Any],
    *, sizes: tuple[int, ...], unroll: int, groups: int, interpret: bool,
) -> None:  # fmt: skip
    """Body of a program of eight warps: 16 weight rows, and `groups` times eight rows of activations."""
    x_ref, *weight_refs = inputs
    *outs, scratch = outputs
    tokens, _, width = x_ref.shape
    parts = pl.cdiv(tokens, groups * mma.TILE_COLUMNS)
    number, start = program // parts, program % parts * groups * mma.TILE_COLUMNS
    owned, threads = matrices(number, weight_refs, outs, sizes, mma.TILE_ROWS), _Threads.of(width)

    def one_pass(first: jax.Array, chunks: int, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        places = [first + c * CHUNK + threads.own for c in range(chunks)]
        loaded = loads.load_selected(owned, lambda matrix: [threads.weights(matrix, place) for place in places])
        out = list(sums)
        for place, tile in zip(places, loaded, strict=True):
            for group in range(groups):
                token = jnp.minimum(start + group * mma.TILE_COLUMNS + threads.row, tokens - 1)
                high, low = (threads.load(x_ref, token, half, place=place) for half in (0, 1))
                out[group] = mma.multiply_tile(tile[0], tile[1], high, low, out[group], interpret=interpret)
        return tuple(out)

    sums = tuple(jnp.zeros((RESIDUES * LANES, mma.VALUES), jnp.float32) for _ in range(groups))
    sums = in_passes(pl.cdiv(width, CHUNK), unroll, CHUNK, one_pass, sums)
    for group, (values, token, row) in enumerate(_sums_of_residues(program, scratch, sums, interpret)):
        _store(owned, values, start + group * mma.TILE_COLUMNS + token, row, tokens)


def _sums_of_residues(
    program: jax.Array, scratch: Any, sums: Sequence[jax.Array], interpret: bool
) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """Of each tile its 128 products, added over the warps, and their columns and rows. The warps exchange sums through memory."""
    size = LANES * 4
    thread, each = (jax.lax.broadcasted_iota(jnp.int32, (RESIDUES * LANES, 4), axis) for axis in (0, 1))
    for group, both in enumerate(sums):
        place = group * size + (thread % LANES) * 4 + each
        plt.store(scratch.at[jnp.full_like(place, program), thread // LANES, place], _sum_of_halves(both))
    if not interpret:
        plt.debug_barrier()
    number = jnp.arange(size, dtype=jnp.int32)
    row, column = number % mma.TILE_ROWS, number // mma.TILE_ROWS
    # Where `multiply_tile` leaves a row and a column.
    held = ((row & 7) * 4 + (column >> 1)) * 4 + 2 * (row >> 3) + (column & 1)
    made = []
    for group in range(len(sums)):
        places = [(jnp.full_like(held, program), jnp.full_like(held, i), group * size + held) for i in range(RESIDUES)]
        s = [plt.load(scratch.at[place]) for place in places]
        # The order in which `sum_lanes` adds up the lanes of `_own_blocks`.
        total = ((s[0] + s[1]) + (s[4] + s[5])) + ((s[2] + s[3]) + (s[6] + s[7]))
        made.append((total, column, row))
    return made


def _store(owned: Sequence[Matrix], values: jax.Array, token: jax.Array, row: jax.Array, tokens: int) -> None:
    for matrix in owned:
        real = (token < tokens) & (matrix.row + row < matrix.n)
        if matrix.selected is not None:
            real &= matrix.selected
        # The index of a masked place is past the end; interpret mode drops it.
        plt.store(matrix.out.at[jnp.where(real, token, matrix.out.shape[0]), matrix.row + row], values, mask=real)


def few_cut(rows: int, heights: int, chunks: int) -> tuple[int, int, int]:
    """How the work of few rows is cut, as measured on an H200. It changes only the time of a launch.

    Args:
        rows: rows of activations.
        heights: rows of all weights together.
        chunks: pieces of `CHUNK` values in a weight row.

    Returns:
        Weight rows of a program, chunks that it loads at a time, and the maximum rows of activations of a batch.
    """
    if heights < FEW_HEIGHTS:
        return 2, min(chunks, 16), 1
    owned = 4 if heights >= 8 * FEW_HEIGHTS else 1 if heights * rows <= 4 * FEW_HEIGHTS else 2
    unroll = {1: 16, 2: 8, 4: 2 if rows <= 2 else 4}[owned]
    return owned, min(chunks, unroll), 1 if owned == 1 else min(rows, 2)


def many_cut(rows: int, tiles: int, chunks: int) -> tuple[int, int]:
    """The same of many rows: chunks that a program loads at a time, and how often eight rows of activations it has."""
    if tiles < 2 * MANY_TILES:
        return min(chunks, 16), 1
    return min(chunks, 4 if rows <= mma.TILE_COLUMNS else 8), 2 if rows > 2 * mma.TILE_COLUMNS else 1


def for_many_rows(rows: int, weights: Sequence[jax.Array]) -> bool:
    """Whether the kernel of many rows is the faster one."""
    tiles = sum(pl.cdiv(weight.shape[0], mma.TILE_ROWS) for weight in weights)
    return rows >= MANY_ROWS and tiles * pl.cdiv(rows, mma.TILE_COLUMNS) >= MANY_TILES


def few_part(x: jax.Array, weights: Sequence[jax.Array], *, interpret: bool = False) -> Part:
    """Products of halves float16 [M, 2, K] and [N, K] each as a launch part. Its programs have one warp."""
    m, _, k = x.shape
    sizes = tuple(weight.shape[0] for weight in weights)
    rows, unroll, together = few_cut(m, sum(sizes), pl.cdiv(k, CHUNK))
    return Part(
        name=part_name(m, k, weights),
        programs=batches.count(m, together) * sum(pl.cdiv(n, rows) for n in sizes),
        body=functools.partial(few_rows, sizes=sizes, rows=rows, unroll=unroll, together=together, interpret=interpret),
        inputs=(x.reshape(m, 2, -1, mma.VALUES), *(weight.reshape(weight.shape[0], -1, mma.VALUES) for weight in weights)),
        outputs=tuple(jax.ShapeDtypeStruct((m, n), jnp.float32) for n in sizes),
        traffic=traffic(weights),
    )


def many_part(x: jax.Array, weights: Sequence[jax.Array], *, interpret: bool = False) -> Part:
    """The same with programs of eight warps. Its last result is memory by which the warps exchange sums."""
    m, _, k = x.shape
    sizes = tuple(weight.shape[0] for weight in weights)
    tiles = sum(pl.cdiv(n, mma.TILE_ROWS) for n in sizes)
    unroll, groups = many_cut(m, tiles, pl.cdiv(k, CHUNK))
    programs = pl.cdiv(m, groups * mma.TILE_COLUMNS) * tiles
    scratch = jax.ShapeDtypeStruct((programs, RESIDUES, groups * LANES * 4), jnp.float32)
    return Part(
        name=part_name(m, k, weights),
        programs=programs,
        body=functools.partial(many_rows, sizes=sizes, unroll=unroll, groups=groups, interpret=interpret),
        inputs=(x, *weights),
        outputs=(*(jax.ShapeDtypeStruct((m, n), jnp.float32) for n in sizes), scratch),
        traffic=traffic(weights),
    )

"""Products of float32 rows and float16 weights on tensor cores; a row of activations is two float16 numbers a value.

Blocks of 32 values along K whose numbers agree modulo 8 have a sum of their own, a chain of tensor core instructions. The eight
sums are added in one fixed tree. Two kernels have this order, so that a row has the same bits in both:

* Few rows: a program is one warp with two or four weight rows. Two weight rows times eight blocks are the rows of a tile, the
  eight blocks of one row of activations its columns. Only products of the same block are used.
* Many rows: a program is eight warps, one for each sum. Sixteen weight rows are the rows of a tile, eight rows of activations its
  columns.
"""

from __future__ import annotations

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
from pallas_kernels.linear.matrices import Matrix, matrices, part_name, store_sums, traffic

# Sums of a row, and warps of a program of many rows.
RESIDUES = 8
# Values along K of all residues, eight a lane: what a warp of few rows takes at a time.
CHUNK = RESIDUES * mma.BLOCK
# Rows of activations from which on the kernel of many rows is faster.
MANY_ROWS = 8
# Maximum 16-byte loads of a lane in flight, and maximum sums of a lane of few rows.
MAX_LOADS = 8
MAX_SUMS = 16
# With fewer programs of one warp a GPU waits for loads.
PROGRAMS = 1024


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
        out = list(sums)
        for place, real, weights in zip(places, inside, loaded, strict=True):
            for m in range(batch.size):
                span = pl.ds(place, LANES)
                x = [loads.load(x_ref, batch.row(m), half, span, slice(None), real=real, width=width) for half in (0, 1)]
                for pair in range(pairs):
                    # A program of one row multiplies it twice.
                    tile = weights[2 * pair], weights[min(2 * pair + 1, rows - 1)]
                    i = m * pairs + pair
                    out[i] = mma.multiply_tile(*tile, *x, out[i], interpret=interpret)
        return tuple(out)

    sums = tuple(jnp.zeros((LANES, width), jnp.float32) for _ in range(batch.size * pairs))
    passes, rest = divmod(pl.cdiv(columns, LANES), unroll)
    if passes > 1:
        sums = jax.lax.fori_loop(0, passes, lambda i, sums: one_pass(i * unroll * LANES, unroll, sums), sums)
    elif passes:
        sums = one_pass(loads.value(0), unroll, sums)
    if rest:
        sums = one_pass(loads.value(passes * unroll * LANES), rest, sums)
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


def many_rows(
    program: jax.Array, inputs: Sequence[Any], outputs: Sequence[Any],
    *, sizes: tuple[int, ...], unroll: int, groups: int, interpret: bool,
) -> None:  # fmt: skip
    """Body of a program of eight warps: 16 weight rows, and `groups` times eight rows of activations."""
    x_ref, *weight_refs = inputs
    *outs, scratch = outputs
    tokens, _, width = x_ref.shape
    columns = groups * mma.TILE_COLUMNS
    parts = pl.cdiv(tokens, columns)
    number, part = program // parts, program % parts
    owned = matrices(number, weight_refs, outs, sizes, mma.TILE_ROWS)
    thread = jnp.arange(RESIDUES * LANES, dtype=jnp.int32)
    residue, of_tile, quarter = thread // LANES, (thread >> 2) & 7, thread & 3
    own = residue * mma.BLOCK + quarter * mma.VALUES

    def values(row: jax.Array, column: jax.Array) -> tuple[jax.Array, jax.Array]:
        shape = (thread.shape[0], mma.VALUES)
        each = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        return jnp.broadcast_to(row[:, None], shape), jnp.broadcast_to(column[:, None], shape) + each

    def one_pass(start: jax.Array, chunks: int, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        places = [start + c * CHUNK + own for c in range(chunks)]

        def weights_of(matrix: Matrix) -> list[list[jax.Array]]:
            loaded = []
            for place in places:
                pair = []
                for half in (0, 8):
                    row = matrix.row + of_tile + half
                    real = _both(row < matrix.n if matrix.n % mma.TILE_ROWS else None, place < width if width % CHUNK else None)
                    mask = None if real is None else jnp.broadcast_to(real[:, None], (thread.shape[0], mma.VALUES))
                    other = None if real is None else 0.0
                    pair.append(plt.load(matrix.weight.at[values(row, place)], mask=mask, other=other))
                loaded.append(pair)
            return loaded

        loaded = loads.load_selected(owned, weights_of)
        out = list(sums)
        for place, (low_rows, high_rows) in zip(places, loaded, strict=True):
            for group in range(groups):
                token = jnp.minimum(part * columns + group * mma.TILE_COLUMNS + of_tile, tokens - 1)
                row, column = values(token, place)
                mask = jnp.broadcast_to((place < width)[:, None], row.shape) if width % CHUNK else None
                other = None if mask is None else 0.0
                high, low = (plt.load(x_ref.at[row, jnp.full_like(row, half), column], mask=mask, other=other) for half in (0, 1))
                out[group] = mma.multiply_tile(low_rows, high_rows, high, low, out[group], interpret=interpret)
        return tuple(out)

    sums = tuple(jnp.zeros((thread.shape[0], mma.VALUES), jnp.float32) for _ in range(groups))
    passes, rest = divmod(pl.cdiv(width, CHUNK), unroll)
    if passes > 1:
        sums = jax.lax.fori_loop(0, passes, lambda i, sums: one_pass(i * unroll * CHUNK, unroll, sums), sums)
    elif passes:
        sums = one_pass(loads.value(0), unroll, sums)
    if rest:
        sums = one_pass(loads.value(passes * unroll * CHUNK), rest, sums)
    _add_residues(program, owned, sums, scratch, part * columns, tokens, interpret)


def _both(*conditions: jax.Array | None) -> jax.Array | None:
    present = [condition for condition in conditions if condition is not None]
    return functools.reduce(jnp.logical_and, present) if present else None


def _add_residues(
    program: jax.Array, owned: Sequence[Matrix], sums: Sequence[jax.Array], scratch: Any, start: jax.Array, tokens: int, interpret: bool
) -> None:
    """Add the sums of the warps and store them. The warps exchange their sums through memory."""
    thread = jax.lax.broadcasted_iota(jnp.int32, (RESIDUES * LANES, 4), 0)
    each = jax.lax.broadcasted_iota(jnp.int32, (RESIDUES * LANES, 4), 1)
    size = LANES * 4
    for group, both in enumerate(sums):
        place = group * size + (thread % LANES) * 4 + each
        plt.store(scratch.at[jnp.full_like(place, 0) + program, thread // LANES, place], _sum_of_halves(both))
    if not interpret:
        plt.debug_barrier()
    out = jnp.arange(size, dtype=jnp.int32)
    row, column = out % mma.TILE_ROWS, out // mma.TILE_ROWS
    held = ((row & 7) * 4 + (column >> 1)) * 4 + 2 * (row >> 3) + (column & 1)
    for group in range(len(sums)):
        index = [(jnp.full_like(held, 0) + program, jnp.full_like(held, residue), group * size + held) for residue in range(RESIDUES)]
        s = [plt.load(scratch.at[place]) for place in index]
        total = ((s[0] + s[1]) + (s[4] + s[5])) + ((s[2] + s[3]) + (s[6] + s[7]))
        token = start + group * mma.TILE_COLUMNS + column
        for matrix in owned:
            real = (token < tokens) & (matrix.row + row < matrix.n)
            if matrix.selected is not None:
                real &= matrix.selected
            # The index of a masked place is past the end; interpret mode drops it.
            plt.store(matrix.out.at[jnp.where(real, token, matrix.out.shape[0]), matrix.row + row], total, mask=real)


def few_cut(rows: int, heights: int, chunks: int) -> tuple[int, int, int]:
    """How the work of few rows is cut, as `float_matmul.cut`. It changes only the time of a launch."""
    owned, together = 4, batches.rows_of(rows)
    while owned > 1 and (owned * together > MAX_SUMS or heights < owned * PROGRAMS):
        owned //= 2
    while together > 1 and heights * batches.count(rows, together) < owned * PROGRAMS:
        together = pl.cdiv(together, 2)
    in_flight = 2 * MAX_LOADS if together == 1 and owned < 4 else MAX_LOADS
    return owned, min(chunks, max(in_flight // owned, 1)), together


def many_cut(rows: int, tiles: int, chunks: int) -> tuple[int, int]:
    """How the work of many rows is cut: chunks that a program loads at a time, and its rows of activations in eights."""
    return min(chunks, 8), min(pl.cdiv(rows, mma.TILE_COLUMNS), 2 if tiles >= PROGRAMS // 4 else 1)


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

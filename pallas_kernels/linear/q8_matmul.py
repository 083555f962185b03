"""The share-warp Q8_0 matmul. Every weight block is read once for all rows of the activations.

A program is one warp and owns a few weight rows. Lane l owns their blocks l, l+32, l+64, ...: it loads a block's eight words in
two 16-byte loads, computes the exact integer dot product with each of the M rows, and adds it to that row's accumulator with one
fused multiply-add. The lanes are summed once, at the end, for all rows together. Neither order depends on M or on the tile. So
row m of any call has the same bits as the row alone, and each M can have its own tile. More than eight rows are multiplied in
batches, see `core.batches`.

Every array in the kernel has one block per lane, [32] or [32, 4]. For arrays of several weight rows Triton would distribute words
and scales over the lanes differently, and would rearrange them through shared memory.

Source of the idea: `matmul_q8_0_preq_batch_share_warp_kernel` of the TrevorS/ds4 engine.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.core import arithmetic, batches, loads
from pallas_kernels.core.arithmetic import LANES
from pallas_kernels.core.batches import Batch
from pallas_kernels.core.launch import Part, launch
from pallas_kernels.formats import BLOCK, BLOCK_BYTES, HALF, Q8_0
from pallas_kernels.linear.activation import Activation

NAME = "q8_share_warp"

Sums = tuple[jax.Array, ...]
Weights = list[list[tuple[jax.Array, ...]]]
Chunk = tuple[jax.Array, jax.Array | None]


@dataclasses.dataclass(frozen=True)
class Tile:
    """How the work is cut. It changes only the time of a launch.

    Attributes:
        rows: weight rows of a program.
        unroll: chunks of 32 blocks per weight row that are loaded before the first is multiplied.
        chained: whether a block is one chain of eight dp4a instead of four chains of two and their sum.
    """

    rows: int = 1
    unroll: int = 1
    chained: bool = False

    def __str__(self) -> str:
        return f"{self.rows}x{self.unroll}{'c' * self.chained}"


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """One weight of a launch.

    Attributes:
        words, scales, out: references.
        n: rows of a group.
        base: the group's first row.
        row: the program's first row within the group.
        selected: whether the program works on this matrix; None if the launch has one matrix.
    """

    words: Any
    scales: Any
    out: Any
    n: int
    base: jax.Array
    row: jax.Array
    selected: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Warp:
    """One program: multiplies `tile.rows` rows of one matrix by a batch of rows of one group of activations."""

    x: Any
    xs: Any
    batch: Batch
    group: jax.Array
    matrices: Sequence[_Matrix]
    tile: Tile
    interpret: bool

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self.batch.size

    def zeros(self) -> Sums:
        """Zero accumulators, one for each row of the batch and each row of the tile; the tile's rows are innermost."""
        return tuple(jnp.zeros(LANES, jnp.float32) for _ in range(self.rows * self.tile.rows))

    def chunks(self, first: jax.Array, count: int) -> list[Chunk]:
        """First columns of `count` chunks of blocks from number `first`, and which lanes have a block."""
        blocks, lane = self.xs.shape[-1], loads.numbers()
        columns = [(first + c) * LANES for c in range(count)]
        return [(column, column + lane < blocks if blocks % LANES else None) for column in columns]

    def load(self, chunks: Sequence[Chunk]) -> Weights:
        """Load the tile's rows of each chunk."""

        def rows_of(matrix: _Matrix) -> Weights:
            return [[self.load_row(matrix, r, chunk) for r in range(self.tile.rows)] for chunk in chunks]

        return loads.load_selected(self.matrices, rows_of)

    def load_row(self, matrix: _Matrix, r: int, chunk: Chunk) -> tuple[jax.Array, ...]:
        """Load both halves of the words of one row, and its scales."""
        row, span = matrix.base + matrix.row + r, pl.ds(chunk[0], LANES)
        real = loads.all_of(matrix.row + r < matrix.n if matrix.n % self.tile.rows else None, chunk[1])
        load = functools.partial(loads.load, real=real, once=self.batch.only)
        words = (load(matrix.words, half, row, span, slice(None), width=HALF) for half in range(2))
        return (*words, load(matrix.scales, row, span))

    def dot(self, words: Sequence[jax.Array], x: Sequence[jax.Array]) -> jax.Array:
        """Exact dot products of one block per lane, as float32."""
        if self.tile.chained and not self.interpret:
            return arithmetic.chained_dot(words, x).astype(jnp.float32)
        total = jnp.zeros_like(words[0])
        for half in range(2):
            total = arithmetic.dp4a(words[half], x[half], total, interpret=self.interpret)
        return jnp.sum(total, axis=-1).astype(jnp.float32)

    def add(self, chunks: Sequence[Chunk], weights: Weights, sums: Sums) -> Sums:
        """Add the products of these chunks to the accumulators, one chunk after the other."""
        out = list(sums)
        for (column, real), rows in zip(chunks, weights, strict=True):
            span = pl.ds(column, LANES)
            for m in range(self.rows):
                own = self.batch.row(m)
                x = [loads.load(self.x, own, self.group, half, span, slice(None), real=real, width=HALF) for half in range(2)]
                xs = loads.load(self.xs, own, self.group, span, real=real)
                for r, (*words, scale) in enumerate(rows):
                    both = arithmetic.multiply(scale.astype(jnp.float32), xs, interpret=self.interpret)
                    i = m * self.tile.rows + r
                    out[i] = arithmetic.fma(self.dot(words, x), both, out[i], interpret=self.interpret)
        return tuple(out)

    def one_pass(self, first: jax.Array, count: int, sums: Sums) -> Sums:
        """Load and multiply `count` chunks from number `first`."""
        chunks = self.chunks(first, count)
        weights = self.load(chunks)
        if not self.interpret:
            # Start all loads first. Without the barrier the compiler moves loads behind products to save registers.
            plt.debug_barrier()
        return self.add(chunks, weights, sums)

    def run(self) -> None:
        """Run the program."""
        unroll, sums = self.tile.unroll, self.zeros()
        passes, rest = divmod(pl.cdiv(self.xs.shape[-1], LANES), unroll)
        if passes > 1:
            sums = jax.lax.fori_loop(0, passes, lambda i, sums: self.one_pass(i * unroll, unroll, sums), sums)
        elif passes:
            sums = self.one_pass(loads.value(0), unroll, sums)
        if rest:
            sums = self.one_pass(loads.value(passes * unroll), rest, sums)
        self.store(sums)

    def store(self, sums: Sums) -> None:
        """Sum the accumulators over the lanes and store them, up to 32 at once."""
        lane, rows = loads.numbers(), self.tile.rows
        for first in range(0, len(sums), LANES):
            total, place, owner = arithmetic.sum_lanes(sums[first : first + LANES], lane, interpret=self.interpret)
            m, r = (first + place) // rows, (first + place) % rows
            for matrix in self.matrices:
                inside = matrix.row + r < matrix.n if matrix.n % rows else None
                real = loads.all_of(owner, matrix.selected, inside, self.batch.real(m))
                # The index of a lane without a value is past the end; interpret mode drops it.
                assert real is not None
                column = jnp.where(real, matrix.base + matrix.row + r, matrix.out.shape[1])
                plt.store(matrix.out.at[self.batch.place(m), column], total, mask=real)


def _body(
    program: jax.Array, inputs: Sequence[Any], outputs: Sequence[Any],
    *, sizes: tuple[int, ...], groups: int, tile: Tile, interpret: bool,
) -> None:  # fmt: skip
    count, first = len(sizes), 0
    x_ref, xs_ref, *weights = inputs
    program, batch = batches.split(program, x_ref.shape[0])
    group, matrices = loads.value(0), []
    for i, n in enumerate(sizes):
        tiles = pl.cdiv(n, tile.rows)
        selected = (program >= first) & (program < first + tiles) if count > 1 else None
        if groups > 1:
            group, program = program // tiles, program % tiles
        row = (program - first) * tile.rows
        matrices.append(_Matrix(weights[2 * i], weights[2 * i + 1], outputs[i], n, group * n, row, selected))
        first += tiles
    Warp(x_ref, xs_ref, batch, group, matrices, tile, interpret).run()


def q8_part(x: Activation, weights: Sequence[Q8_0], *, tile: Tile, groups: int = 1, interpret: bool = False) -> Part:
    """`q8_matmul` as a launch part. Its programs have one warp."""
    m, k = x.quants.shape[0], weights[0].shape[1]
    sizes = tuple(weight.shape[0] // groups for weight in weights)
    return Part(
        name="_".join(map(str, (NAME, *([groups] if groups > 1 else []), *sizes, k))) + f"_m{m}",
        programs=batches.count(m) * groups * sum(pl.cdiv(n, tile.rows) for n in sizes),
        body=functools.partial(_body, sizes=sizes, groups=groups, tile=tile, interpret=interpret),
        inputs=(x.quants, x.scales, *(array for weight in weights for array in (weight.quants, weight.scales))),
        outputs=tuple(jax.ShapeDtypeStruct((m, weight.shape[0]), jnp.float32) for weight in weights),
        traffic=sum(math.prod(weight.shape) for weight in weights) // BLOCK * BLOCK_BYTES,
    )


def q8_matmul(x: Activation, weights: Sequence[Q8_0], *, tile: Tile, groups: int = 1, interpret: bool = False) -> list[jax.Array]:
    """Multiply the same activations by one or several weights in one launch.

    Args:
        x: M rows of `groups` times K values, quantised by `linear.activation.quantize`.
        weights: [N, K] each; with several groups one weight [groups·N, K].
        tile: how the work is cut; the result does not depend on it.
        groups: static; group c of the activations is multiplied by rows c·N .. (c+1)·N − 1 of the weight.
        interpret: static; run in interpret mode, without a GPU.

    Returns:
        float32 [M, groups·N] for each weight.
    """
    return launch([q8_part(x, weights, tile=tile, groups=groups, interpret=interpret)], warps=1, interpret=interpret)[0]

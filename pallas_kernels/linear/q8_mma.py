"""The Q8_0 matmul of many rows on the int8 tensor cores, with the bits of the share-warp kernel.

`mma.m16n8k32` multiplies blocks of 16 weight rows by the same block of eight rows of activations and sums the integers exactly.
The float sums have the order of `q8_matmul`: one accumulator for the blocks of each residue modulo 32, added up with fused
multiply-adds in the order of K, and then a tree over the distances 16, 8, 4, 2, 1. So a row has the same bits in both kernels.

Four blocks that follow each other are a step. A warp owns 16 weight rows, and `split` warps share them: the lowest bits of a
step's number modulo 8 choose the warp. Each lane loads 16 bytes of a row at a time, one half of one of two blocks. An instruction
sums all lanes of a row, so the weights of the other block are replaced by zeros, and a block takes two instructions. The order of
the values within a block is free because the sum of integers is exact; weights and activations have the same.

Source of the fragments: PTX ISA, matrix fragments for mma.m16n8k32.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.core import arithmetic
from pallas_kernels.core.arithmetic import LANES
from pallas_kernels.core.launch import Part, launch
from pallas_kernels.formats import BLOCK, BLOCK_BYTES, Q8_0
from pallas_kernels.linear.activation import Activation
from pallas_kernels.linear.q8_matmul import Tile, q8_part

NAME = "q8_mma"
# Rows of weights and of activations of one instruction.
HEIGHT, COLUMNS = 16, 8
# Blocks of a step, and steps of the 32 residues.
STEP = 4
CLASSES = LANES // STEP
MAX_ROWS = 32
# A warp that has more steps is too long, and a device with fewer warps has too few loads in flight.
STEPS, WARPS = 8, 1024

Values = list[jax.Array]


@dataclasses.dataclass(frozen=True)
class MmaTile:
    """How the work is cut. It changes only the time of a launch.

    Attributes:
        warps: warps of a program; a multiple of `split`.
        split: warps that share 16 weight rows: 1, 2, 4 or 8.
        ahead: steps whose weights are loaded before the first is multiplied.
    """

    warps: int = 4
    split: int = 4
    ahead: int = 2

    def __str__(self) -> str:
        return f"{self.warps}/{self.split}x{self.ahead}"

    @classmethod
    def of(cls, n: int, k: int) -> MmaTile:
        """A tile for weights of n rows together with k values each."""
        split = 1
        while split < CLASSES and (k // (BLOCK * STEP) > STEPS * split or pl.cdiv(n, HEIGHT) * split < WARPS):
            split *= 2
        return cls(warps=max(4, split), split=split)


def why_not(rows: int, k: int) -> str | None:
    """The reason why the kernel does not compute a product of so many rows with K values each, or None."""
    if rows > MAX_ROWS:
        return f"more than {MAX_ROWS} rows"
    if k % (BLOCK * LANES):
        return f"K is not a multiple of {BLOCK * LANES}"
    return None


@dataclasses.dataclass(frozen=True)
class _Program:
    """One program; arrays have a row for each of its lanes.

    Attributes:
        x, xs, words, scales: references.
        m: rows of activations.
        n: weight rows of a group.
        group, row: the program's group and, per lane, the first of the warp's 16 weight rows within it.
        part: per lane, the number of the warp among those that share the rows.
    """

    x: Any
    xs: Any
    words: Any
    scales: Any
    m: int
    n: int
    group: jax.Array
    row: jax.Array
    part: jax.Array
    tile: MmaTile
    interpret: bool

    @property
    def lane(self) -> jax.Array:
        """Number of each lane in its warp, int32 [P]."""
        return _numbers(self.tile) & (LANES - 1)

    def wide(self, *columns: jax.Array | int) -> list[jax.Array]:
        """Numbers of each lane, or one number, as indices of four values, int32 [P, 4]; the last index counts the four."""
        shape = (self.tile.warps * LANES, 4)
        made = [
            jnp.broadcast_to(column[:, None] if isinstance(column, jax.Array) and column.ndim else column, shape)
            for column in columns
        ]
        return [*(array.astype(jnp.int32) for array in made), jax.lax.broadcasted_iota(jnp.int32, shape, 1)]

    def weight_rows(self) -> Values:
        """A lane's two weight rows of the matrix. Rows past the end are read as the last one and not stored."""
        return [self.group * self.n + jnp.minimum(self.row + (self.lane >> 2) + half * COLUMNS, self.n - 1) for half in range(2)]

    def first_block(self, number: int) -> jax.Array:
        """First block of the warp's step `number` (`turn`, then place along K), int32 [P]."""
        turns = self.xs.shape[-1] // LANES
        turn, place = divmod(number, turns)
        return place * LANES + STEP * (self.tile.split * _order(CLASSES // self.tile.split)[turn] + self.part)

    def weights(self, number: int) -> tuple[list[Values], Values]:
        """Load a step: words of two pairs of blocks for each of two rows, and four scales for each row."""
        first, rows = self.first_block(number), self.weight_rows()
        once: dict[str, Any] = {"eviction_policy": "evict_first"}
        own, half = (self.lane >> 1) & 1, self.lane & 1
        words = [
            [plt.load(self.words.at[tuple(self.wide(half, row, first + 2 * pair + own))], **once) for row in rows]
            for pair in range(2)
        ]
        scales = []
        for row in rows:
            index, column = self.wide(row)
            scales.append(plt.load(self.scales.at[index, first[:, None] + column], **once))
        return words, scales

    def activations(self, number: int, tile: int) -> tuple[Values, Values]:
        """Load a step of eight rows of activations: words of two pairs of blocks, and scales of a lane's two columns."""
        first, (own, half) = self.first_block(number), ((self.lane >> 1) & 1, self.lane & 1)
        row = jnp.minimum(tile * COLUMNS + (self.lane >> 2), self.m - 1)
        words = [plt.load(self.x.at[tuple(self.wide(row, self.group, half, first + 2 * pair + own))]) for pair in range(2)]
        scales = []
        for side in range(2):
            column = jnp.minimum(tile * COLUMNS + 2 * (self.lane & 3) + side, self.m - 1)
            index, group, four = self.wide(column, self.group)
            scales.append(plt.load(self.xs.at[index, group, first[:, None] + four]))
        return words, scales

    def add(self, loaded: tuple[list[Values], Values], number: int, accs: list[Values]) -> list[Values]:
        """Add the products of a step to the accumulators: four arrays [P, 4], one a block, for each eight rows."""
        words, halves = loaded
        own = jnp.broadcast_to((self.lane >> 1)[:, None] & 1, words[0][0].shape)
        # All ones in the lanes that have the first block, and the other way round.
        masks = own - 1, -own
        scales = [scale.astype(jnp.float32) for scale in halves]
        blocks = [[word & mask for word in pair] for pair in words for mask in masks]
        made = []
        for tile, sums in enumerate(accs):
            x, xs = self.activations(number, tile)
            made.append(
                [
                    multiply_add(
                        block,
                        x[b // 2],
                        scale_products(scales, xs, b, interpret=self.interpret),
                        sums[b],
                        interpret=self.interpret,
                    )
                    for b, block in enumerate(blocks)
                ]
            )
        return made

    def zeros(self) -> jax.Array:
        """Accumulators to begin with, float32 [P, 4]."""
        shape = (self.tile.warps * LANES, 4)
        if not self.interpret:
            return jnp.zeros(shape, jnp.float32)
        # A CPU compiler leaves a sum with a known 0 out, and may then fuse the product with the next sum.
        return (jax.lax.broadcasted_iota(jnp.int32, shape, 0) >> 31).astype(jnp.float32)

    def run(self, store: Callable[[int, jax.Array], None]) -> None:
        """Run the program; `store` gets the number of eight rows and the sums [warps/split, 32, 4] of a lane's places."""
        turns, tiles = self.xs.shape[-1] // LANES, pl.cdiv(self.m, COLUMNS)
        steps = CLASSES // self.tile.split * turns
        zero = [[self.zeros()] * STEP for _ in range(tiles)]
        accs, sums = zero, [[] for _ in range(tiles)]  # type: ignore[var-annotated]
        for first in range(0, steps, self.tile.ahead):
            numbers = range(first, min(first + self.tile.ahead, steps))
            loaded = [self.weights(number) for number in numbers]
            if not self.interpret:
                # As in the share-warp kernel: start all loads before the first product.
                plt.debug_barrier()
            for number, weights in zip(numbers, loaded, strict=True):
                accs = self.add(weights, number, zero if number % turns == 0 else accs)
                if number % turns == turns - 1:
                    for kept, made in zip(sums, accs, strict=True):
                        _keep(kept, made, number // turns)
        for number, [total] in enumerate(sums):
            store(number, self.summed(total))

    def summed(self, values: Values) -> jax.Array:
        """Sum four arrays [P, 4] over the warps that share rows, the largest distance first, and then over the four."""
        split, warps = self.tile.split, self.tile.warps
        if split == 1:
            first, second, third, fourth = values
            return ((first + third) + (second + fourth)).reshape(warps, LANES, 4)
        pairs = [jnp.stack(values[side::2], axis=-1) for side in range(2)]
        total = jnp.stack(pairs, axis=-1).reshape(warps // split, split, LANES * 16)
        while split > 1:
            split //= 2
            total = self.add_two(total.reshape(warps // self.tile.split, 2, split, LANES * 16), 1)
        total = total.reshape(warps // self.tile.split, LANES, 4, 2, 2)
        return self.add_two(self.add_two(total, 3), 3)

    def add_two(self, values: jax.Array, axis: int) -> jax.Array:
        """Sum over an axis of two. A compiler for CPUs would turn two reductions into one of another order."""
        if not self.interpret:
            return jnp.sum(values, axis=axis)
        return jax.lax.index_in_dim(values, 0, axis, False) + jax.lax.index_in_dim(values, 1, axis, False)


def _numbers(tile: MmaTile) -> jax.Array:
    """Number of each lane in its program, int32 [P]."""
    return jax.lax.broadcasted_iota(jnp.int32, (tile.warps * LANES,), 0)


def _order(count: int) -> list[int]:
    """The order in which partial sums are made, so that two of equal depth that follow each other are added: 0, 2, 1, 3."""
    return [0] if count == 1 else [place for half in _order(count // 2) for place in (half, half + count // 2)]


def _keep(kept: list[Values], made: Values, turn: int) -> None:
    """Take in the sums of one turn, and add sums of equal depth."""
    kept.append(made)
    while turn & 1:
        later, earlier = kept.pop(), kept.pop()
        kept.append([a + b for a, b in zip(earlier, later, strict=True)])
        turn >>= 1


def scale_products(scales: Values, xs: Values, block: int, *, interpret: bool) -> jax.Array:
    """Products of the scales of a block for a lane's four places: two weight rows times two rows of activations.

    Args:
        scales, xs: float32 [P, 4], one value a block of the step; two arrays each.
    """
    if interpret:
        rows, columns = ([array[:, block] for array in arrays] for arrays in (scales, xs))
        return jnp.stack([row * column for row in rows for column in columns], axis=-1)
    code = " ".join(f"mul.rn.f32 t{i}, ${4 + 4 * (i // 2) + block}, ${12 + 4 * (i % 2) + block};" for i in range(4))
    return _four(code, "f" * 16, [*scales, *xs])


def multiply_add(weights: Values, x: jax.Array, scales: jax.Array, acc: jax.Array, *, interpret: bool) -> jax.Array:
    """acc plus the exact dot products of one block times their scales, rounded once on the GPU, float32 [P, 4].

    A lane's places are weight rows l/4 and l/4 + 8 of its warp's 16, each with rows 2·(l mod 4) and 2·(l mod 4) + 1 of the
    activations.

    Args:
        weights: int32 [P, 4], words of weight row l/4 and of row l/4 + 8; the sum is over the four lanes of a row.
        x: int32 [P, 4], words of row l/4 of the activations.
        scales: float32 [P, 4], of the places.
    """
    if interpret:
        return arithmetic.fma(_dots(weights, x), scales, acc, interpret=True)
    operands = ("$4, $8, $5, $9", "$12, $13"), ("$6, $10, $7, $11", "$14, $15")
    # 0x4b400000 is 1.5 · 2²³ as float32: plus a small integer it is that float plus the integer.
    code = "mov.b32 c0, 0x4b400000; mov.b32 c1, c0; mov.b32 c2, c0; mov.b32 c3, c0; "
    for a, b in operands:
        code += f"mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {{c0, c1, c2, c3}}, {{{a}}}, {{{b}}}, {{c0, c1, c2, c3}}; "
    for i in range(4):
        code += f"mov.b32 t{i}, c{i}; sub.rn.f32 t{i}, t{i}, 0f4B400000; fma.rn.f32 t{i}, t{i}, ${16 + i}, ${20 + i}; "
    return _four(code, "r" * 12 + "f" * 8, [*weights, x, scales, acc])


def _four(code: str, kinds: str, args: Sequence[jax.Array]) -> jax.Array:
    """Assembly on four values of each lane that leaves its results in t0 to t3, float32 [P, 4]."""
    code = "{ .reg .s32 c<4>; .reg .f32 t<4>; " + code + " ".join(f"mov.f32 ${i}, t{i};" for i in range(4)) + " }"
    shape = jax.ShapeDtypeStruct(args[0].shape, jnp.float32)
    constraints = ",".join(["=f"] * 4 + list(kinds))
    [made] = plt.elementwise_inline_asm(code, args=list(args), constraints=constraints, pack=4, result_shape_dtypes=[shape])
    return made


def _dots(weights: Values, x: jax.Array) -> jax.Array:
    """The integers of the two instructions in jnp, float32 [P, 4]. They are below 2²⁴, so the products are exact."""

    def fragment(words: jax.Array) -> jax.Array:
        values = jnp.stack([(words << shift) >> 24 for shift in (24, 16, 8, 0)], axis=-1)
        return values.astype(jnp.float32).reshape(-1, COLUMNS, 4 * 16)

    rows = jnp.stack([fragment(words) for words in weights], axis=1)
    dots = jnp.einsum("wrgk,wnk->wgrn", rows, fragment(x), precision="highest", preferred_element_type=jnp.float32)
    return jnp.moveaxis(dots.reshape(-1, COLUMNS, 2, 4, 2), 2, 3).reshape(x.shape)


def _body(
    program: jax.Array, inputs: Sequence[Any], outputs: Sequence[Any], *, groups: int, tile: MmaTile, interpret: bool
) -> None:
    x, xs, words, scales = inputs
    [out] = outputs
    n, m, per = out.shape[1] // groups, out.shape[0], tile.warps // tile.split
    programs = pl.cdiv(n, HEIGHT * per)
    group, program = program // programs, program % programs
    warp = _numbers(tile) // LANES
    row = (program * per + warp // tile.split) * HEIGHT
    work = _Program(x, xs, words, scales, m, n, group, row, warp % tile.split, tile, interpret)

    def store(number: int, total: jax.Array) -> None:
        shared, lane, place = (jax.lax.broadcasted_iota(jnp.int32, total.shape, axis) for axis in range(3))
        row = (program * per + shared) * HEIGHT + lane // 4 + COLUMNS * (place // 2)
        column = number * COLUMNS + 2 * (lane % 4) + place % 2
        real = (row < n) & (column < m)
        # The index of a place without a value is past the end; interpret mode drops it.
        plt.store(out.at[column, jnp.where(real, group * n + row, out.shape[1])], total, mask=real)

    work.run(store)


def q8_mma_part(x: Activation, weight: Q8_0, *, tile: MmaTile | None = None, groups: int = 1, interpret: bool = False) -> Part:
    """`q8_mma` of one weight as a launch part."""
    (m, _, blocks), n = x.scales.shape, weight.shape[0] // groups
    tile = tile or MmaTile.of(n * groups, blocks * BLOCK)
    return Part(
        name="_".join(map(str, (NAME, *([groups] if groups > 1 else []), n, blocks * BLOCK))) + f"_m{m}",
        programs=groups * pl.cdiv(n, HEIGHT * (tile.warps // tile.split)),
        body=functools.partial(_body, groups=groups, tile=tile, interpret=interpret),
        inputs=(x.quants, x.scales, weight.quants, weight.scales),
        outputs=(jax.ShapeDtypeStruct((m, weight.shape[0]), jnp.float32),),
        traffic=math.prod(weight.shape) // BLOCK * BLOCK_BYTES,
        warps=tile.warps,
    )


def q8_parts(
    x: Activation, weights: Sequence[Q8_0], *, tile: Tile | MmaTile, groups: int = 1, interpret: bool = False
) -> list[Part]:
    """Products as launch parts of the kernel that the tile belongs to; their outputs together are one for each weight."""
    if isinstance(tile, Tile):
        return [q8_part(x, weights, tile=tile, groups=groups, interpret=interpret)]
    return [q8_mma_part(x, weight, tile=tile, groups=groups, interpret=interpret) for weight in weights]


def q8_product(
    x: Activation, weights: Sequence[Q8_0], *, tile: Tile | MmaTile, groups: int = 1, interpret: bool = False
) -> list[jax.Array]:
    """Run `q8_parts` in a launch of their own; arguments and results as for `q8_matmul`, or `q8_mma`."""
    made = launch(q8_parts(x, weights, tile=tile, groups=groups, interpret=interpret), warps=1, interpret=interpret)
    return [y for outputs in made for y in outputs]


def q8_mma(
    x: Activation, weights: Sequence[Q8_0], *, tile: MmaTile | None = None, groups: int = 1, interpret: bool = False
) -> list[jax.Array]:
    """Multiply the same activations by one or several weights in one launch, on the tensor cores.

    Args:
        x: M rows, 1 to 32, of `groups` times K values, quantised by `linear.activation.quantize`; K is a multiple of 1024.
        weights: [N, K] each; with several groups [groups·N, K].
        tile: static, how the work is cut; by default `MmaTile.of` all rows. The result does not depend on it.
        groups: static; group c of the activations is multiplied by rows c·N .. (c+1)·N − 1 of the weight.
        interpret: static; run in interpret mode, without a GPU.

    Returns:
        float32 [M, groups·N] for each weight, with the bits of `q8_matmul`.
    """
    tile = tile or MmaTile.of(sum(weight.shape[0] for weight in weights), weights[0].shape[1])
    return q8_product(x, weights, tile=tile, groups=groups, interpret=interpret)

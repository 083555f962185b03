"""The Q8_0 matmul of many rows on the int8 tensor cores, with the bits of the share-warp kernel.

`mma.m16n8k32` multiplies a block of 16 weight rows by the same block of eight rows of activations and sums the integers exactly.
The float sums have the order of `q8_matmul`: one accumulator for the blocks of each residue modulo 32, added up with fused
multiply-adds in the order of K, and then a tree over the distances 16, 8, 4, 2, 1. So a row has the same bits in both kernels.

A program takes 16 weight rows at a time. A step is 32 blocks of each, one for each residue: all warps load them together, 512
bytes of a row at a time, and store them in shared memory, where the lanes of a warp find the words that the instruction wants of
them. Each warp multiplies the blocks of its own residues, which are pairs of neighbours. The sums of its pairs come first in the
tree, those over warps follow. Weights of later steps, also of the next 16 rows, are on their way while one is multiplied.
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

from pallas_kernels.core import batches, loads
from pallas_kernels.core.arithmetic import LANES
from pallas_kernels.core.launch import Part, launch
from pallas_kernels.formats import BLOCK, BLOCK_BYTES, HALF, Q8_0
from pallas_kernels.linear import tensor_core
from pallas_kernels.linear.activation import Activation
from pallas_kernels.linear.q8_matmul import Tile, q8_part
from pallas_kernels.linear.tensor_core import COLUMNS, HEIGHT, PAIR, ROW_BYTES, UNIT_BYTES, Exchange, Values

NAME = "q8_mma"
# Maximum rows of activations of a program; more go in batches.
MAX_ROWS = 32
# Warps that a program may have.
WARPS = (4, 8, 16)
# A device with fewer programs has too few loads in flight.
PROGRAMS = 256

# Words of 16 rows, and scales of two blocks of each of a lane's two rows, for each pair of a warp.
Loaded = tuple[Values, Values]
# Steps that are on their way, the buffer of the next one, and the other buffer.
State = tuple[list[Loaded], jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class MmaTile:
    """How the work is cut. It changes only the time of a launch.

    Attributes:
        warps: warps of a program, one of `WARPS`.
        heights: how many times 16 weight rows a program takes, one after the other.
        ahead: steps whose weights are on their way while another is multiplied.
    """

    warps: int = 8
    heights: int = 1
    ahead: int = 1

    def __str__(self) -> str:
        return f"{self.warps}/{self.heights}x{self.ahead}"

    @classmethod
    def of(cls, n: int) -> MmaTile:
        """A tile for weights of n rows together."""
        return cls(heights=max(1, n // (HEIGHT * PROGRAMS)))


def why_not(k: int) -> str | None:
    """The reason why the kernel does not compute a product with K values a row, or None."""
    return f"K is not a multiple of {BLOCK * LANES}" if k % (BLOCK * LANES) else None


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """One weight of a launch.

    Attributes:
        words, scales, out: references; those of words and scales are flat.
        n: rows of a group.
        row: the program's first row within the group.
        selected: whether the program works on this matrix; None if the launch has one matrix.
    """

    words: Any
    scales: Any
    out: Any
    n: int
    row: jax.Array
    selected: jax.Array | None


@dataclasses.dataclass(frozen=True)
class _Program:
    """One program; arrays have a row for each of its lanes.

    Attributes:
        x, xs: references of flat arrays.
        total, groups, blocks: rows of activations of the call, groups, and blocks of a row.
        first: first row of activations of the program.
        size: rows of activations of the program, a multiple of eight.
        group: the program's group.
        warp, lane: per lane, the number of its warp, and its own in the warp.
        only: whether no other program loads the same weights.
    """

    x: Any
    xs: Any
    matrices: Sequence[_Matrix]
    total: int
    groups: int
    blocks: int
    first: jax.Array
    size: int
    group: jax.Array
    warp: jax.Array
    lane: jax.Array
    only: bool
    tile: MmaTile
    interpret: bool

    @property
    def length(self) -> int:
        """Steps of 16 weight rows."""
        return self.blocks // LANES

    @property
    def pairs(self) -> int:
        """Pairs of residues of a warp; they are as far apart as sums of the tree."""
        return LANES // PAIR // self.tile.warps

    def block(self, pair: int) -> jax.Array:
        """First block of a warp's pair in a step, int32 [P]."""
        return PAIR * (self.warp + self.tile.warps * pair)

    def load(self, number: jax.Array | int) -> Loaded:
        """Load a step; nothing if its number is past the last."""
        height, place = _divide(number, self.length)
        inside = number < self.tile.heights * self.length
        if not isinstance(inside, bool):
            inside = jnp.broadcast_to(inside, (self.lane.shape[0], 4))
        mask = None if inside is True else inside

        def load_from(matrix: _Matrix) -> Loaded:
            def row(other: jax.Array) -> jax.Array:
                own = matrix.row + HEIGHT * height + other
                if matrix.n % (HEIGHT * self.tile.heights):
                    own = jnp.minimum(own, matrix.n - 1)
                return self.group * matrix.n + own

            words, policy = [], "evict_first" if self.only else None
            for i in range(HEIGHT // self.tile.warps):
                for half in range(2):
                    at = half * (self.groups * matrix.n) + row(self.warp + i * self.tile.warps)
                    at = at * self.blocks + LANES * place + self.lane
                    words.append(plt.load(matrix.words.at[_four_from(at * HALF)], mask=mask, eviction_policy=policy))
            rows = [row(self.lane // 4 + COLUMNS * i) * self.blocks + LANES * place for i in range(2)]
            scales = [
                plt.load(matrix.scales.at[_two_from_each(*(own + self.block(pair) for own in rows))], mask=mask)
                for pair in range(self.pairs)
            ]
            return words, scales

        made: Loaded = loads.load_selected(self.matrices, load_from)
        return made

    def activations(self, place: jax.Array | int, start: int, pair: int) -> tuple[jax.Array, jax.Array]:
        """Words and scales of eight rows from row `start` of the program, for a pair of blocks."""
        block, fourth = self.block(pair) + LANES * place, self.lane & 3

        def row(other: jax.Array) -> jax.Array:
            own = self.first + start + other
            return (jnp.minimum(own, self.total - 1) if self.total % self.size else own) * self.groups + self.group

        at = (row(self.lane // 4) * 2 + (fourth & 1)) * self.blocks + block + fourth // 2
        both = (row(2 * fourth + i) * self.blocks + block for i in range(2))
        return plt.load(self.x.at[_four_from(at * HALF)]), plt.load(self.xs.at[_two_from_each(*both)])

    def weights(self, words: Values, address: jax.Array) -> tuple[list[Values], jax.Array]:
        """The instruction's words of each block of each pair, through the buffer at the address; and the address."""
        lane, warps = self.lane, self.tile.warps
        if self.interpret:
            table = jnp.stack(words).reshape(-1, 2, warps, LANES, HALF).swapaxes(1, 2).reshape(HEIGHT, 2, LANES, HALF)
            number = _fours(lane)
            row, word = _wide(lane // 4) + COLUMNS * (number & 1), _wide(lane & 2) + number // 2

            def block(pair: int, b: int) -> jax.Array:
                return table[row, _wide(lane & 1), _wide(self.block(pair) + b), word]

            return [[block(pair, b) for b in range(PAIR)] for pair in range(self.pairs)], address
        target = self.warp * ROW_BYTES + 16 * lane
        source = (lane & 15) * ROW_BYTES + lane // 16 * UNIT_BYTES + 16 * self.block(0)
        stored = tensor_core.store_blocks(address + _wide(target), words, warps * ROW_BYTES)
        own = stored + _wide(source - target)
        made = [
            [tensor_core.load_block(own, 16 * (PAIR * warps * pair + b)) for b in range(PAIR)] for pair in range(self.pairs)
        ]
        return made, stored - _wide(target)

    def step(self, number: jax.Array | int, place: jax.Array | int, state: State, accs: list[list[Values]]) -> Any:
        """Multiply a step and load another: accumulators [P, 4] for each eight rows, pair and block."""
        (under_way, address, other), upper = state, _wide(self.lane & 2)
        # All loads start before the first product.
        rows = [[self.activations(place, COLUMNS * i, pair) for pair in range(self.pairs)] for i in range(len(accs))]
        words, scales = under_way[0]
        weights, address = self.weights(words, address)
        under_way = [*under_way[1:], self.load(number + self.tile.ahead)]
        wide, made = [scale.astype(jnp.float32) for scale in scales], []
        for row, sums in zip(rows, accs, strict=True):
            of_row = []
            for (x, xs), blocks, scale, own in zip(row, weights, wide, sums, strict=True):
                x = tensor_core.spread(x, upper, interpret=self.interpret)
                add = functools.partial(tensor_core.multiply_add, x=x, scales=scale, xs=xs, interpret=self.interpret)
                of_row.append([add(blocks[b], acc=own[b], block=b) for b in range(PAIR)])
            made.append(of_row)
        if not self.interpret:
            other = tensor_core.after(other, [acc for own in made[0] for acc in own])
        return (under_way, other, address), made

    def zeros(self) -> list[list[Values]]:
        """Accumulators to begin with."""
        shape = (self.tile.warps * LANES, 4)
        zero = jnp.zeros(shape, jnp.float32)
        if self.interpret:
            # A CPU compiler leaves a sum with a known 0 out, and may then fuse the product with the next sum.
            zero = (jax.lax.broadcasted_iota(jnp.int32, shape, 0) >> 31).astype(jnp.float32)
        return [[[zero] * PAIR for _ in range(self.pairs)] for _ in range(0, self.size, COLUMNS)]

    def height(self, height: jax.Array | int, state: State) -> State:
        """Multiply 16 weight rows and store the results."""

        def one(place: jax.Array | int, carry: Any) -> Any:
            return self.step(height * self.length + place, place, *carry)

        carry = state, self.zeros()
        carry = jax.lax.fori_loop(0, self.length, one, carry) if self.length > 1 else one(0, carry)
        (under_way, address, other), accs = carry
        exchange = Exchange(self.tile.warps, len(accs))
        sums = [[_tree([own[b] for own in row]) for b in range(PAIR)] for row in accs]
        rounds, address = exchange.run(address, sums, interpret=self.interpret)
        for i, made in enumerate(rounds):
            self.store(height, exchange, i * exchange.count, made)
        return under_way, address, other

    def store(self, height: jax.Array | int, exchange: Exchange, start: int, made: jax.Array) -> None:
        """Store a round of sums, of eight rows number `start` and following."""
        array, source, first = exchange.owned(self.warp, self.lane)
        place = _wide(first) + _fours(first)
        column = _wide(self.first + (start + array) * COLUMNS + 2 * (source & 3)) + (place & 1)
        row = _wide(HEIGHT * height + source // 4) + COLUMNS * (place >> 1)
        there = _wide(array < min(exchange.count, exchange.total - start)) & (_fours(first) < exchange.width)
        for matrix in self.matrices:
            real = there & (column < self.total) & (matrix.row + row < matrix.n)
            if matrix.selected is not None:
                real = real & matrix.selected
            # The index of a place without a value is past the end; interpret mode drops it.
            own = jnp.where(real, self.group * matrix.n + matrix.row + row, matrix.out.shape[1])
            plt.store(matrix.out.at[column, own], made, mask=real)

    def run(self) -> None:
        """Run the program."""
        under_way = [self.load(number) for number in range(self.tile.ahead)]
        address = other = jnp.zeros((self.tile.warps * LANES, 4), jnp.int32)
        if not self.interpret:
            address = tensor_core.buffers(self.zeros()[0][0][0])
            other = address + tensor_core.BUFFER_BYTES
        state: State = under_way, address, other
        if self.tile.heights > 1:
            jax.lax.fori_loop(0, self.tile.heights, self.height, state)
        else:
            self.height(0, state)


def _tree(values: Values) -> jax.Array:
    """The sum of a power of two of values, the largest distance first."""
    while len(values) > 1:
        half = len(values) // 2
        values = [a + b for a, b in zip(values[:half], values[half:], strict=True)]
    return values[0]


def _divide(number: jax.Array | int, by: int) -> Any:
    """Quotient and remainder of a number that is not negative."""
    if isinstance(number, int):
        return divmod(number, by)
    quotient = jax.lax.div(number, jax.lax.full_like(number, by))
    return quotient, number - quotient * by


def _wide(value: jax.Array) -> jax.Array:
    """One value a lane, [P] → [P, 4]."""
    return jnp.broadcast_to(value[:, None], (value.shape[0], 4))


def _fours(value: jax.Array) -> jax.Array:
    """The numbers 0 to 3, int32 [P, 4]."""
    return jnp.broadcast_to(jax.lax.broadcasted_iota(jnp.int32, (1, 4), 1), (value.shape[0], 4))


def _four_from(place: jax.Array) -> jax.Array:
    """The places of four values from one place a lane: int32 [P] → [P, 4]."""
    return _wide(place) + _fours(place)


def _two_from_each(first: jax.Array, second: jax.Array) -> jax.Array:
    """The places of two values from each of two places a lane. Triton must see that they are pairs, to load both at once."""
    number, two = _fours(first), jnp.full((first.shape[0], 4), 2, jnp.int32)
    return _wide(first) + _wide(second - first) * jax.lax.div(number, two) + jax.lax.rem(number, two)


def _body(
    program: jax.Array, inputs: Sequence[Any], outputs: Sequence[Any],
    *, sizes: tuple[int, ...], groups: int, blocks: int, tile: MmaTile, interpret: bool,
) -> None:  # fmt: skip
    x, xs, *weights = inputs
    total = outputs[0].shape[0]
    batch, size = batches.count(total, MAX_ROWS), _rows_of(total)
    program, first_row = program // batch, program % batch * size
    group, matrices, first = loads.value(0), [], 0
    for i, n in enumerate(sizes):
        programs = pl.cdiv(n, HEIGHT * tile.heights)
        selected = (program >= first) & (program < first + programs) if len(sizes) > 1 else None
        if groups > 1:
            group, program = program // programs, program % programs
        row = (program - first) * (HEIGHT * tile.heights)
        matrices.append(_Matrix(weights[2 * i], weights[2 * i + 1], outputs[i], n, row, selected))
        first += programs
    number = jax.lax.broadcasted_iota(jnp.int32, (tile.warps * LANES,), 0)
    warp, lane = number >> 5, number & (LANES - 1)
    _Program(x, xs, matrices, total, groups, blocks, first_row, size, group, warp, lane, batch == 1, tile, interpret).run()


def _rows_of(total: int) -> int:
    """Rows of a batch, a multiple of eight, so that no two programs compute the same row."""
    return pl.cdiv(batches.rows_of(total, MAX_ROWS), COLUMNS) * COLUMNS


def q8_mma_part(x: Activation, weights: Sequence[Q8_0], *, tile: MmaTile, groups: int = 1, interpret: bool = False) -> Part:
    """A product on the tensor cores as a launch part; arguments as for `q8_product`."""
    (m, _, blocks), sizes = x.scales.shape, tuple(weight.shape[0] // groups for weight in weights)
    flat = (x.quants, x.scales, *(array for weight in weights for array in (weight.quants, weight.scales)))
    programs = groups * sum(pl.cdiv(n, HEIGHT * tile.heights) for n in sizes)
    return Part(
        name="_".join(map(str, (NAME, *([groups] if groups > 1 else []), *sizes, blocks * BLOCK))) + f"_m{m}",
        programs=batches.count(m, MAX_ROWS) * programs,
        body=functools.partial(_body, sizes=sizes, groups=groups, blocks=blocks, tile=tile, interpret=interpret),
        inputs=tuple(array.reshape(-1) for array in flat),
        outputs=tuple(jax.ShapeDtypeStruct((m, weight.shape[0]), jnp.float32) for weight in weights),
        traffic=sum(math.prod(weight.shape) for weight in weights) // BLOCK * BLOCK_BYTES,
        warps=tile.warps,
    )


def q8_any_part(
    x: Activation, weights: Sequence[Q8_0], *, tile: Tile | MmaTile, groups: int = 1, interpret: bool = False
) -> Part:
    """A product as a launch part of the kernel that the tile belongs to."""
    if isinstance(tile, Tile):
        return q8_part(x, weights, tile=tile, groups=groups, interpret=interpret)
    return q8_mma_part(x, weights, tile=tile, groups=groups, interpret=interpret)


def q8_product(
    x: Activation, weights: Sequence[Q8_0], *, tile: Tile | MmaTile, groups: int = 1, interpret: bool = False
) -> list[jax.Array]:
    """Multiply the same activations by one or several weights in one launch, by the kernel that the tile belongs to.

    Args:
        x: M rows of `groups` times K values, quantised by `linear.activation.quantize`; K is a multiple of 1024 for an `MmaTile`.
        weights: [N, K] each; with several groups one weight [groups·N, K].
        tile: static, how the work is cut. The result does not depend on it, nor on the kernel.
        groups: static; group c of the activations is multiplied by rows c·N .. (c+1)·N − 1 of the weight.
        interpret: static; run in interpret mode, without a GPU.

    Returns:
        float32 [M, groups·N] for each weight.
    """
    part = q8_any_part(x, weights, tile=tile, groups=groups, interpret=interpret)
    return launch([part], warps=1, interpret=interpret)[0]

"""The Q8_0 matmul of many rows on the int8 tensor cores, with the bits of the share-warp kernel.

`mma.m16n8k32` multiplies blocks of 16 weight rows by the same block of eight rows of activations and sums the integers exactly.
The float sums have the order of `q8_matmul`: one accumulator for the blocks of each residue modulo 32, added up with fused
multiply-adds in the order of K, and then a tree over the distances 16, 8, 4, 2, 1. So a row has the same bits in both kernels.

Four blocks that follow each other are a step. A warp owns 16 weight rows, and `split` warps share them: the lowest bits of a
step's number modulo 8 choose the warp. Each lane loads 16 bytes of a row at a time, one half of one of two blocks. An instruction
sums all lanes of a row, so the weights of the other block are replaced by zeros, and a block takes two instructions. The order of
the values within a block is free because the sum of integers is exact; weights and activations have the same.
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

from pallas_kernels.core import batches
from pallas_kernels.core.arithmetic import LANES
from pallas_kernels.core.launch import Part, launch
from pallas_kernels.formats import BLOCK, BLOCK_BYTES, HALF, Q8_0
from pallas_kernels.linear.activation import Activation
from pallas_kernels.linear.q8_matmul import Tile, q8_part
from pallas_kernels.linear.tensor_core import (
    COLUMNS,
    HEIGHT,
    STEP,
    Values,
    eights_a_round,
    multiply_add,
    scale_products,
    sum_warps,
)

NAME = "q8_mma"
# Steps of the 32 residues.
CLASSES = LANES // STEP
# Maximum rows of activations of a program; more go in batches.
MAX_ROWS = 32
# A warp that has more steps is too long, and a device with fewer warps has too few loads in flight.
STEPS, WARPS = 8, 1024

# Words of two pairs of blocks for each of two rows, and four scales for each row.
Loaded = tuple[list[Values], Values]


@dataclasses.dataclass(frozen=True)
class MmaTile:
    """How the work is cut. It changes only the time of a launch.

    Attributes:
        warps: warps of a program; a multiple of `split`.
        split: warps that share 16 weight rows: 1, 2, 4 or 8.
        ahead: steps whose weights are on their way while another is multiplied.
    """

    warps: int = 4
    split: int = 4
    ahead: int = 2

    def __str__(self) -> str:
        return f"{self.warps}/{self.split}x{self.ahead}"

    @classmethod
    def of(cls, n: int, k: int, m: int) -> MmaTile:
        """A tile for weights of n rows together with k values each, and m rows of activations."""
        # With more steps of a warp than turns of four, registers for sums that wait for others run out.
        split = 2
        while split < CLASSES and (k // (BLOCK * STEP) > STEPS * split or pl.cdiv(n, HEIGHT) * split < WARPS):
            split *= 2
        # The sums of 32 rows leave registers for one step.
        return cls(warps=max(4, split), split=split, ahead=1 if m > 2 * COLUMNS else 2)


def why_not(k: int) -> str | None:
    """The reason why the kernel does not compute a product with K values a row, or None."""
    return f"K is not a multiple of {BLOCK * LANES}" if k % (BLOCK * LANES) else None


@dataclasses.dataclass(frozen=True)
class _Program:
    """One program; arrays have a row for each of its lanes.

    Attributes:
        x, xs, words, scales: references of flat arrays.
        shape: M, groups, weight rows of a group, and blocks of a row.
        columns: the first row of each eight rows of activations of the batch.
        group: the program's group.
        row: per lane, the first of the warp's 16 weight rows within the group.
        part: per lane, the number of the warp among those that share the rows.
    """

    x: Any
    xs: Any
    words: Any
    scales: Any
    shape: tuple[int, int, int, int]
    columns: Sequence[jax.Array]
    group: jax.Array
    row: jax.Array
    part: jax.Array
    tile: MmaTile
    interpret: bool

    def places(self) -> _Places:
        """Places of the values that each lane loads. Rows past the end are read as the last one and not stored."""
        (m, groups, n, blocks), lane = self.shape, _numbers(self.tile) & (LANES - 1)
        own, half, eighth, fourth = (lane >> 1) & 1, lane & 1, lane >> 2, lane & 3
        first = STEP * self.part
        rows = [self.group * n + jnp.minimum(self.row + eighth + COLUMNS * i, n - 1) for i in range(2)]
        words = [_four_from(((half * (groups * n) + row) * blocks + first + own) * HALF) for row in rows]
        x, xs = [], []
        for start in self.columns:
            row = jnp.minimum(start + eighth, m - 1) * groups + self.group
            x.append(_four_from(((row * 2 + half) * blocks + first + own) * HALF))
            both = [jnp.minimum(start + 2 * fourth + side, m - 1) for side in range(2)]
            xs.append([_four_from((column * groups + self.group) * blocks + first) for column in both])
        # All ones in the lanes that have the first block of a pair, and the other way round.
        masks = [jnp.broadcast_to(mask[:, None], (own.shape[0], 4)) for mask in (own - 1, -own)]
        return _Places(words, [_four_from(row * blocks + first) for row in rows], x, xs, masks)

    def first_block(self, number: jax.Array | int) -> jax.Array | int:
        """First block of step `number` of the first of the warps: turns, then places along K."""
        turns, count = self.shape[3] // LANES, CLASSES // self.tile.split
        turn: Any
        place: Any
        if isinstance(number, int):
            turn, place = divmod(number, turns)
        else:
            turn = jax.lax.div(number, jax.lax.full_like(number, turns))
            place = number - turn * turns
        # The bits of the turn in reverse order: two turns that follow each other are as far apart as sums of the tree.
        far = [((turn >> bit) & 1) * (count >> (bit + 1)) for bit in range(count.bit_length() - 1)]
        return place * LANES + STEP * self.tile.split * sum(far)

    def weights(self, places: _Places, number: jax.Array | int) -> Loaded:
        """Load a step: words of two pairs of blocks for each of two rows, and four scales for each row."""
        # With several batches another program loads the same weights.
        policy = "evict_first" if self.shape[0] <= MAX_ROWS else None
        first, once = self.first_block(number), functools.partial(plt.load, eviction_policy=policy)
        words = [[once(self.words.at[place + (first + 2 * pair) * HALF]) for place in places.words] for pair in range(2)]
        return words, [once(self.scales.at[place + first]) for place in places.scales]

    def add(self, places: _Places, loaded: Loaded, number: jax.Array | int, accs: list[Values]) -> list[Values]:
        """Add the products of a step to the accumulators: four arrays [P, 4], one a block, for each eight rows."""
        words, halves = loaded
        first, scales = self.first_block(number), [scale.astype(jnp.float32) for scale in halves]
        blocks = [[word & mask for word in pair] for pair in words for mask in places.masks]
        made = []
        for sums, x_place, xs_places in zip(accs, places.x, places.xs, strict=True):
            x = [plt.load(self.x.at[x_place + (first + 2 * pair) * HALF]) for pair in range(2)]
            xs = [plt.load(self.xs.at[place + first]) for place in xs_places]
            both = [scale_products(scales, xs, b, interpret=self.interpret) for b in range(STEP)]
            made.append(
                [multiply_add(block, x[b // 2], both[b], sums[b], interpret=self.interpret) for b, block in enumerate(blocks)]
            )
        return made

    def zeros(self) -> jax.Array:
        """Accumulators to begin with, float32 [P, 4]."""
        shape = (self.tile.warps * LANES, 4)
        if not self.interpret:
            return jnp.zeros(shape, jnp.float32)
        # A CPU compiler leaves a sum with a known 0 out, and may then fuse the product with the next sum.
        return (jax.lax.broadcasted_iota(jnp.int32, shape, 0) >> 31).astype(jnp.float32)

    def run(self) -> list[Values]:
        """Run the program: for each eight rows the sums of a step's four blocks, float32 [P, 4] each."""
        turns, tiles = self.shape[3] // LANES, len(self.columns)
        steps, places = CLASSES // self.tile.split * turns, self.places()
        ahead = min(self.tile.ahead, steps)
        under_way = [self.weights(places, number) for number in range(ahead)]
        sums: list[list[Values]] = [[] for _ in range(tiles)]

        def step(number: jax.Array | int, carry: tuple[list[Loaded], list[Values]], *, load: bool) -> Any:
            under_way, accs = carry
            if load:
                under_way = [*under_way, self.weights(places, number + ahead)]
            if not self.interpret:
                # As in the share-warp kernel: start all loads before the next product.
                plt.debug_barrier()
            return under_way[1:], self.add(places, under_way[0], number, accs)

        for first in range(0, steps, turns):
            carry = under_way, [[self.zeros()] * STEP for _ in range(tiles)]
            # The last steps have nothing left to load.
            looped = max(first, min(first + turns, steps - ahead))
            if looped - first > 1:
                carry = jax.lax.fori_loop(first, looped, lambda number, carry: step(number, carry, load=True), carry)
            elif looped > first:
                carry = step(first, carry, load=True)
            for number in range(looped, first + turns):
                carry = step(number, carry, load=False)
            under_way, accs = carry
            for kept, made in zip(sums, accs, strict=True):
                _keep(kept, made, first // turns)
        return [values for [values] in sums]


@dataclasses.dataclass(frozen=True)
class _Places:
    """Places of a lane's loads in flat arrays for the first step, int32 [P, 4], and its masks of words.

    Attributes:
        words, scales: for each of two weight rows.
        x: for each eight rows of activations.
        xs: for each eight rows, two.
        masks: for each block of a pair.
    """

    words: Values
    scales: Values
    x: Values
    xs: list[Values]
    masks: Values


def _four_from(place: jax.Array) -> jax.Array:
    """The places of four values from one place a lane: int32 [P] → [P, 4]."""
    shape = (place.shape[0], 4)
    return jnp.broadcast_to(place[:, None], shape) + jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def _numbers(tile: MmaTile) -> jax.Array:
    """Number of each lane in its program, int32 [P]."""
    return jax.lax.broadcasted_iota(jnp.int32, (tile.warps * LANES,), 0)


def _keep(kept: list[Values], made: Values, turn: int) -> None:
    """Take in the sums of one turn, and add sums of equal depth."""
    kept.append(made)
    while turn & 1:
        later, earlier = kept.pop(), kept.pop()
        kept.append([a + b for a, b in zip(earlier, later, strict=True)])
        turn >>= 1


def _body(
    program: jax.Array, inputs: Sequence[Any], outputs: Sequence[Any],
    *, groups: int, blocks: int, tile: MmaTile, interpret: bool,
) -> None:  # fmt: skip
    x, xs, words, scales = inputs
    [out] = outputs
    n, m, per = out.shape[1] // groups, out.shape[0], tile.warps // tile.split
    programs, count = pl.cdiv(n, HEIGHT * per), batches.count(m, MAX_ROWS)
    # A multiple of eight rows a batch, so that no two programs compute the same row.
    size = pl.cdiv(batches.rows_of(m, MAX_ROWS), COLUMNS) * COLUMNS
    program, first = program // count, program % count * size
    group, program = program // programs, program % programs
    number, lane = _numbers(tile) // LANES, _numbers(tile) & (LANES - 1)
    row, part = (program * per + number // tile.split) * HEIGHT, number & (tile.split - 1)
    columns = [first + start for start in range(0, size, COLUMNS)]
    sums = _Program(x, xs, words, scales, (m, groups, n, blocks), columns, group, row, part, tile, interpret).run()
    wide = functools.partial(jnp.broadcast_to, shape=(tile.warps * LANES, 4))
    place = wide(jax.lax.broadcasted_iota(jnp.int32, (1, 4), 1))
    row = wide((row + lane // 4)[:, None]) + COLUMNS * (place >> 1)
    if tile.split > 1:
        totals, eights = sum_warps(sums, tile.split, interpret=interpret), eights_a_round(tile.warps, tile.split)
    else:
        totals, eights = [_add_blocks(values) for values in sums], 1
    for start, total in zip(range(0, len(sums), eights), totals, strict=True):
        column = wide((first + (start + part) * COLUMNS + 2 * (lane & 3))[:, None]) + (place & 1)
        real = (row < n) & (column < m) & wide((part < min(eights, len(sums) - start))[:, None])
        # The index of a place without a value is past the end; interpret mode drops it.
        plt.store(out.at[column, jnp.where(real, group * n + row, out.shape[1])], total, mask=real)


def _add_blocks(values: Values) -> jax.Array:
    """The last two distances of the tree."""
    first, second, third, fourth = values
    return (first + third) + (second + fourth)


def q8_mma_part(x: Activation, weight: Q8_0, *, tile: MmaTile, groups: int = 1, interpret: bool = False) -> Part:
    """A product of one weight on the tensor cores as a launch part; arguments as for `q8_product`."""
    (m, _, blocks), n = x.scales.shape, weight.shape[0] // groups
    return Part(
        name="_".join(map(str, (NAME, *([groups] if groups > 1 else []), n, blocks * BLOCK))) + f"_m{m}",
        programs=batches.count(m, MAX_ROWS) * groups * pl.cdiv(n, HEIGHT * (tile.warps // tile.split)),
        body=functools.partial(_body, groups=groups, blocks=blocks, tile=tile, interpret=interpret),
        inputs=tuple(array.reshape(-1) for array in (x.quants, x.scales, weight.quants, weight.scales)),
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
    """Multiply the same activations by one or several weights in one launch, by the kernel that the tile belongs to.

    Args:
        x: M rows of `groups` times K values, quantised by `linear.activation.quantize`; K is a multiple of 1024 for an `MmaTile`.
        weights: [N, K] each; with several groups [groups·N, K].
        tile: static, how the work is cut. The result does not depend on it, nor on the kernel.
        groups: static; group c of the activations is multiplied by rows c·N .. (c+1)·N − 1 of the weight.
        interpret: static; run in interpret mode, without a GPU.

    Returns:
        float32 [M, groups·N] for each weight.
    """
    made = launch(q8_parts(x, weights, tile=tile, groups=groups, interpret=interpret), warps=1, interpret=interpret)
    return [y for outputs in made for y in outputs]

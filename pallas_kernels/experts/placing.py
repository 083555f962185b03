"""Rows of many tokens brought into the order of the experts in three launches: counts, places, and the rows themselves.

As operations of their own the tiles of `grouping.spans` are a sort, sums and lookups of about fourteen launches, and the rows are
read through a transposition.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.experts.fragments import BLOCK
from pallas_kernels.experts.grouping import ALIGNMENT, Spans, aligned, max_tiles, places

COUNTS, PLACES, ROWS = "expert_counts", "expert_places", "expert_rows"
WARPS = 4
# Maximum pairs that a program looks at together.
SPAN = 4096


def spans(chosen: jax.Array, share: jax.Array, experts: int, rows: int, *, interpret: bool = False) -> tuple[Spans, jax.Array]:
    """`grouping.spans` of int32 [T, K], and the share of each place, float32 [places], of float32 [T, K]."""
    pairs = chosen.size
    how = {"pairs": pairs, "span": min(pl.next_power_of_2(pairs), SPAN)}
    call = functools.partial(
        pl.pallas_call, grid=(experts,), compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1), interpret=interpret
    )
    counts = call(
        functools.partial(_counts, **how), out_shape=jax.ShapeDtypeStruct((experts,), jnp.int32), name=COUNTS
    )(chosen.reshape(-1))  # fmt: skip
    size = places(pairs, experts, rows)
    shapes = [
        jax.ShapeDtypeStruct((size,), jnp.int32),
        jax.ShapeDtypeStruct((size,), share.dtype),
        jax.ShapeDtypeStruct((3, max_tiles(pairs, experts, rows)), jnp.int32),
    ]
    pair, shares, table = call(functools.partial(_places, rows=rows, **how), out_shape=shapes, name=PLACES)(
        counts, chosen.reshape(-1), share.reshape(-1)
    )
    return Spans(pair, table), shares


def _counts(chosen: Any, counts: Any, *, pairs: int, span: int) -> None:
    """A program counts the pairs of its expert."""
    expert = pl.program_id(0)
    lane = jnp.arange(span, dtype=jnp.int32)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        pair = i * span + lane
        found = plt.load(chosen.at[pair], mask=pair < pairs, other=-1)
        return total + jnp.where(found == expert, jnp.int32(1), jnp.int32(0))

    counts[expert] = jnp.sum(jax.lax.fori_loop(0, pl.cdiv(pairs, span), add, jnp.zeros((span,), jnp.int32)))


def _places(
    counts: Any, chosen: Any, share: Any, pair: Any, shares: Any, table: Any, *, pairs: int, span: int, rows: int
) -> None:
    """A program writes the places and the tiles of its expert, and a part of what belongs to none."""
    me, experts, size = pl.program_id(0), counts.shape[0], pair.shape[0]
    number = jnp.arange(pl.next_power_of_2(experts), dtype=jnp.int32)
    count = plt.load(counts.at[number], mask=number < experts, other=0)
    before = number < me
    first, mine = _sum(aligned(count), before), _sum(count, number == me)
    _tiles(table, count, first, me, experts, rows)

    def fill(place: jax.Array, real: jax.Array, index: jax.Array) -> None:
        # Interpret mode drops what is past the end.
        at = jnp.where(real, place, size)
        plt.store(pair.at[at], index, mask=real)
        plt.store(shares.at[at], plt.load(share.at[index], mask=real, other=0.0), mask=real)

    lane = jnp.arange(span, dtype=jnp.int32)

    def place(i: jax.Array, placed: jax.Array) -> jax.Array:
        index = i * span + lane
        here = plt.load(chosen.at[index], mask=index < pairs, other=-1) == me
        one = jnp.where(here, jnp.int32(1), jnp.int32(0))
        fill(placed + jax.lax.cumsum(one) - 1, here, index)
        return placed + jnp.sum(one)

    jax.lax.fori_loop(0, pl.cdiv(pairs, span), place, first)

    # Places of no pair have the first one.
    after = first + mine + jnp.arange(ALIGNMENT, dtype=jnp.int32)
    fill(after, after < first + aligned(mine), jnp.zeros_like(after))
    part = pl.next_power_of_2(pl.cdiv(size, experts))
    rest = me * part + jnp.arange(part, dtype=jnp.int32)
    fill(rest, (rest >= _sum(aligned(count))) & (rest < size), jnp.zeros_like(rest))


def _tiles(table: Any, count: jax.Array, first: jax.Array, me: jax.Array, experts: int, rows: int) -> None:
    """Write the tiles of expert `me`, whose first place is `first`. All tiles of an expert but the last are equal."""
    number = jnp.arange(count.shape[0], dtype=jnp.int32)
    tiles = jax.lax.div(count + rows - 1, jnp.full_like(count, rows))
    some = jnp.maximum(tiles, 1)
    each = aligned(jax.lax.div(count + some - 1, some))
    last = count - (some - 1) * each
    before = number < me
    my_tiles, my_each, my_last = (_sum(values, number == me) for values in (tiles, each, last))

    def place(size: jax.Array) -> jax.Array:
        """The number of tiles that are fuller than `size` pairs, or as full and of an earlier expert."""
        fuller = jnp.where(each > size, some - 1, 0) + jnp.where(last > size, 1, 0)
        equal = jnp.where(each == size, some - 1, 0) + jnp.where(last == size, 1, 0)
        return _sum(fuller + jnp.where(before, equal, 0), tiles > 0)

    most = table.shape[1]
    tile = jnp.arange(pl.next_power_of_2(most), dtype=jnp.int32)
    ends = tile == my_tiles - 1
    at_end = place(my_last) + jnp.where(my_last == my_each, my_tiles - 1, 0)

    def store(place: jax.Array, real: jax.Array, *values: jax.Array) -> None:
        for i, value in enumerate(values):
            plt.store(table.at[jnp.full_like(place, i), jnp.where(real, place, most)], value, mask=real)

    expert = jnp.full_like(tile, 0) + me
    store(
        jnp.where(ends, at_end, place(my_each) + tile),
        tile < my_tiles,
        expert,
        first + tile * my_each,
        jnp.where(ends, my_last, my_each),
    )
    nothing = jnp.zeros_like(tile)
    unused = (tile >= _sum(tiles)) & (tile < most) & (jax.lax.rem(tile, jnp.full_like(tile, experts)) == me)
    store(tile, unused, jnp.full_like(tile, experts - 1), nothing, nothing)


def _sum(values: jax.Array, there: jax.Array | None = None) -> jax.Array:
    return jnp.sum(values if there is None else jnp.where(there, values, 0))


def rows_of_pairs(x: jax.Array, pair: jax.Array, active: int, order: np.ndarray, *, interpret: bool = False) -> jax.Array:
    """The row of each place's pair, with columns in the order of a decoder: bfloat16 [places, D].

    Args:
        x: bfloat16 [T, D].
        pair: int32 [places]; pair t·K + k is row t.
        active: static, K.
        order: int [256], which exchanges the bits of a column's number in its block but the lowest.
    """
    # Pairs of columns move as words.
    words = jax.lax.bitcast_convert_type(x.reshape(x.shape[0], -1, 2), jnp.int32)
    width = words.shape[1]
    # The largest power of two that divides the width.
    part = width & -width
    made = pl.pallas_call(
        functools.partial(_rows, active=active, moves=_moves(order)),
        out_shape=jax.ShapeDtypeStruct((pair.shape[0], width), jnp.int32),
        grid=(pair.shape[0], width // part),
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name=ROWS,
    )(pair, words)
    return jax.lax.bitcast_convert_type(made, jnp.bfloat16).reshape(pair.shape[0], -1)


def _moves(order: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Where the bits of a word's number come from: masks of those that move equally far, and how far to the left."""
    masks: dict[int, int] = {}
    for bit in range(1, BLOCK.bit_length() - 1):
        far = int(order[1 << bit]).bit_length() - 1 - bit
        masks[far] = masks.get(far, 0) | 1 << (bit - 1)
    return tuple((mask, far) for far, mask in masks.items())


def _rows(pair: Any, x: Any, out: Any, *, active: int, moves: tuple[tuple[int, int], ...]) -> None:
    """A program moves a part of a row."""
    place, part, size = pl.program_id(0), pl.program_id(1), x.shape[1] & -x.shape[1]
    row = jax.lax.div(pair[place], jnp.int32(active))
    word = part * size + jnp.arange(size, dtype=jnp.int32)
    source = word & -(BLOCK // 2)
    for mask, far in moves:
        some = word & mask
        source |= some << far if far >= 0 else some >> -far
    plt.store(out.at[place, word], plt.load(x.at[row, source]))

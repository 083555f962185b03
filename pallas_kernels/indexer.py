"""The lightning indexer of a decode step: scores of compressed keys and the best of them, in three launches.

A query of few visible keys attends to them all: then each launch ends at once. Otherwise `index_queries` rotates and rounds the
heads, `index_scores` multiplies them with tiles of keys on the tensor cores, and `index_select` finds the k-th best score by
bisection over the scores' bits and stores the indices that reach it. More scores than a program's registers hold are first
cut down to k in each chunk, by the same bisection in a launch of its own.

The row is a grid axis everywhere: no body sees the number of rows, and row m of any call has the bits of the same row alone.

Source: `Indexer` of the reference inference code of DeepSeek-V4; DeepSeek-V3.2's lightning indexer on compressed keys.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import narrow
from pallas_kernels.finishing import angles, reference_fp4, reference_rotate, rotate, round_fp4
from pallas_kernels.narrow import NarrowKeys, Stored
from pallas_kernels.rounding import FP4_BLOCK

NAMES = ("index_queries", "index_scores", "index_chunks", "index_select")
HEADS_A_PROGRAM = 4
KEYS_A_TILE = 64
# A row's programs; each takes every 264th tile where there are more. Two for each multiprocessor of an H100 or H200.
MOST_PROGRAMS = 264
LEAST_PROGRAMS = 4
ROWS_APART = 8
LEAST_HEADS = 16
# A float32 is three bfloat16 numbers; what FP4 rounding leaves is one.
PARTS = 3
# Scores that one program chooses from: the fewer, the more programs share them and the shorter each takes.
LEAST_CHUNK, MOST_CHUNK = 2048, 16384
SCORES_A_WARP = 256
LEAST, MOST = -(1 << 31), (1 << 31) - 1
HIGH_HALF = -(1 << 16)


def _value(i: int) -> jax.Array:
    """A Python integer as a traced value."""
    return jax.lax.full((), i, jnp.int32)


def _parts(x: jax.Array, count: int) -> list[jax.Array]:
    """x as the sum of `count` bfloat16 arrays, each the leading eight digits of what the ones before leave over."""
    found = []
    for _ in range(count):
        # The digits are cut off as integers: a compiler may take a conversion there and back for nothing.
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(HIGH_HALF)
        high = jax.lax.bitcast_convert_type(bits, jnp.float32)
        found.append(high.astype(jnp.bfloat16))
        x = x - high
    return found


def _queries(q: Any, cos: Any, sin: Any, visible: Any, out: Any, *, topk: int, qat: bool) -> None:
    m, heads = pl.program_id(0), math.gcd(q.shape[1], HEADS_A_PROGRAM)
    mine = pl.ds(pl.program_id(1) * heads, heads)

    @pl.when(visible[m] > topk)
    def _() -> None:
        x = rotate(q[m, mine, :], *angles(cos, sin, m, q.shape[2] // 2))
        for i, part in enumerate(_parts(round_fp4(x) if qat else x, out.shape[1])):
            out[m, _value(i), mine, :] = part


def _products(keys: jax.Array, queries: list[jax.Array]) -> jax.Array:
    """Dot products [tile, heads] of float32 keys [tile, Di] with queries in parts [heads, Di]; small times small is left out."""
    parts, total = _parts(keys, len(queries)), jnp.zeros((keys.shape[0], queries[0].shape[0]), jnp.float32)
    # The smallest first.
    for order in reversed(range(len(queries))):
        for i in range(order + 1):
            dims = (((1,), (1,)), ((), ()))
            total += jax.lax.dot_general(parts[i], queries[order - i], dims, preferred_element_type=jnp.float32)
    return total


def _narrow_products(keys: NarrowKeys, first: jax.Array, count: jax.Array, queries: Sequence[jax.Array]) -> jax.Array:
    """Dot products [tile, heads] of FP4 keys from `first` on, zeros from `count` on, with queries [heads, chunk] of each chunk.

    A block's products are summed before its scale multiplies them. As long as a sum has no more digits than a float32, which
    takes blocks of one key that are thousands of times as large as others, the result is that of float32 keys.
    """
    chunk, half = queries[0].shape[1], len(queries) // 2
    row = first + jax.lax.broadcasted_iota(jnp.int32, (KEYS_A_TILE,), 0)
    there = first + jax.lax.broadcasted_iota(jnp.int32, (KEYS_A_TILE, chunk), 0) < count
    total = jnp.zeros((KEYS_A_TILE, queries[0].shape[0]), jnp.float32)
    for i in range(half):
        span = pl.ds(first, KEYS_A_TILE), pl.ds(i * chunk, chunk)
        codes = plt.load(keys.codes.at[span], mask=there, other=0).astype(jnp.int32)
        # The low halves are one half of the channels, the high halves the other.
        for part, place in ((codes, i), (codes >> 4, half + i)):
            block = jnp.full_like(row, place * chunk // FP4_BLOCK)
            scale = narrow.scales(plt.load(keys.exponents.at[row, block], mask=row < count, other=0))
            dims = (((1,), (1,)), ((), ()))
            dot = jax.lax.dot_general(narrow.fp4_values(part), queries[place], dims, preferred_element_type=jnp.float32)
            total += dot * jnp.broadcast_to(scale[:, None], dot.shape)
    return total


def _scores(q: Any, weights: Any, *refs: Any, topk: int, programs: int) -> None:
    *leaves, visible, out = refs
    keys = leaves[0] if len(leaves) == 1 else NarrowKeys(*leaves)
    m, first = pl.program_id(0), pl.program_id(1)
    parts, heads, dim = q.shape[1:]
    chunk = min(FP4_BLOCK, dim // 2) if isinstance(keys, NarrowKeys) else dim
    count = jnp.minimum(visible[m], keys.shape[0])
    tiles = jnp.where(count > topk, (count + (KEYS_A_TILE - 1)) // KEYS_A_TILE, 0)

    @pl.when(first < tiles)
    def _() -> None:
        head = jax.lax.broadcasted_iota(jnp.int32, (max(heads, LEAST_HEADS),), 0)
        real = head < heads
        real_queries = jnp.broadcast_to(real[:, None], (head.shape[0], chunk))
        # Heads that there are none of lie past the end, which a slice from a constant may not reach.
        span = pl.ds(_value(0), head.shape[0])
        chunks = [(i, pl.ds(channel, chunk)) for i in range(parts) for channel in range(0, dim, chunk)]
        queries = [plt.load(q.at[m, _value(i), span, channels], mask=real_queries, other=0.0) for i, channels in chunks]
        scale = jnp.float32(dim**-0.5 * heads**-0.5)
        weight = plt.load(weights.at[m, span], mask=real, other=0.0) * scale

        def tile(i: jax.Array, carry: jax.Array) -> jax.Array:
            span = pl.ds((first + i * programs) * KEYS_A_TILE, KEYS_A_TILE)
            there = (first + i * programs) * KEYS_A_TILE + jax.lax.broadcasted_iota(jnp.int32, (KEYS_A_TILE, dim), 0) < count
            if isinstance(keys, NarrowKeys):
                products = _narrow_products(keys, (first + i * programs) * KEYS_A_TILE, count, queries)
            else:
                products = _products(plt.load(keys.at[span, :], mask=there, other=0.0), queries)
            weight_of = jnp.broadcast_to(weight[None, :], products.shape)
            out[m, span] = jnp.sum(jnp.maximum(products, 0.0) * weight_of, axis=1)
            return carry

        jax.lax.fori_loop(0, (tiles - first + (programs - 1)) // programs, tile, jnp.int32(0))


def _ordered(score: jax.Array) -> jax.Array:
    """float32 to int32 in the same order; both zeros are one."""
    bits = jax.lax.bitcast_convert_type(score, jnp.int32)
    return jnp.where(score == 0.0, 0, jnp.where(bits < 0, bits ^ MOST, bits))


def _count(condition: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(condition, jnp.int32(1), jnp.int32(0)))


def _threshold(keys: jax.Array, real: jax.Array, topk: int) -> jax.Array:
    """A number that at least `topk` of the real keys reach and of which fewer exceed it; there are as many.

    Bisection, which ends where exactly `topk` reach it: about as many steps as the number of keys has digits.
    """
    keys = jnp.where(real, keys, LEAST)

    def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low | high) - ((low ^ high) >> 1)
        count = _count(keys >= middle)
        enough = count >= topk
        high = jnp.where(count == topk, middle, jnp.where(enough, high, middle - 1))
        return jnp.where(enough, middle, low), high

    bounds = jnp.min(jnp.where(real, keys, MOST)), jnp.max(keys)
    return jax.lax.while_loop(lambda bounds: bounds[0] < bounds[1], halve, bounds)[0]


def _choose(keys: jax.Array, real: jax.Array, topk: int, store: Callable[[jax.Array, jax.Array], None]) -> None:
    """Store which of the real keys are the best `topk`, in their order: `store` gets each one's place and whether it has any."""
    threshold = _threshold(keys, real, topk)
    above, equal = real & (keys > threshold), real & (keys == threshold)
    # Two running sums in one: those above in the low half of the word, the equal ones in the high half.
    one = jnp.where(above, jnp.int32(1), jnp.where(equal, jnp.int32(1 << 16), jnp.int32(0)))
    running = jax.lax.cumsum(one)
    above_until, equal_until = running & 0xFFFF, running >> 16
    wanted = topk - _count(above)
    chosen = above | (equal & (equal_until <= wanted))
    # What is not chosen points past the end, where interpret mode drops it.
    store(jnp.where(chosen, above_until + jnp.minimum(equal_until, wanted) - 1, topk), chosen)


def _first(visible: jax.Array, topk: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The indices of few visible keys, -1 behind them: places, values and which places there are."""
    place = jax.lax.broadcasted_iota(jnp.int32, (pl.next_power_of_2(topk),), 0)
    return place, jnp.where(place < visible, place, -1), place < topk


def _chunk(keys: int, topk: int) -> int:
    """Scores of a chunk, so many that there are about as many candidates from all chunks."""
    return min(max(pl.next_power_of_2(math.isqrt(keys * topk)), LEAST_CHUNK), MOST_CHUNK)


def _chunks(scores: Any, visible: Any, out: Any, *, topk: int, keys: int, size: int) -> None:
    """Of each chunk of scores the indices of the best `topk` or of all that are visible; nothing where one chunk has them all."""
    m, chunk = pl.program_id(0), pl.program_id(1)
    count = jnp.minimum(visible[m], keys)
    here = jnp.minimum(count - chunk * size, size)

    @pl.when((count > size) & (here > 0) & (here <= topk))
    def _() -> None:
        place, value, there = _first(here, topk)
        plt.store(out.at[m, chunk, place], chunk * size + value, mask=there)

    @pl.when((count > size) & (here > topk))
    def _() -> None:
        place = jax.lax.broadcasted_iota(jnp.int32, (size,), 0)
        index, real = chunk * size + place, place < here
        score = plt.load(scores.at[m, index], mask=real, other=0.0)
        _choose(_ordered(score), real, topk, lambda place, chosen: plt.store(out.at[m, chunk, place], index, mask=chosen))


def _select(scores: Any, visible: Any, *refs: Any, topk: int, keys: int, size: int) -> None:
    """The indices of the best `topk` of a row's scores, of those alone that candidates [M, chunks·topk] name if given."""
    *candidates, out = refs
    m = pl.program_id(0)
    count = jnp.minimum(visible[m], keys)

    @pl.when(count <= topk)
    def _() -> None:
        place, value, there = _first(count, topk)
        plt.store(out.at[m, place], value, mask=there)

    @pl.when(count > topk)
    def _() -> None:
        named = candidates[0].shape[1] if candidates else 0
        place = jax.lax.broadcasted_iota(jnp.int32, (max(min(pl.next_power_of_2(keys), size), pl.next_power_of_2(named)),), 0)
        index, real = place, place < count
        if candidates:
            chunk, many = place // topk, count > size
            real = jnp.where(many, (place < named) & (place - chunk * topk < count - chunk * size), real)
            index = jnp.where(many, plt.load(candidates[0].at[m, place], mask=real & many, other=0), place)
        score = plt.load(scores.at[m, index], mask=real, other=0.0)
        _choose(_ordered(score), real, topk, lambda place, chosen: plt.store(out.at[m, place], index, mask=chosen))


def _launch(
    kernel: Callable[..., None], shape: jax.ShapeDtypeStruct, programs: int, warps: int, name: str, interpret: bool
) -> Any:
    """A kernel over the rows of its output times `programs`."""
    return pl.pallas_call(
        kernel,
        out_shape=shape,
        grid=(shape.shape[0], programs),
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name=name,
    )


@functools.partial(jax.jit, static_argnames=("topk", "qat", "interpret"))
def finish_queries(
    q: jax.Array, cos: jax.Array, sin: jax.Array, visible: jax.Array, *, topk: int, qat: bool, interpret: bool = False
) -> jax.Array:
    """Rotate a call's index queries and, with `qat`, transform and round them as the keys are.

    Args:
        q: float32 [M, Hi, Di].
        cos, sin: float32 [M, R/2] at each row's position.
        visible: int32 [M]; a row with no more than `topk` visible keys is left out, its queries undefined.

    Returns:
        bfloat16 [M, P, Hi, Di], P parts whose sum is the query: one with `qat`, exact, and three without.
    """
    m, heads, dim = q.shape
    shape = jax.ShapeDtypeStruct((m, 1 if qat else PARTS, heads, dim), jnp.bfloat16)
    programs = heads // math.gcd(heads, HEADS_A_PROGRAM)
    kernel = functools.partial(_queries, topk=topk, qat=qat)
    queries: jax.Array = _launch(kernel, shape, programs, 4, NAMES[0], interpret)(q, cos, sin, visible)
    return queries


@functools.partial(jax.jit, static_argnames=("topk", "interpret"))
def scores(
    queries: jax.Array, weights: jax.Array, keys: Stored, visible: jax.Array, *, topk: int, interpret: bool = False
) -> jax.Array:
    """Score keys against the queries: Σ over heads of weight · relu(query · key) / √(Di · Hi).

    Args:
        queries: what `finish_queries` returns.
        weights: float32 [M, Hi].
        keys: [S, Di], float32 or narrow; narrow ones need queries of one part.
        visible: int32 [M]; a row with no more than `topk` visible keys gets no scores.

    Returns:
        float32 [M, S'] with S' at least S; undefined from a row's visible keys on.
    """
    tiles = pl.cdiv(keys.shape[0], KEYS_A_TILE)
    # Of a prefill's many rows few programs each, so that a row's queries are loaded less often.
    programs = min(tiles, max(MOST_PROGRAMS * ROWS_APART // max(weights.shape[0], ROWS_APART), LEAST_PROGRAMS))
    shape = jax.ShapeDtypeStruct((weights.shape[0], tiles * KEYS_A_TILE), jnp.float32)
    kernel = functools.partial(_scores, topk=topk, programs=programs)
    score: jax.Array = _launch(kernel, shape, programs, 4, NAMES[1], interpret)(
        queries, weights, *jax.tree.leaves(keys), visible
    )  # fmt: skip
    return score


def _warps(count: int) -> int:
    return min(max(pl.next_power_of_2(count) // SCORES_A_WARP, 4), 16)


@functools.partial(jax.jit, static_argnames=("topk", "keys", "interpret"))
def select(score: jax.Array, visible: jax.Array, *, topk: int, keys: int, interpret: bool = False) -> jax.Array:
    """The indices of the best `topk` of the first `visible` scores, all of them where there are fewer.

    Args:
        score: float32 [M, S'], S' at least `keys`; of equal ones the earlier is better.
        visible: int32 [M], at most `keys`.

    Returns:
        int32 [M, topk], ascending, -1 behind the last.

    Raises:
        ValueError: more keys than two launches can choose from.
    """
    m, size = score.shape[0], _chunk(keys, topk)
    candidates: tuple[jax.Array, ...] = ()
    if keys > size:
        chunks = pl.cdiv(keys, size)
        if chunks * topk > MOST_CHUNK:
            raise ValueError(f"the best {topk} of {keys} keys: at most {MOST_CHUNK // topk} chunks of {size} can be chosen from")
        kernel = functools.partial(_chunks, topk=topk, keys=keys, size=size)
        shape = jax.ShapeDtypeStruct((m, chunks, topk), jnp.int32)
        best = _launch(kernel, shape, chunks, _warps(size), NAMES[2], interpret)(score, visible)
        candidates = (best.reshape(m, chunks * topk),)
    kernel = functools.partial(_select, topk=topk, keys=keys, size=size)
    shape, most = jax.ShapeDtypeStruct((m, topk), jnp.int32), max(min(keys, size), sum(best.shape[1] for best in candidates))
    chosen: jax.Array = _launch(kernel, shape, 1, _warps(most), NAMES[3], interpret)(score, visible, *candidates)
    return chosen


def index(
    q: jax.Array,
    weights: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    keys: Stored,
    visible: jax.Array,
    *,
    topk: int,
    qat: bool,
    interpret: bool = False,
) -> jax.Array:
    """Choose the compressed rows that each row of a call attends to: three launches, four for more than 2,048 keys.

    Args:
        q: float32 [M, Hi·Di], raw index queries.
        weights: float32 [M, Hi], raw weights of the heads.
        cos, sin: float32 [M, R/2] at each row's position.
        keys: [1, S, Di], finished keys, float32 or with `qat` narrow.
        visible: int32 [M], how many of them each row may see.
        topk: the most that a row attends to.
        qat: queries are transformed by Hadamard's matrix and rounded to FP4, as the keys then are.

    Returns:
        int32 [M, topk], ascending, -1 behind the last. Equal scores keep the lower index.

    Raises:
        ValueError: shapes that do not fit, or too many keys.
    """
    m, heads = weights.shape
    _, count, dim = keys.shape
    if q.shape != (m, heads * dim):
        raise ValueError(f"q is {list(q.shape)}; {heads} heads of keys of {dim} values need [{m}, {heads * dim}]")
    if heads & (heads - 1) or dim & (dim - 1) or dim < 32:
        raise ValueError(f"{heads} heads of {dim} values; both must be powers of two, the values at least 32")
    if isinstance(keys, NarrowKeys) and not qat:
        raise ValueError("the keys are narrow, but qat is off: they were rounded, the queries would not be")
    queries = finish_queries(q.reshape(m, heads, dim), cos, sin, visible, topk=topk, qat=qat, interpret=interpret)
    score = scores(queries, weights, jax.tree.map(lambda array: array[0], keys), visible, topk=topk, interpret=interpret)
    return select(score, visible, topk=topk, keys=count, interpret=interpret)


def reference_scores(q: jax.Array, weights: jax.Array, cos: jax.Array, sin: jax.Array, keys: Stored, *, qat: bool) -> jax.Array:
    """Scores float32 [M, S] in plain jnp; arguments as for `index`."""
    keys = narrow.expanded(keys)
    m, heads = weights.shape
    x = reference_rotate(q.reshape(m, heads, keys.shape[2]), cos[:, None], sin[:, None])
    x = reference_fp4(x) if qat else x
    highest = jax.lax.Precision.HIGHEST
    products = jnp.einsum("mhd,sd->mhs", x, keys[0], precision=highest)
    weights = weights * jnp.float32(keys.shape[2] ** -0.5 * heads**-0.5)
    return jnp.einsum("mhs,mh->ms", jax.nn.relu(products), weights, precision=highest)


def reference_select(score: jax.Array, visible: jax.Array, *, topk: int) -> jax.Array:
    """`select` of all S scores in plain jnp."""
    block = jnp.arange(score.shape[1], dtype=jnp.int32)
    best, index = jax.lax.top_k(jnp.where(block < visible[:, None], score, -jnp.inf), min(topk, score.shape[1]))
    ascending = jnp.sort(jnp.where(best > -jnp.inf, index, MOST), axis=1)
    ascending = jnp.pad(ascending, ((0, 0), (0, topk - ascending.shape[1])), constant_values=MOST)
    return jnp.where(ascending == MOST, -1, ascending)

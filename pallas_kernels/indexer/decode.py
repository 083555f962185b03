"""The lightning indexer of a decode step: scores compressed keys and chooses the best k, in three launches.

A row with at most k visible keys attends to all of them, and each launch ends immediately. Otherwise `index_queries` rotates and
rounds the heads, `index_scores` multiplies them by tiles of keys on the tensor cores, and `index_select` finds the k-th best
score by bisection over the scores' bits and stores the indices that reach it. If a program's registers cannot hold all scores,
another launch first reduces each chunk to its best k by the same bisection.

The row is a grid axis in every launch. No kernel body uses the number of rows, so row m of any call has the same bits as the row
alone.

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

from pallas_kernels.attention import stored_rows
from pallas_kernels.attention.stored_rows import NarrowKeys, Stored
from pallas_kernels.core import parts
from pallas_kernels.core.rounding import FP4_BLOCK
from pallas_kernels.core.row_rounding import angles, rotate, round_fp4

NAMES = ("index_queries", "index_scores", "index_chunks", "index_select")
HEADS_A_PROGRAM = 4
KEYS_A_TILE = 64
# Rows of one sequence that share a tile of keys, which is 32 KB from the L2.
ROWS_A_PROGRAM = 4
# Programs of a row: at most two per multiprocessor of an H100 or H200, fewer each in calls of many rows. If there are more
# tiles, a program loops over them.
MAX_PROGRAMS = 264
MIN_PROGRAMS = 4
FEW_ROWS = 8
MIN_HEADS = 16
# From so many rows on, a program takes all heads of a row.
MANY_ROWS = 256
# A float32 is the sum of three bfloat16 numbers. A value rounded to FP4 is one.
PARTS = 3
# Scores that one program chooses from. With fewer of them, more programs share the work.
MIN_CHUNK, MAX_CHUNK = 2048, 16384
SCORES_A_WARP = 256
INT_MIN, INT_MAX = -(1 << 31), (1 << 31) - 1


def _value(i: int) -> jax.Array:
    """A Python integer as a traced value."""
    return jax.lax.full((), i, jnp.int32)


def _queries(q: Any, cos: Any, sin: Any, visible: Any, out: Any, *, topk: int, qat: bool, heads: int) -> None:
    m = pl.program_id(0)
    span = pl.ds(pl.program_id(1) * heads, heads)

    @pl.when(visible[m] > topk)
    def _() -> None:
        x = rotate(q[m, span, :], *angles(cos, sin, m, q.shape[2] // 2))
        for i, part in enumerate(parts.parts(round_fp4(x, many=heads >= MIN_HEADS) if qat else x, out.shape[1])):
            out[m, _value(i), span, :] = part


def _narrow_products(
    keys: NarrowKeys, sequence: jax.Array, first: jax.Array, count: jax.Array, queries: Sequence[jax.Array]
) -> jax.Array:
    """Dot products [tile, heads] of a sequence's FP4 keys and queries [heads, chunk].

    The products of a block are summed, then multiplied by its scale. The result equals that of float32 keys as long as a sum has
    no more digits than a float32; it has more only if one block of a key is thousands of times larger than another.

    Args:
        first: the first key of the tile.
        count: the number of visible keys; keys from this index count as 0.
    """
    chunk, half = queries[0].shape[1], len(queries) // 2
    row = first + jax.lax.broadcasted_iota(jnp.int32, (KEYS_A_TILE,), 0)
    there = first + jax.lax.broadcasted_iota(jnp.int32, (KEYS_A_TILE, chunk), 0) < count
    total = jnp.zeros((KEYS_A_TILE, queries[0].shape[0]), jnp.float32)
    for i in range(half):
        span = sequence, pl.ds(first, KEYS_A_TILE), pl.ds(i * chunk, chunk)
        codes = plt.load(keys.codes.at[span], mask=there, other=0).astype(jnp.int32)
        # The low halves of the bytes are the first half of the channels, the high halves the second.
        for part, place in ((codes, i), (codes >> 4, half + i)):
            block = jnp.full_like(row, place * chunk // FP4_BLOCK)
            exponents = keys.exponents.at[jnp.full_like(row, sequence), row, block]
            scale = stored_rows.scales(plt.load(exponents, mask=row < count, other=0))
            dims = (((1,), (1,)), ((), ()))
            dot = jax.lax.dot_general(stored_rows.fp4_values(part), queries[place], dims, preferred_element_type=jnp.float32)
            total += dot * jnp.broadcast_to(scale[:, None], dot.shape)
    return total


def _scores(q: Any, weights: Any, *refs: Any, topk: int, programs: int, rows: int) -> None:
    *leaves, of, visible, out = refs
    keys = leaves[0] if len(leaves) == 1 else NarrowKeys(*leaves)
    m, first = pl.program_id(0) * rows, pl.program_id(1)
    sequence = of[m]
    count_of_parts, heads, dim = q.shape[1:]
    chunk = min(FP4_BLOCK, dim // 2) if isinstance(keys, NarrowKeys) else dim
    most = functools.reduce(jnp.maximum, [visible[m + row] for row in range(rows)])
    count = jnp.minimum(most, keys.shape[1])
    tiles = jnp.where(count > topk, (count + (KEYS_A_TILE - 1)) // KEYS_A_TILE, 0)

    @pl.when(first < tiles)
    def _() -> None:
        head = jax.lax.broadcasted_iota(jnp.int32, (max(heads, MIN_HEADS),), 0)
        real = head < heads
        real_queries = jnp.broadcast_to(real[:, None], (head.shape[0], chunk))
        # Padding heads are past the end; a slice with a constant start must not reach there.
        span = pl.ds(_value(0), head.shape[0])
        chunks = [(i, pl.ds(channel, chunk)) for i in range(count_of_parts) for channel in range(0, dim, chunk)]
        scale = jnp.float32(dim**-0.5 * heads**-0.5)
        queries, weight = [], []
        for row in range(rows):
            loads = [q.at[m + row, _value(i), span, channels] for i, channels in chunks]
            queries.append([plt.load(ref, mask=real_queries, other=0.0) for ref in loads])
            weight.append(plt.load(weights.at[m + row, span], mask=real, other=0.0) * scale)

        def tile(i: jax.Array, carry: jax.Array) -> jax.Array:
            span = pl.ds((first + i * programs) * KEYS_A_TILE, KEYS_A_TILE)
            there = (first + i * programs) * KEYS_A_TILE + jax.lax.broadcasted_iota(jnp.int32, (KEYS_A_TILE, dim), 0) < count
            if not isinstance(keys, NarrowKeys):
                wide = plt.load(keys.at[sequence, span, :], mask=there, other=0.0)
            for row in range(rows):
                if isinstance(keys, NarrowKeys):
                    products = _narrow_products(keys, sequence, (first + i * programs) * KEYS_A_TILE, count, queries[row])
                else:
                    products = parts.products(wide, queries[row])
                weight_of = jnp.broadcast_to(weight[row][None, :], products.shape)
                out[m + row, span] = jnp.sum(jnp.maximum(products, 0.0) * weight_of, axis=1)
            return carry

        jax.lax.fori_loop(0, (tiles - first + (programs - 1)) // programs, tile, jnp.int32(0))


def _ordered(score: jax.Array) -> jax.Array:
    """Map float32 to int32 in the same order; +0 and -0 become equal."""
    bits = jax.lax.bitcast_convert_type(score, jnp.int32)
    return jnp.where(score == 0.0, 0, jnp.where(bits < 0, bits ^ INT_MAX, bits))


def _count(condition: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(condition, jnp.int32(1), jnp.int32(0)))


def _threshold(keys: jax.Array, real: jax.Array, topk: int) -> jax.Array:
    """The threshold of the best `topk` keys: at least `topk` of the real keys reach it, and fewer than `topk` exceed it.

    At least `topk` keys are real. Bisection; it ends as soon as exactly `topk` keys reach the middle.
    """
    keys = jnp.where(real, keys, INT_MIN)

    def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low | high) - ((low ^ high) >> 1)
        count = _count(keys >= middle)
        enough = count >= topk
        high = jnp.where(count == topk, middle, jnp.where(enough, high, middle - 1))
        return jnp.where(enough, middle, low), high

    bounds = jnp.min(jnp.where(real, keys, INT_MAX)), jnp.max(keys)
    return jax.lax.while_loop(lambda bounds: bounds[0] < bounds[1], halve, bounds)[0]


def _choose(keys: jax.Array, real: jax.Array, topk: int, store: Callable[[jax.Array, jax.Array], None]) -> None:
    """Choose the best `topk` of the real keys, in index order. `store` gets each key's place and whether it is chosen."""
    threshold = _threshold(keys, real, topk)
    above, equal = real & (keys > threshold), real & (keys == threshold)
    # Two running sums in one word: keys above the threshold in the low half, equal keys in the high half.
    one = jnp.where(above, jnp.int32(1), jnp.where(equal, jnp.int32(1 << 16), jnp.int32(0)))
    running = jax.lax.cumsum(one)
    above_until, equal_until = running & 0xFFFF, running >> 16
    wanted = topk - _count(above)
    chosen = above | (equal & (equal_until <= wanted))
    # Other keys get an index past the end; interpret mode drops them.
    store(jnp.where(chosen, above_until + jnp.minimum(equal_until, wanted) - 1, topk), chosen)


def _first(visible: jax.Array, topk: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """All `visible` indices, then -1: places, values, and which places exist."""
    place = jax.lax.broadcasted_iota(jnp.int32, (pl.next_power_of_2(topk),), 0)
    return place, jnp.where(place < visible, place, -1), place < topk


def _chunk(keys: int, topk: int) -> int:
    """Scores per chunk, such that all chunks together have about as many candidates."""
    return min(max(pl.next_power_of_2(math.isqrt(keys * topk)), MIN_CHUNK), MAX_CHUNK)


def _chunks(scores: Any, visible: Any, out: Any, *, topk: int, keys: int, size: int) -> None:
    """Store the indices of the best `topk` visible scores of each chunk. Does nothing if one chunk has all of them."""
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
    """Store the indices of the best `topk` of a row's scores, or only of the candidates [M, chunks·topk] if given."""
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
    kernel: Callable[..., None], shape: jax.ShapeDtypeStruct, programs: int, warps: int, name: str, interpret: bool,
    rows: int = 1,
) -> Any:  # fmt: skip
    """A kernel with a grid of the rows of its output, `rows` to a program, times `programs`."""
    return pl.pallas_call(
        kernel,
        out_shape=shape,
        grid=(shape.shape[0] // rows, programs),
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name=name,
    )


@functools.partial(jax.jit, static_argnames=("topk", "qat", "many", "interpret"))
def finish_queries(
    q: jax.Array, cos: jax.Array, sin: jax.Array, visible: jax.Array, *, topk: int, qat: bool, many: bool = False,
    interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """Rotate the index queries of a call. With `qat`, also transform and round them like the keys.

    Args:
        q: float32 [M, Hi, Di].
        cos, sin: float32 [M, R/2] at each row's position.
        visible: int32 [M]; the queries of a row with at most `topk` visible keys are undefined.
        many: static; a program takes all heads of a row, for calls with more rows than multiprocessors.

    Returns:
        bfloat16 [M, P, Hi, Di]: P parts that sum to the query. P is 1 with `qat`, which is exact, and 3 without.
    """
    m, heads, dim = q.shape
    shape = jax.ShapeDtypeStruct((m, 1 if qat else PARTS, heads, dim), jnp.bfloat16)
    mine = heads if many else math.gcd(heads, HEADS_A_PROGRAM)
    kernel = functools.partial(_queries, topk=topk, qat=qat, heads=mine)
    queries: jax.Array = _launch(kernel, shape, heads // mine, 8 if many else 4, NAMES[0], interpret)(q, cos, sin, visible)
    return queries


@functools.partial(jax.jit, static_argnames=("topk", "rows", "interpret"))
def scores(
    queries: jax.Array, weights: jax.Array, keys: Stored, sequence: jax.Array, visible: jax.Array, *, topk: int, rows: int = 1,
    interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """Score keys against queries: Σ over heads of weight · relu(query · key) / √(Di · Hi).

    Args:
        queries: the result of `finish_queries`.
        weights: float32 [M, Hi].
        keys: [B, S, Di], float32 or narrow; narrow keys need queries of one part.
        sequence: int32 [M], the sequence of each row.
        visible: int32 [M]; a row with at most `topk` visible keys gets no scores.
        rows: static; rows of a program, a divisor of M. They share each tile of keys, so all must be of one sequence.

    Returns:
        float32 [M, S'] with S' at least S; undefined from index `visible`.
    """
    tiles = pl.cdiv(keys.shape[1], KEYS_A_TILE)
    # In a prefill of many rows each row gets few programs, so its queries are loaded less often.
    programs = min(tiles, max(MAX_PROGRAMS * FEW_ROWS // max(weights.shape[0] // rows, FEW_ROWS), MIN_PROGRAMS))
    shape = jax.ShapeDtypeStruct((weights.shape[0], tiles * KEYS_A_TILE), jnp.float32)
    kernel = functools.partial(_scores, topk=topk, programs=programs, rows=rows)
    score: jax.Array = _launch(kernel, shape, programs, 4, NAMES[1], interpret, rows)(
        queries, weights, *jax.tree.leaves(keys), sequence, visible
    )  # fmt: skip
    return score


def _warps(count: int) -> int:
    return min(max(pl.next_power_of_2(count) // SCORES_A_WARP, 4), 16)


@functools.partial(jax.jit, static_argnames=("topk", "keys", "interpret"))
def select(score: jax.Array, visible: jax.Array, *, topk: int, keys: int, interpret: bool = False) -> jax.Array:
    """The indices of the best `topk` of the first `visible` scores, or of all if there are fewer.

    Args:
        score: float32 [M, S'], S' at least `keys`; of equal scores the lower index is better.
        visible: int32 [M], at most `keys`.
        topk, keys: static.

    Returns:
        int32 [M, topk], ascending, then -1.

    Raises:
        ValueError: two launches cannot choose from so many keys.
    """
    m, size = score.shape[0], _chunk(keys, topk)
    candidates: tuple[jax.Array, ...] = ()
    if keys > size:
        chunks = pl.cdiv(keys, size)
        if chunks * topk > MAX_CHUNK:
            raise ValueError(
                f"{keys} keys are {chunks} chunks of {size}; with topk {topk} at most {MAX_CHUNK // topk} chunks fit"
            )
        kernel = functools.partial(_chunks, topk=topk, keys=keys, size=size)
        shape = jax.ShapeDtypeStruct((m, chunks, topk), jnp.int32)
        best = _launch(kernel, shape, chunks, _warps(size), NAMES[2], interpret)(score, visible)
        candidates = (best.reshape(m, chunks * topk),)
    kernel = functools.partial(_select, topk=topk, keys=keys, size=size)
    shape, largest = jax.ShapeDtypeStruct((m, topk), jnp.int32), max(min(keys, size), sum(best.shape[1] for best in candidates))
    chosen: jax.Array = _launch(kernel, shape, 1, _warps(largest), NAMES[3], interpret)(score, visible, *candidates)
    return chosen


def index(
    q: jax.Array, weights: jax.Array, cos: jax.Array, sin: jax.Array, keys: Stored, sequence: jax.Array, visible: jax.Array,
    *, topk: int, qat: bool, one_sequence: bool = False, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """Choose the compressed rows that each row of a call attends to. Three launches, four for more than 2,048 keys.

    Args:
        q: float32 [M, Hi·Di], index queries before rotation.
        weights: float32 [M, Hi], weights of the heads before scaling.
        cos, sin: float32 [M, R/2] at each row's position.
        keys: [B, S, Di], rotated and rounded keys of B sequences, float32 or, with `qat`, narrow.
        sequence: int32 [M], the sequence of each row.
        visible: int32 [M], the number of keys that each row may see.
        topk: static, the maximum number of keys that a row attends to.
        qat: static; multiply queries by the Hadamard matrix and round them to FP4. The keys must have been rounded the same way.
        one_sequence: static; all rows are of one sequence. Then several share a program, and the bits are the same.

    Returns:
        int32 [M, topk], indices of the row's keys, ascending, then -1. Of equal scores the lower index is chosen.

    Raises:
        ValueError: the shapes do not agree, keys are narrow without `qat`, or there are too many keys.
    """
    m, heads = weights.shape
    _, count, dim = keys.shape
    if q.shape != (m, heads * dim):
        raise ValueError(f"q is {list(q.shape)}; {heads} heads of {dim} values need [{m}, {heads * dim}]")
    if heads & (heads - 1) or dim & (dim - 1) or dim < 32:
        raise ValueError(f"{heads} heads of {dim} values; both must be powers of two, the values at least 32")
    if isinstance(keys, NarrowKeys) and not qat:
        raise ValueError("the keys are narrow, but qat is off; set qat, so that the queries are rounded like the keys")
    of_queries: dict[str, Any] = {"topk": topk, "qat": qat, "many": one_sequence and m >= MANY_ROWS, "interpret": interpret}
    queries = finish_queries(q.reshape(m, heads, dim), cos, sin, visible, **of_queries)
    rows = math.gcd(m, ROWS_A_PROGRAM) if one_sequence else 1
    score = scores(queries, weights, keys, sequence, visible, topk=topk, rows=rows, interpret=interpret)
    return select(score, visible, topk=topk, keys=count, interpret=interpret)

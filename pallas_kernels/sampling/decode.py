"""The filters and the draw of a decode step: one launch a pass over the vocabulary, with many programs a row.

`sample_search` counts a row's tokens above 32 thresholds, and adds their masses, chunk by chunk. The next launch adds the chunks
and tries 32 thresholds in the part of the keys that is left. `sample_keep` knows the threshold and how many equal tokens earlier
chunks have, and writes the kept probabilities. `sample_pick` finds the tile of a row, then the token, in which a random part of
the row's mass ends.

All sums are of integers, and the row is a grid axis. So a row has the bits of the meaning, in any company and any chunks.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.sampling import meaning

NAMES = ("sample_search", "sample_keep", "sample_pick")
# Tokens whose masses have one sum for the draw, and that a program loads at once.
TILE = 1024
# Tokens that are compared with all thresholds at once, in registers.
GROUP = 256
# Thresholds of a pass over few rows, where launches are the cost, and over many, where comparisons are.
THRESHOLDS, FEW_THRESHOLDS = 32, 8
FEW_ROWS = 8
# Programs of a launch, about one for each multiprocessor of an H100 or H200.
PROGRAMS = 128
# The key of a probability of 1, the largest.
LARGEST = 0x3F800000


def steps(thresholds: int) -> tuple[int, ...]:
    """Distances of the thresholds of each pass.

    n thresholds leave one of n + 1 intervals of keys, as long as the next pass reaches or shorter. The last pass has one
    threshold below the first key, so that it counts the tokens at each of n - 1 keys.
    """
    found, reach = [1], thresholds - 1
    while reach <= LARGEST:
        # The first pass goes no further than the keys, or int32 would not hold its thresholds.
        found.append(min(reach, LARGEST // (thresholds + 1) + 1))
        reach *= thresholds + 1
    return tuple(reversed(found))


def _iota(*shape: int, axis: int = 0) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _keys(p: Any, row: jax.Array, first: jax.Array, count: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Keys and probabilities of the `count` tokens from `first` on; past the vocabulary the key is below all."""
    token = first + _iota(count)
    there = token < size
    # Interpret mode clamps an index past the end.
    x = plt.load(p.at[row, jnp.minimum(token, size - 1)], mask=there, other=0.0)
    return jnp.where(there, jax.lax.bitcast_convert_type(x, jnp.int32), -1), jnp.where(there, x, 0.0)


def _search(p: Any, top_k: Any, top_p: Any, *refs: Any, step: int, before: int, tiles: int, size: int) -> None:
    """A pass. `before` is the distance of the thresholds of the pass before, 0 in the first one."""
    *given, found_ref, count_ref, mass_ref, largest_ref = refs
    row, chunk = pl.program_id(0), pl.program_id(1)
    thresholds = count_ref.shape[2]
    found = jnp.int32(0)
    if given:
        most, least = meaning.bounds(size, top_k[row], top_p[row])
        count, mass = (jnp.sum(ref[row, :, :], axis=0) for ref in given[1:])
        missed = (count >= most) | (mass >= least)
        found = given[0][row] + jnp.sum(jnp.where(missed, jnp.int32(1), jnp.int32(0))) * before
    # The last pass starts below the first key.
    ends = found - 1 + (_iota(thresholds) + (1 if step > 1 else 0)) * step
    shape = (GROUP, thresholds)
    ends = jnp.broadcast_to(ends[None, :], shape)

    def tile(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        count, mass, largest = carry
        first = (chunk * tiles + i) * TILE
        for key, x in [_keys(p, row, first + at, GROUP, size) for at in range(0, TILE, GROUP)]:
            above = jnp.broadcast_to(key[:, None], shape) > ends
            count += jnp.where(above, jnp.int32(1), jnp.int32(0))
            mass += jnp.where(above, jnp.broadcast_to(meaning.mass(x)[:, None], shape), jnp.uint32(0))
            largest = jnp.maximum(largest, key)
        return count, mass, largest

    nothing = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.uint32), jnp.full((GROUP,), -1, jnp.int32)
    count, mass, largest = jax.lax.fori_loop(0, tiles, tile, nothing)
    count_ref[row, chunk, :] = jnp.sum(count, axis=0)
    mass_ref[row, chunk, :] = jnp.sum(mass, axis=0)
    largest_ref[row, chunk] = jnp.max(largest)

    @pl.when(chunk == 0)
    def _() -> None:
        found_ref[row] = found


def _keep(
    p: Any, top_k: Any, top_p: Any, min_p: Any, found: Any, count_ref: Any, mass_ref: Any, largest: Any, out: Any,
    *, tiles: int, size: int,
) -> None:  # fmt: skip
    row, chunk = pl.program_id(0), pl.program_id(1)
    _, chunks, thresholds = count_ref.shape
    count, mass, lane = count_ref[row, :, :], mass_ref[row, :, :], _iota(thresholds)
    above, heavier = jnp.sum(count, axis=0), jnp.sum(mass, axis=0)
    most, least = meaning.bounds(size, top_k[row], top_p[row])
    # The first threshold is below the first key that is left.
    missed = (above >= most) | (heavier >= least) | (lane == 0)
    place = jnp.sum(jnp.where(missed, jnp.int32(1), jnp.int32(0)))
    threshold = found[row] - 1 + place
    at = lane == place
    kept = meaning.kept_ties(
        threshold, size, most, least, jnp.sum(jnp.where(at, above, 0)), jnp.sum(jnp.where(at, heavier, jnp.uint32(0)))
    )
    lanes, earlier = _iota(chunks, thresholds, axis=1), _iota(chunks, thresholds) < chunk
    reached = jnp.where(earlier & (lanes == place - 1), count, 0) - jnp.where(earlier & (lanes == place), count, 0)
    floor = min_p[row] * jax.lax.bitcast_convert_type(jnp.max(largest[row, :]), jnp.float32)

    def tile(i: jax.Array, ties: jax.Array) -> jax.Array:
        first = (chunk * tiles + i) * TILE
        key, x = _keys(p, row, first, TILE, size)
        tie = jnp.where(key == threshold, jnp.int32(1), jnp.int32(0))
        stays = (key > threshold) | ((tie > 0) & (ties + jax.lax.cumsum(tie) <= kept))
        token = first + _iota(TILE)
        plt.store(out.at[row, token], jnp.where(stays & (x >= floor), x, 0.0), mask=token < size)
        return ties + jnp.sum(tie)

    jax.lax.fori_loop(0, tiles, tile, jnp.sum(reached))


def _pick(weights: Any, sums: Any, random: Any, out: Any, *, size: int) -> None:
    row = pl.program_id(0)
    sum_of_tiles = jax.lax.cumsum(sums[row, :])
    end = meaning.part(random[row], jnp.sum(sums[row, :]))
    before = sum_of_tiles <= end
    tile = jnp.sum(jnp.where(before, jnp.int32(1), jnp.int32(0)))
    end = end - jnp.max(jnp.where(before, sum_of_tiles, jnp.uint32(0)))
    _, x = _keys(weights, row, tile * TILE, TILE, size)
    count = jnp.sum(jnp.where(jax.lax.cumsum(meaning.mass(x)) <= end, jnp.int32(1), jnp.int32(0)))
    out[row] = jnp.minimum(tile * TILE + count, size - 1)


def _launch(kernel: Any, shapes: Any, grid: tuple[int, ...], warps: int, name: str, interpret: bool) -> Any:
    return pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid=grid,
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name=name,
    )


@functools.partial(jax.jit, static_argnames=("thresholds", "programs", "interpret"))
def keep(
    p_RV: jax.Array, top_k_R: jax.Array, top_p_R: jax.Array, min_p_R: jax.Array, *, thresholds: int | None = None,
    programs: int = PROGRAMS, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """`meaning.keep` of R rows, float32 [R, V]. Seven launches for few rows, eleven for many.

    Args:
        p_RV: float32 [R, V], from 0 to 1.
        top_k_R, top_p_R, min_p_R: int32, float32 and float32 [R].
        thresholds: static, a power of two, of a pass; by default it follows from the number of rows.
        programs: static, about the number of programs of a launch. It changes no bit, as `thresholds`.
    """
    rows, size = p_RV.shape
    thresholds = thresholds or (THRESHOLDS if rows <= FEW_ROWS else FEW_THRESHOLDS)
    whole = pl.next_power_of_2(pl.cdiv(size, TILE))
    chunks = min(whole, pl.next_power_of_2(pl.cdiv(programs, rows)))
    given = p_RV, top_k_R, top_p_R
    shapes = (
        jax.ShapeDtypeStruct((rows,), jnp.int32),
        jax.ShapeDtypeStruct((rows, chunks, thresholds), jnp.int32),
        jax.ShapeDtypeStruct((rows, chunks, thresholds), jnp.uint32),
        jax.ShapeDtypeStruct((rows, chunks), jnp.int32),
    )
    options: dict[str, int] = {"tiles": whole // chunks, "size": size}
    state, before = (), 0
    for step in steps(thresholds):
        kernel = functools.partial(_search, step=step, before=before, **options)
        state = _launch(kernel, shapes, (rows, chunks), 8, NAMES[0], interpret)(*given, *state[:3])
        before = step
    kernel = functools.partial(_keep, **options)
    kept_RV: jax.Array = _launch(kernel, jax.ShapeDtypeStruct(p_RV.shape, jnp.float32), (rows, chunks), 4, NAMES[1], interpret)(
        *given, min_p_R, *state
    )
    return kept_RV


@functools.partial(jax.jit, static_argnames="interpret")
def pick(weights_RV: jax.Array, random_R: jax.Array, *, interpret: bool = False) -> jax.Array:
    """`meaning.pick` of R rows, int32 [R]: XLA adds the masses of each tile, one launch draws.

    Args:
        weights_RV: float32 [R, V], from 0 to 1, a row in all at most about 1.
        random_R: uint32 [R].
    """
    rows, size = weights_RV.shape
    tiles = pl.next_power_of_2(pl.cdiv(size, TILE))
    mass_RTt = jnp.pad(meaning.mass(weights_RV), ((0, 0), (0, tiles * TILE - size))).reshape(rows, tiles, TILE)
    kernel = functools.partial(_pick, size=size)
    drawn_R: jax.Array = _launch(kernel, jax.ShapeDtypeStruct((rows,), jnp.int32), (rows,), 4, NAMES[2], interpret)(
        weights_RV, jnp.sum(mass_RTt, axis=2, dtype=jnp.uint32), random_R
    )
    return drawn_R

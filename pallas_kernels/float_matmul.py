"""Products of a few float32 rows with float16, bfloat16 or float32 weights: each weight is read once and serves all rows.

The same plan as the share-warp kernel: a program is one warp and owns a few weight rows, a lane owns 16 bytes of every 32 times
16, adds each product with one fused multiply-add, and the lanes are summed once. Row m of any call has the bits of the row alone.
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

from pallas_kernels import arithmetic, lanes
from pallas_kernels.arithmetic import LANES

NAME = "float_matmul"
LOAD_BYTES = 16
MOST_ROWS = 8
# Loads of 16 bytes that a lane has on their way, and accumulators of 16 bytes' weights, before registers run out.
MOST_LOADS = 8
MOST_SUMS = 8
PROGRAMS = 1024


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """One weight of a launch as a program sees it; `mine` is None where the launch has no other."""

    weight: Any
    out: Any
    n: int
    row: jax.Array
    mine: jax.Array | None


def lane_values(dtype: Any) -> int:
    """Weights in the 16 bytes of a lane."""
    return LOAD_BYTES // jnp.dtype(dtype).itemsize


def _kernel(x_ref: Any, *refs: Any, sizes: tuple[int, ...], rows: int, unroll: int, interpret: bool) -> None:
    count, (tokens, columns, width) = len(sizes), x_ref.shape
    program, first, matrices = pl.program_id(0), 0, []
    for weight, out, n in zip(refs[:count], refs[count:], sizes, strict=True):
        tiles = pl.cdiv(n, rows)
        mine = (program >= first) & (program < first + tiles) if count > 1 else None
        matrices.append(_Matrix(weight, out, n, (program - first) * rows, mine))
        first += tiles

    def turn(start: jax.Array, chunks: int, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        places = [start + c * LANES for c in range(chunks)]
        inside = [place + lanes.numbers() < columns if columns % LANES else None for place in places]

        def weights_of(matrix: _Matrix) -> list[list[jax.Array]]:
            return [
                [_load(matrix, r, rows, place, real, width) for r in range(rows)]
                for place, real in zip(places, inside, strict=True)
            ]

        loaded = lanes.of_mine(matrices, weights_of)
        if not interpret:
            # All loads are on their way before the first product.
            plt.debug_barrier()
        out = list(sums)
        for place, real, weights in zip(places, inside, loaded, strict=True):
            for m in range(tokens):
                x = lanes.load(x_ref, m, pl.ds(place, LANES), slice(None), real=real, width=width)
                for r, weight in enumerate(weights):
                    i = m * rows + r
                    out[i] = arithmetic.fma(weight.astype(jnp.float32), x, out[i], interpret=interpret)
        return tuple(out)

    sums = tuple(jnp.zeros((LANES, width), jnp.float32) for _ in range(tokens * rows))
    turns, rest = divmod(pl.cdiv(columns, LANES), unroll)
    if turns > 1:
        sums = jax.lax.fori_loop(0, turns, lambda i, sums: turn(i * unroll * LANES, unroll, sums), sums)
    elif turns:
        sums = turn(lanes.value(0), unroll, sums)
    if rest:
        sums = turn(lanes.value(turns * unroll * LANES), rest, sums)
    _store(matrices, [jnp.sum(total, axis=-1) for total in sums], rows, interpret)


def _load(matrix: _Matrix, r: int, rows: int, place: jax.Array, inside: jax.Array | None, width: int) -> jax.Array:
    row = matrix.row + r
    real = lanes.all_of(row < matrix.n if matrix.n % rows else None, inside)
    span = pl.ds(place, LANES)
    return lanes.load(matrix.weight, row, span, slice(None), real=real, width=width, eviction_policy="evict_first")


def _store(matrices: Sequence[_Matrix], sums: Sequence[jax.Array], rows: int, interpret: bool) -> None:
    """Sum over the lanes and store, up to 32 sums at once."""
    lane = lanes.numbers()
    for first in range(0, len(sums), LANES):
        total, place, owner = arithmetic.sum_lanes(sums[first : first + LANES], lane, interpret=interpret)
        m, r = (first + place) // rows, (first + place) % rows
        for matrix in matrices:
            real = lanes.all_of(owner, matrix.mine, matrix.row + r < matrix.n if matrix.n % rows else None)
            assert real is not None
            # A lane with nothing to store points past the end, where interpret mode drops its value.
            column = jnp.where(real, matrix.row + r, matrix.out.shape[1])
            plt.store(matrix.out.at[m, column], total, mask=real)


def cut(rows: int, heights: int, chunks: int) -> tuple[int, int]:
    """Weight rows of a program and chunks that it loads at once, for M rows and so many weight rows and chunks in all.

    They decide how long a launch takes and nothing else.
    """
    owned = 4
    while owned > 1 and (owned * rows > MOST_SUMS or heights < owned * PROGRAMS):
        owned //= 2
    # A single row of weights leaves registers for twice the loads, and the few programs that there then are need them.
    loads = 2 * MOST_LOADS if owned == rows == 1 else MOST_LOADS
    return owned, min(chunks, max(loads // owned, 1))


def float_matmul(x: jax.Array, weights: Sequence[jax.Array], *, interpret: bool = False) -> list[jax.Array]:
    """Multiply the same rows with one or several float weights in one launch.

    Args:
        x: float32 [M, K], M from 1 to 8.
        weights: [N, K] each, all float16, bfloat16 or float32; K a multiple of the values in 16 bytes.

    Returns:
        float32 [M, N] for each weight.
    """
    m, k = x.shape
    width = lane_values(weights[0].dtype)
    sizes = tuple(weight.shape[0] for weight in weights)
    rows, unroll = cut(m, sum(sizes), pl.cdiv(k // width, LANES))
    outputs: list[jax.Array] = pl.pallas_call(
        functools.partial(_kernel, sizes=sizes, rows=rows, unroll=unroll, interpret=interpret),
        out_shape=[jax.ShapeDtypeStruct((m, n), jnp.float32) for n in sizes],
        grid=(sum(pl.cdiv(n, rows) for n in sizes),),
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name=NAME,
    )(x.reshape(m, -1, width), *(weight.reshape(weight.shape[0], -1, width) for weight in weights))
    return outputs

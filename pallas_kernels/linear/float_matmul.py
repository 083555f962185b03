"""Products of a few float32 rows and float16, bfloat16 or float32 weights. Each weight is read once for all rows.

Works like the share-warp kernel. A program is one warp and owns a few weight rows. A lane owns 16 bytes of every 512 and adds
each product with one fused multiply-add. The lanes are summed once, at the end. Row m of any call has the same bits as the row
alone. More than eight rows are multiplied in batches, see `core.batches`.
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

from pallas_kernels.core import arithmetic, batches, loads
from pallas_kernels.core.arithmetic import LANES
from pallas_kernels.core.batches import Batch
from pallas_kernels.core.launch import Part, launch

NAME = "float_matmul"
LOAD_BYTES = 16
# Maximum 16-byte loads of a lane in flight, and maximum accumulators of a lane. More of them do not fit into registers.
MAX_LOADS = 8
MAX_SUMS = 16
# With fewer programs a GPU waits for loads: a program then has fewer weight rows, and fewer rows of activations.
PROGRAMS = 1024


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """One weight of a launch. `selected`: whether the program works on it; None if the launch has one weight."""

    weight: Any
    out: Any
    n: int
    row: jax.Array
    selected: jax.Array | None


def lane_values(dtype: Any) -> int:
    """Number of weights in the 16 bytes of a lane."""
    return LOAD_BYTES // jnp.dtype(dtype).itemsize


def _body(
    program: jax.Array, inputs: Sequence[Any], outputs: Sequence[Any],
    *, sizes: tuple[int, ...], rows: int, unroll: int, together: int, interpret: bool,
) -> None:  # fmt: skip
    x_ref, *weight_refs = inputs
    count, (tokens, columns, width) = len(sizes), x_ref.shape
    program, batch = batches.split(program, tokens, together)
    first, matrices = 0, []
    for weight, out, n in zip(weight_refs, outputs, sizes, strict=True):
        tiles = pl.cdiv(n, rows)
        selected = (program >= first) & (program < first + tiles) if count > 1 else None
        matrices.append(_Matrix(weight, out, n, (program - first) * rows, selected))
        first += tiles

    def one_pass(start: jax.Array, chunks: int, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        places = [start + c * LANES for c in range(chunks)]
        inside = [place + loads.numbers() < columns if columns % LANES else None for place in places]

        def weights_of(matrix: _Matrix) -> list[list[jax.Array]]:
            return [
                [_load(matrix, r, rows, place, real, width, batch) for r in range(rows)]
                for place, real in zip(places, inside, strict=True)
            ]

        loaded = loads.load_selected(matrices, weights_of)
        if not interpret:
            # Start all loads before the first product.
            plt.debug_barrier()
        out = list(sums)
        for place, real, weights in zip(places, inside, loaded, strict=True):
            for m in range(batch.size):
                x = loads.load(x_ref, batch.row(m), pl.ds(place, LANES), slice(None), real=real, width=width)
                for r, weight in enumerate(weights):
                    i = m * rows + r
                    out[i] = arithmetic.fma(weight.astype(jnp.float32), x, out[i], interpret=interpret)
        return tuple(out)

    sums = tuple(jnp.zeros((LANES, width), jnp.float32) for _ in range(batch.size * rows))
    passes, rest = divmod(pl.cdiv(columns, LANES), unroll)
    if passes > 1:
        sums = jax.lax.fori_loop(0, passes, lambda i, sums: one_pass(i * unroll * LANES, unroll, sums), sums)
    elif passes:
        sums = one_pass(loads.value(0), unroll, sums)
    if rest:
        sums = one_pass(loads.value(passes * unroll * LANES), rest, sums)
    _store(matrices, [jnp.sum(total, axis=-1) for total in sums], rows, batch, interpret)


def _load(matrix: _Matrix, r: int, rows: int, place: jax.Array, inside: jax.Array | None, width: int, batch: Batch) -> jax.Array:
    row = matrix.row + r
    real = loads.all_of(row < matrix.n if matrix.n % rows else None, inside)
    span = pl.ds(place, LANES)
    return loads.load(matrix.weight, row, span, slice(None), real=real, width=width, once=batch.only)


def _store(matrices: Sequence[_Matrix], sums: Sequence[jax.Array], rows: int, batch: Batch, interpret: bool) -> None:
    """Sum over the lanes and store, up to 32 sums at once."""
    lane = loads.numbers()
    for first in range(0, len(sums), LANES):
        total, place, owner = arithmetic.sum_lanes(sums[first : first + LANES], lane, interpret=interpret)
        m, r = (first + place) // rows, (first + place) % rows
        for matrix in matrices:
            inside = matrix.row + r < matrix.n if matrix.n % rows else None
            real = loads.all_of(owner, matrix.selected, inside, batch.real(m))
            assert real is not None
            # The index of a lane without a value is past the end; interpret mode drops it.
            column = jnp.where(real, matrix.row + r, matrix.out.shape[1])
            plt.store(matrix.out.at[batch.place(m), column], total, mask=real)


def cut(rows: int, heights: int, chunks: int) -> tuple[int, int, int]:
    """How the work is cut. It changes only the time of a launch.

    Args:
        rows: rows of activations of a program.
        heights: rows of all weights together.
        chunks: chunks of 32 lane loads in a weight row.

    Returns:
        Weight rows of a program, chunks that it loads at a time, and the maximum rows of activations of a batch.
    """
    owned, together = 4, batches.rows_of(rows)
    while owned > 1 and (owned * together > MAX_SUMS or heights < owned * PROGRAMS):
        owned //= 2
    while together > 1 and heights * batches.count(rows, together) < owned * PROGRAMS:
        together = pl.cdiv(together, 2)
    # With one weight row and one activation row there are registers for twice the loads, and few programs, which need them.
    in_flight = 2 * MAX_LOADS if owned == together == 1 else MAX_LOADS
    return owned, min(chunks, max(in_flight // owned, 1)), together


def float_part(x: jax.Array, weights: Sequence[jax.Array], *, interpret: bool = False) -> Part:
    """`float_matmul` as a launch part. Its programs have one warp."""
    m, k = x.shape
    width = lane_values(weights[0].dtype)
    sizes = tuple(weight.shape[0] for weight in weights)
    rows, unroll, together = cut(m, sum(sizes), pl.cdiv(k // width, LANES))
    return Part(
        name="_".join(map(str, (NAME, *sizes, k))) + f"_m{m}",
        programs=batches.count(m, together) * sum(pl.cdiv(n, rows) for n in sizes),
        body=functools.partial(_body, sizes=sizes, rows=rows, unroll=unroll, together=together, interpret=interpret),
        inputs=(x.reshape(m, -1, width), *(weight.reshape(weight.shape[0], -1, width) for weight in weights)),
        outputs=tuple(jax.ShapeDtypeStruct((m, n), jnp.float32) for n in sizes),
        traffic=sum(sizes) * k * weights[0].dtype.itemsize,
    )


def float_matmul(x: jax.Array, weights: Sequence[jax.Array], *, interpret: bool = False) -> list[jax.Array]:
    """Multiply the same rows by one or several float weights in one launch.

    Args:
        x: float32 [M, K].
        weights: [N, K] each, all of one type: float16, bfloat16 or float32. K·(bytes of a value) is a multiple of 16.

    Returns:
        float32 [M, N] for each weight.
    """
    return launch([float_part(x, weights, interpret=interpret)], warps=1, interpret=interpret)[0]

"""Products of a few float32 rows and float16, bfloat16 or float32 weights. Each weight is read once for all rows.

Tensor cores multiply float16 weights, see `half_matmul`. With the other types a program works like one of the share-warp kernel:
it is one warp and owns a few weight rows. A lane owns 16 bytes of every 512 and adds each product with one fused multiply-add.
The lanes are summed once, at the end. Row m of any call has the same bits as the row alone. More than eight rows are multiplied
in batches, see `core.batches`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.core import arithmetic, batches, loads
from pallas_kernels.core.arithmetic import LANES
from pallas_kernels.core.launch import Part, launch
from pallas_kernels.linear import half_matmul
from pallas_kernels.linear.halves import FloatRows
from pallas_kernels.linear.matrices import in_passes, loaded_chunks, matrices, part_name, store_sums, traffic

LOAD_BYTES = 16
# Maximum 16-byte loads of a lane in flight, and maximum accumulators of a lane. More of them do not fit into registers.
MAX_LOADS = 8
MAX_SUMS = 16
# With fewer programs a GPU waits for loads: a program then has fewer weight rows, and fewer rows of activations.
PROGRAMS = 1024


def lane_values(dtype: Any) -> int:
    """Number of weights in the 16 bytes of a lane."""
    return LOAD_BYTES // jnp.dtype(dtype).itemsize


def _body(
    program: jax.Array, inputs: Sequence[Any], outputs: Sequence[Any],
    *, sizes: tuple[int, ...], rows: int, unroll: int, together: int, interpret: bool,
) -> None:  # fmt: skip
    x_ref, *weight_refs = inputs
    tokens, columns, width = x_ref.shape
    program, batch = batches.split(program, tokens, together)
    owned = matrices(program, weight_refs, outputs, sizes, rows)

    def one_pass(start: jax.Array, chunks: int, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out = list(sums)
        for place, real, weights in loaded_chunks(owned, start, chunks, (columns, width, rows), batch, interpret):
            for m in range(batch.size):
                x = loads.load(x_ref, batch.row(m), pl.ds(place, LANES), slice(None), real=real, width=width)
                for r, weight in enumerate(weights):
                    i = m * rows + r
                    out[i] = arithmetic.fma(weight.astype(jnp.float32), x, out[i], interpret=interpret)
        return tuple(out)

    sums = tuple(jnp.zeros((LANES, width), jnp.float32) for _ in range(batch.size * rows))
    sums = in_passes(pl.cdiv(columns, LANES), unroll, LANES, one_pass, sums)
    store_sums(owned, [jnp.sum(total, axis=-1) for total in sums], rows, batch, interpret)


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


def float_part(x: FloatRows, weights: Sequence[jax.Array], *, interpret: bool = False) -> Part:
    """`float_matmul` as a launch part. Its programs have one warp."""
    if weights[0].dtype == jnp.float16:
        return half_matmul.few_part(x.halves, weights, interpret=interpret)
    m, k = x.values.shape
    width = lane_values(weights[0].dtype)
    sizes = tuple(weight.shape[0] for weight in weights)
    rows, unroll, together = cut(m, sum(sizes), pl.cdiv(k // width, LANES))
    return Part(
        name=part_name(m, k, weights),
        programs=batches.count(m, together) * sum(pl.cdiv(n, rows) for n in sizes),
        body=functools.partial(_body, sizes=sizes, rows=rows, unroll=unroll, together=together, interpret=interpret),
        inputs=(x.values.reshape(m, -1, width), *(weight.reshape(weight.shape[0], -1, width) for weight in weights)),
        outputs=tuple(jax.ShapeDtypeStruct((m, n), jnp.float32) for n in sizes),
        traffic=traffic(weights),
    )


def apart(rows: int, weights: Sequence[jax.Array]) -> bool:
    """Whether the products of so many rows have programs of eight warps, and so a launch of their own."""
    return weights[0].dtype == jnp.float16 and half_matmul.for_many_rows(rows, weights)


def float_matmul(x: jax.Array | FloatRows, weights: Sequence[jax.Array], *, interpret: bool = False) -> list[jax.Array]:
    """Multiply the same rows by one or several float weights in one launch.

    Args:
        x: float32 [M, K], or with their halves.
        weights: [N, K] each, all of one type: float16, bfloat16 or float32. K·(bytes of a value) is a multiple of 16.

    Returns:
        float32 [M, N] for each weight.
    """
    given = x if isinstance(x, FloatRows) else FloatRows.of(x)
    if not apart(len(given.values), weights):
        return launch([float_part(given, weights, interpret=interpret)], warps=1, interpret=interpret)[0]
    part = half_matmul.many_part(given.halves, weights, interpret=interpret)
    return launch([part], warps=half_matmul.RESIDUES, interpret=interpret)[0][: len(weights)]

"""Dense products of a decode step for any lane format. Every weight is read once for all rows of the activations.

A program is one warp and owns a few rows of the matrix. Each accumulator belongs to one row of activations and one weight row, is
summed in the order of K, and then over the lanes. So row m of any call has the same bits as the row alone. More than eight rows
are multiplied in batches, see `core.batches`. Q8_0 has a kernel of its own, `q8_matmul`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.core import arithmetic, batches, loads
from pallas_kernels.core.launch import Part, launch
from pallas_kernels.formats import Quantized
from pallas_kernels.linear.activation import Activation
from pallas_kernels.linear.activation_k import ActivationK
from pallas_kernels.linear.lane_row import LaneRow, codebook, lane_format, zeros
from pallas_kernels.linear.lanes import Format

NAME = "lane_matmul"
# With fewer programs a device of a hundred multiprocessors has too few loads in flight.
PROGRAMS = 2048
# Rows of the matrix that share the activations.
MAX_TILE = 2


def _body(
    program: jax.Array, inputs: Sequence[Any], outputs: Sequence[Any],
    *, format: Format, columns: int, n: int, groups: int, rows: int, planes: int, interpret: bool,
) -> None:  # fmt: skip
    table_ref, *refs = inputs
    x_refs, matrix = refs[:-planes], refs[-planes:]
    [out_ref], tiles = outputs, pl.cdiv(n, rows)
    program, batch = batches.split(program, out_ref.shape[0])
    group, first = program // tiles, program % tiles * rows
    real = [first + r < n if n % rows else None for r in range(rows)]
    weights = [(matrix, (0, group * n + first + r), real[r]) for r in range(rows)]
    x_rows = [batch.row(m) * groups + group for m in range(batch.size)]
    row = LaneRow(format, x_refs, table_ref, columns, interpret, once=batch.only)
    sums = row.add(x_rows, weights, zeros(len(x_rows) * rows))
    total, place, owner = arithmetic.sum_lanes(sums, loads.numbers(), interpret=interpret)
    m, column = place // rows, first + place % rows
    # The index of a lane without a value is past the end; interpret mode drops it.
    there = loads.all_of(owner, column < n, batch.real(m))
    assert there is not None
    plt.store(out_ref.at[batch.place(m), jnp.where(there, group * n + column, out_ref.shape[1])], total, mask=there)


def lane_part(
    x: Activation | ActivationK, weight: Quantized, *, groups: int = 1, tile: int | None = None, interpret: bool = False
) -> Part:
    """`lane_matmul` as a launch part. Its programs have one warp."""
    (n, k), planes, format = weight.shape, jax.tree.leaves(weight), lane_format(type(weight), interpret)
    if isinstance(x, Activation):
        # A row for each group.
        x = Activation(x.quants.reshape(-1, 1, *x.quants.shape[2:]), x.scales.reshape(-1, 1, x.scales.shape[-1]))
    m, n, name = x.scales.shape[0] // groups, n // groups, type(weight).__name__.lower()
    rows = tile or (MAX_TILE if groups * n >= MAX_TILE * PROGRAMS else 1)
    numbers: dict[str, Any] = {"columns": k // format.width, "n": n, "groups": groups, "rows": rows, "planes": len(planes)}
    return Part(
        name="_".join(map(str, (NAME, name, *([groups] if groups > 1 else []), n, k))) + f"_m{m}",
        programs=batches.count(m) * groups * pl.cdiv(n, rows),
        body=functools.partial(_body, format=format, interpret=interpret, **numbers),
        # The formats index a stack of matrices; this one has a single matrix.
        inputs=(codebook(type(weight)), *jax.tree.leaves(x), *(plane[None] for plane in planes)),
        outputs=(jax.ShapeDtypeStruct((m, weight.shape[0]), jnp.float32),),
        traffic=math.prod(weight.shape) // weight.BLOCK * weight.DEVICE_BYTES,
    )


def lane_matmul(
    x: Activation | ActivationK, weight: Quantized, *, groups: int = 1, tile: int | None = None, interpret: bool = False
) -> jax.Array:
    """Multiply the same activations by a weight of a lane format, in one launch.

    Args:
        x: M rows of `groups` times K values, quantised by `quantize_for` for the weight's format and these groups.
        weight: [groups·N, K].
        groups: static; group c of the activations is multiplied by rows c·N .. (c+1)·N − 1 of the weight.
        tile: static, rows of the matrix per program; the result does not depend on it.
        interpret: static; run in interpret mode, without a GPU.

    Returns:
        float32 [M, groups·N].

    Raises:
        KeyError: the weight's format has no kernel.

    Source: the meaning is `pallas_kernels.linear.meaning.quantized_dot`.
    """
    [[y]] = launch([lane_part(x, weight, groups=groups, tile=tile, interpret=interpret)], warps=1, interpret=interpret)
    return y

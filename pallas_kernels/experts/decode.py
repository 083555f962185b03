"""Expert products of a decode step: each row with its chosen experts, whose numbers the kernel reads.

One launch computes gate, up and the clamped SwiGLU, another down and the sum over a row's experts. A program is one warp, owns a
few rows of one matrix (or the same rows of gate and up) and reads them once. Its result depends only on its row of activations
and its expert, and sums have a fixed order. So a row has the same bits with any other rows. Rows with the same expert find its
weights in the cache.

Source: the routed-expert kernels of ds4; arithmetic as gguf.md §6.
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

from pallas_kernels.core import arithmetic, loads
from pallas_kernels.core.arithmetic import LANES
from pallas_kernels.core.launch import Part, launch
from pallas_kernels.experts import many_rows, neighbours
from pallas_kernels.experts.swiglu import clamped
from pallas_kernels.formats import Quantized
from pallas_kernels.linear.activation import Activation
from pallas_kernels.linear.activation_k import ActivationK
from pallas_kernels.linear.lane_row import LaneRow, Turn, codebook, lane_format, quantize_for, zeros
from pallas_kernels.linear.lanes import Format

DOWN = "expert_down"


@dataclasses.dataclass(frozen=True)
class ExpertTile:
    """How the work is cut. It changes only the time of a launch.

    Attributes:
        gate_up: rows of gate and of up per program, multiplied one after the other by the same activations.
        down: rows of down per program, multiplied together by the activations of one expert after the other.
        ahead: parts of these rows, 32 lanes each, that a program loads before it needs them.
    """

    gate_up: int = 2
    down: int = 2
    ahead: int = 1

    @classmethod
    def of(cls, interpret: bool) -> ExpertTile:
        """The tile of a launch. In interpret mode a program with few rows compiles in less time."""
        return cls(gate_up=1, down=1) if interpret else cls()


def _split(refs: Sequence[Any], *counts: int) -> list[Sequence[Any]]:
    parts, first = [], 0
    for count in counts:
        parts.append(refs[first : first + count])
        first += count
    return parts


def _gate_up_body(
    program: jax.Array, inputs: Sequence[Any], outputs: Sequence[Any],
    *, format: Format, columns: int, n: int, active: int, size: int, rows: int, ahead: int, limit: float, planes: int,
    interpret: bool,
) -> None:  # fmt: skip
    chosen_ref, share_ref, table_ref, *refs = inputs
    x_refs, gate, up = _split(refs, len(refs) - 2 * planes, planes, planes)
    [out_ref] = outputs
    pair, tile = neighbours.place(program, chosen_ref.shape[0], size)
    first, expert = tile * rows, chosen_ref[pair]
    turns, x_row = [], pair // active
    for r in range(rows):
        real = first + r < n if n % rows else None
        turns.append(Turn(x_row, [(matrix, (expert, first + r), real) for matrix in (gate, up)], (2 * r, 2 * r + 1)))
    accs = LaneRow(format, x_refs, table_ref, columns, interpret).add_in_turn(turns, zeros(2 * rows), ahead)
    # The sums of gate and up of one row are in neighbouring groups of lanes.
    total, place, owner = arithmetic.sum_lanes(accs, loads.numbers(), interpret=interpret)
    other = arithmetic.exchange(total, LANES // (2 * rows), interpret=interpret)
    hidden = clamped(total, other, limit) * share_ref[pair]
    column = first + place // 2
    real = loads.all_of(owner, place % 2 == 0, column < n)
    assert real is not None
    plt.store(out_ref.at[pair, jnp.where(real, column, n)], hidden, mask=real)


def _down_body(
    program: jax.Array, inputs: Sequence[Any], outputs: Sequence[Any],
    *, format: Format, columns: int, n: int, active: int, size: int, rows: int, ahead: int, planes: int, interpret: bool,
) -> None:  # fmt: skip
    chosen_ref, table_ref, *refs = inputs
    x_refs, down = _split(refs, len(refs) - planes, planes)
    [out_ref] = outputs
    token, tile = neighbours.place(program, chosen_ref.shape[0] // active, size)
    first, row = tile * rows, LaneRow(format, x_refs, table_ref, columns, interpret)
    pairs = [token * active + k for k in range(active)]
    experts = [chosen_ref[pair] for pair in pairs]
    real = [first + r < n if n % rows else None for r in range(rows)]
    turns = [
        Turn(pair, [(down, (expert, first + r), there) for r, there in enumerate(real)], range(rows))
        for pair, expert in zip(pairs, experts, strict=True)
    ]
    accs = row.add_in_turn(turns, zeros(rows), ahead)
    total, place, owner = arithmetic.sum_lanes(accs, loads.numbers(), interpret=interpret)
    column = first + place
    stored = loads.all_of(owner, column < n)
    assert stored is not None
    plt.store(out_ref.at[token, jnp.where(stored, column, n)], total, mask=stored)


def _piece(tokens: int, tiles: int, rows: int, weight: Quantized) -> int:
    """Tiles that the programs of one row take one after the other: all for few rows, which hardly share experts."""
    row_bytes = weight.shape[-1] // weight.BLOCK * weight.DEVICE_BYTES
    return neighbours.piece(tiles, rows * row_bytes) if tokens >= many_rows.MANY_ROWS else tiles


def gate_up_part(
    x: Activation | ActivationK, chosen: jax.Array, share: jax.Array, gate: Quantized, up: Quantized, *, limit: float,
    tile: ExpertTile | None = None, interpret: bool = False,
) -> Part:  # fmt: skip
    """silu(min(gate, limit)) · clip(up, ±limit) · share for each row and each of its experts.

    Args:
        x: M rows of D values, quantised by `quantize_for` for the format of `gate`.
        chosen: int32 [M, K], expert numbers from 0 to E − 1.
        share: float32 [M, K], their routing weights.
        gate, up: stacks [E, F, D] of the same format.
        limit: static, of the SwiGLU.
        tile: static, how the work is cut; by default `ExpertTile.of(interpret)`. The result does not depend on it.

    Returns:
        A launch part with one result float32 [M·K, F]. Its programs have one warp.
    """
    (_, n, k), (tokens, active), planes = gate.shape, chosen.shape, jax.tree.leaves(gate)
    tile, format = tile or ExpertTile.of(interpret), lane_format(type(gate), interpret)
    rows, columns = tile.gate_up, k // format.width
    tiles = pl.cdiv(n, rows)
    size = _piece(tokens, tiles, rows, gate)
    sizes: dict[str, Any] = {"columns": columns, "n": n, "active": active, "size": size, "planes": len(planes)}
    return Part(
        name=f"{many_rows.GATE_UP}_{type(gate).__name__.lower()}_m{tokens}",
        programs=tiles * tokens * active,
        body=functools.partial(
            _gate_up_body, format=format, limit=limit, rows=rows, ahead=tile.ahead, interpret=interpret, **sizes
        ),
        inputs=(chosen.reshape(-1), share.reshape(-1), codebook(type(gate)), *jax.tree.leaves(x), *planes, *jax.tree.leaves(up)),
        outputs=(jax.ShapeDtypeStruct((tokens * active, n), jnp.float32),),
        # Counts every read, also if several rows choose the same expert and find it in the cache.
        traffic=2 * tokens * active * n * k // gate.BLOCK * gate.DEVICE_BYTES,
    )


def gate_up(
    x: Activation | ActivationK, chosen: jax.Array, share: jax.Array, gate: Quantized, up: Quantized, *, limit: float,
    tile: ExpertTile | None = None, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """What `gate_up_part` computes, in a launch of its own, by the faster kernel for so many rows: float32 [M·K, F]."""
    how: dict[str, Any] = {"limit": limit, "interpret": interpret}
    if many_rows.serves(len(chosen), type(gate), gate.shape):
        [[hidden]] = launch([many_rows.part(x, chosen, share, gate, up, **how)], warps=many_rows.WARPS, interpret=interpret)
    else:
        [[hidden]] = launch([gate_up_part(x, chosen, share, gate, up, tile=tile, **how)], warps=1, interpret=interpret)
    return hidden


def down_part(
    x: Activation | ActivationK, chosen: jax.Array, weight: Quantized, *, tile: ExpertTile | None = None, interpret: bool = False
) -> Part:
    """Multiply hidden values by the down matrices and sum over each row's experts, in the order of `chosen`.

    Args:
        x: M·K rows of F values, already multiplied by the routing weights, quantised by `quantize_for` for `weight`'s format.
        chosen: int32 [M, K], expert numbers.
        weight: stack [E, D, F].
        tile: as for `gate_up_part`.

    Returns:
        A launch part with one result float32 [M, D]. Its programs have one warp.
    """
    (_, n, k), (tokens, active), planes = weight.shape, chosen.shape, jax.tree.leaves(weight)
    tile, format = tile or ExpertTile.of(interpret), lane_format(type(weight), interpret)
    rows, columns = tile.down, k // format.width
    tiles = pl.cdiv(n, rows)
    size = _piece(tokens, tiles, rows, weight)
    sizes: dict[str, Any] = {"columns": columns, "n": n, "active": active, "size": size, "planes": len(planes)}
    return Part(
        name=f"{DOWN}_{type(weight).__name__.lower()}_m{tokens}",
        programs=tiles * tokens,
        body=functools.partial(_down_body, format=format, rows=rows, ahead=tile.ahead, interpret=interpret, **sizes),
        inputs=(chosen.reshape(-1), codebook(type(weight)), *jax.tree.leaves(x), *planes),
        outputs=(jax.ShapeDtypeStruct((tokens, n), jnp.float32),),
        traffic=tokens * active * n * k // weight.BLOCK * weight.DEVICE_BYTES,
    )


def experts(
    x: jax.Array, chosen: jax.Array, share: jax.Array, gate: Quantized, up: Quantized, weight: Quantized, *, limit: float,
    tile: ExpertTile | None = None, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """Weighted sum of the chosen experts' outputs, for M rows of a decode step. Four launches: two quantisations, two products.

    Args:
        x: float32 [M, D]; D and F are multiples of the formats' block size.
        chosen: int32 [M, K], expert numbers from 0 to E − 1; they are not checked.
        share: float32 [M, K], routing weights, applied before the down product.
        gate, up: stacks [E, F, D] of the same format.
        weight: the down stack [E, D, F] of any format.
        limit: static; the gate is clamped to at most `limit`, up to ±limit.
        tile: static, how the work is cut; by default `ExpertTile.of(interpret)`. The result does not depend on it.
        interpret: static; run in interpret mode, without a GPU.

    Returns:
        float32 [M, D].

    Raises:
        KeyError: a stack has a format without an expert kernel.

    Source: gguf.md §6; the meaning is `pallas_kernels.experts.meaning.gathered`.
    """
    quantized = quantize_for(x, type(gate), interpret=interpret)
    hidden = gate_up(quantized, chosen, share, gate, up, limit=limit, tile=tile, interpret=interpret)
    quantized = quantize_for(hidden, type(weight), interpret=interpret)
    [[y]] = launch([down_part(quantized, chosen, weight, tile=tile, interpret=interpret)], warps=1, interpret=interpret)
    return y

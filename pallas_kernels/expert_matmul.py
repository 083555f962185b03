"""Products of each row with the experts that it chose, the experts found inside the kernel.

One launch for gate and up with the clamped SwiGLU between them, one for down and the sum over a row's experts. A program is one
warp, owns a few rows of one matrix (or the same rows of gate and up) and reads them once. What a program computes depends on its
row of activations and its expert alone, so that a row has the same bits in any company; sums have a fixed order, and several rows
with the same expert find its weights in the cache.

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

from pallas_kernels import activation, arithmetic, lanes
from pallas_kernels.activation import Activation
from pallas_kernels.activation_k import ActivationK, quantize_k
from pallas_kernels.arithmetic import LANES
from pallas_kernels.bundle import Part, launch
from pallas_kernels.expert_lanes import OF, Format, Loaded, Place
from pallas_kernels.formats import BLOCK, Quantized
from pallas_kernels.formats.iq2_xxs import selectors

GATE_UP, DOWN = "expert_gate_up", "expert_down"


@dataclasses.dataclass(frozen=True)
class ExpertTile:
    """Rows of a matrix that a program owns; it decides how long a launch takes and nothing else.

    Measured on an H100: two rows of down share the activations; of gate and up, whose programs own a row of each, a second
    pair pays once several rows of the step keep the device busy.
    """

    gate_up: int = 1
    down: int = 2

    @classmethod
    def of(cls, tokens: int) -> ExpertTile:
        """The tile for so many rows of a step."""
        return cls(gate_up=1 if tokens == 1 else 2)


def quantize_for(x: jax.Array, weight: type[Quantized], *, interpret: bool = False) -> Activation | ActivationK:
    """Rows float32 [M, K] in the blocks and the order of an expert format, one launch."""
    if weight.BLOCK == BLOCK:
        return activation.quantize(x, interpret=interpret)
    return quantize_k(x, weight, interpret=interpret)


@dataclasses.dataclass(frozen=True)
class _Row:
    """One row of activations times rows of matrices of one format.

    Attributes:
        format: how a lane multiplies.
        x, table: references of the activations and of the format's table.
        columns: lanes that a weight row has.
    """

    format: Format
    x: Sequence[Any]
    table: Any
    columns: int
    interpret: bool

    def add(self, x_row: jax.Array, weights: Sequence[tuple[Sequence[Any], tuple[Any, ...], jax.Array | None]], accs: Any) -> Any:
        """Accumulators with the products added: one float32 [32] for each (references, index, whether it is there)."""

        def chunk(first: jax.Array, accs: Any) -> Any:
            inside = first + lanes.numbers() < self.columns if self.columns % LANES else None
            loaded: list[Loaded] = [
                self.format.weights(refs, Place(index, first, lanes.all_of(inside, real))) for refs, index, real in weights
            ]
            x = self.format.activations(self.x, Place((x_row,), first, inside))
            if not self.interpret:
                # As in the share-warp kernel: all loads are on their way before the first product.
                plt.debug_barrier()
            found = [self.format.looked_up(w, self.table) for w in loaded]
            return tuple(self.format.add(w, x, acc) for w, acc in zip(found, accs, strict=True))

        chunks = pl.cdiv(self.columns, LANES)
        if chunks == 1:
            return chunk(lanes.value(0), accs)
        return jax.lax.fori_loop(0, chunks, lambda i, accs: chunk(i * LANES, accs), accs)


def _zeros(count: int) -> tuple[jax.Array, ...]:
    return tuple(jnp.zeros(LANES, jnp.float32) for _ in range(count))


def _split(refs: Sequence[Any], *counts: int) -> list[Sequence[Any]]:
    parts, first = [], 0
    for count in counts:
        parts.append(refs[first : first + count])
        first += count
    return parts


def _gate_up_body(
    program: jax.Array, inputs: Sequence[Any], outputs: Sequence[Any],
    *, format: Format, columns: int, n: int, active: int, rows: int, limit: float, planes: int, interpret: bool,
) -> None:  # fmt: skip
    chosen_ref, share_ref, table_ref, *refs = inputs
    x_refs, gate, up = _split(refs, len(refs) - 2 * planes, planes, planes)
    [out_ref], tiles = outputs, pl.cdiv(n, rows)
    first, pair = program % tiles * rows, program // tiles
    expert = chosen_ref[pair]
    weights = []
    for r in range(rows):
        real = first + r < n if n % rows else None
        weights += [(matrix, (expert, first + r), real) for matrix in (gate, up)]
    row = _Row(format, x_refs, table_ref, columns, interpret)
    accs = row.add(pair // active, weights, _zeros(2 * rows))
    # Sums of gate and up of one row lie in neighbouring groups of lanes.
    total, place, owner = arithmetic.sum_lanes(accs, lanes.numbers(), interpret=interpret)
    other = arithmetic.exchange(total, LANES // (2 * rows), interpret=interpret)
    gate_value = jnp.minimum(total, limit)
    hidden = gate_value / (1.0 + jnp.exp(-gate_value)) * jnp.clip(other, -limit, limit) * share_ref[pair]
    column = first + place // 2
    real = lanes.all_of(owner, place % 2 == 0, column < n)
    assert real is not None
    plt.store(out_ref.at[pair, jnp.where(real, column, n)], hidden, mask=real)


def _down_body(
    program: jax.Array, inputs: Sequence[Any], outputs: Sequence[Any],
    *, format: Format, columns: int, n: int, active: int, rows: int, planes: int, interpret: bool,
) -> None:  # fmt: skip
    chosen_ref, table_ref, *refs = inputs
    x_refs, down = _split(refs, len(refs) - planes, planes)
    [out_ref], tiles = outputs, pl.cdiv(n, rows)
    first, token = program % tiles * rows, program // tiles
    row = _Row(format, x_refs, table_ref, columns, interpret)
    accs = _zeros(rows)
    for k in range(active):
        pair = token * active + k
        expert = chosen_ref[pair]
        weights = [(down, (expert, first + r), first + r < n if n % rows else None) for r in range(rows)]
        accs = row.add(pair, weights, accs)
    total, place, owner = arithmetic.sum_lanes(accs, lanes.numbers(), interpret=interpret)
    column = first + place
    real = lanes.all_of(owner, column < n)
    assert real is not None
    plt.store(out_ref.at[token, jnp.where(real, column, n)], total, mask=real)


@functools.cache
def _format(format: type[Quantized], interpret: bool) -> Format:
    """One object for each, by which launches of the same shapes are known to be the same."""
    return OF[format](interpret)


def _table() -> jax.Array:
    """The patterns of IQ2_XXS; the other formats do not read it."""
    return jnp.asarray(selectors())


def gate_up_part(
    x: Activation | ActivationK, chosen: jax.Array, share: jax.Array, gate: Quantized, up: Quantized, *, limit: float,
    tile: ExpertTile | None = None, interpret: bool = False,
) -> Part:  # fmt: skip
    """silu(min(gate, limit)) · clip(up, ±limit) · share for each row and expert that it chose.

    Args:
        x: M rows of D values, quantised by `quantize_for` the format of `gate`.
        chosen: int32 [M, K], experts.
        share: float32 [M, K], their routing weights.
        gate, up: stacks [E, F, D] of the same format.

    Returns:
        a part of a launch of one-warp programs, with one result float32 [M·K, F].
    """
    (_, n, k), (tokens, active), planes = gate.shape, chosen.shape, jax.tree.leaves(gate)
    rows, format = (tile or ExpertTile.of(tokens)).gate_up, _format(type(gate), interpret)
    numbers: dict[str, Any] = {"columns": k // format.width, "n": n, "active": active, "rows": rows, "planes": len(planes)}
    return Part(
        name=f"{GATE_UP}_{type(gate).__name__.lower()}_m{tokens}",
        programs=pl.cdiv(n, rows) * tokens * active,
        body=functools.partial(_gate_up_body, format=format, limit=limit, interpret=interpret, **numbers),
        inputs=(chosen.reshape(-1), share.reshape(-1), _table(), *jax.tree.leaves(x), *planes, *jax.tree.leaves(up)),
        outputs=(jax.ShapeDtypeStruct((tokens * active, n), jnp.float32),),
        # Rows that choose the same expert find it in the cache; counted is what they read from there too.
        traffic=2 * tokens * active * n * k // gate.BLOCK * gate.DEVICE_BYTES,
    )


def down_part(
    x: Activation | ActivationK, chosen: jax.Array, weight: Quantized, *, tile: ExpertTile | None = None, interpret: bool = False
) -> Part:
    """Sum over each row's experts of their products with the row's hidden values, in the order of `chosen`.

    Args:
        x: M·K rows of F values, the row's own weight on them, quantised by `quantize_for` the format of `weight`.
        chosen: int32 [M, K].
        weight: stack [E, D, F].

    Returns:
        a part of a launch of one-warp programs, with one result float32 [M, D].
    """
    (_, n, k), (tokens, active), planes = weight.shape, chosen.shape, jax.tree.leaves(weight)
    rows, format = (tile or ExpertTile.of(tokens)).down, _format(type(weight), interpret)
    numbers: dict[str, Any] = {"columns": k // format.width, "n": n, "active": active, "rows": rows, "planes": len(planes)}
    return Part(
        name=f"{DOWN}_{type(weight).__name__.lower()}_m{tokens}",
        programs=pl.cdiv(n, rows) * tokens,
        body=functools.partial(_down_body, format=format, interpret=interpret, **numbers),
        inputs=(chosen.reshape(-1), _table(), *jax.tree.leaves(x), *planes),
        outputs=(jax.ShapeDtypeStruct((tokens, n), jnp.float32),),
        traffic=tokens * active * n * k // weight.BLOCK * weight.DEVICE_BYTES,
    )


def experts(
    x: jax.Array, chosen: jax.Array, share: jax.Array, gate: Quantized, up: Quantized, weight: Quantized, *, limit: float,
    tile: ExpertTile | None = None, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """Weighted sum of the chosen experts' outputs: two products and the two quantisations before them, four launches.

    Args:
        x: float32 [M, D]; chosen, share: [M, K]; gate, up: [E, F, D]; weight: [E, D, F].

    Returns:
        float32 [M, D].
    """
    quantized = quantize_for(x, type(gate), interpret=interpret)
    part = gate_up_part(quantized, chosen, share, gate, up, limit=limit, tile=tile, interpret=interpret)
    [[hidden]] = launch([part], warps=1, interpret=interpret)
    quantized = quantize_for(hidden, type(weight), interpret=interpret)
    [[y]] = launch([down_part(quantized, chosen, weight, tile=tile, interpret=interpret)], warps=1, interpret=interpret)
    return y

"""Expert products of a prefill: rows are grouped by expert and multiplied on the tensor cores in bfloat16.

The weights of some experts at a time are dequantised. Then one launch computes gate, up and the clamped SwiGLU, and another
down. A program owns a tile of rows and a tile of a matrix's columns and sums in float32 in the order of K. So the result of a row
depends only on the row and the expert. Each result is stored at the index of its pair, and a row's experts are summed in the
order of the choice.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.experts.grouping import Plan, max_tiles, plan
from pallas_kernels.experts.swiglu import clamped
from pallas_kernels.formats import Quantized
from pallas_kernels.linear.cut import Cut, gathered, rows_of
from pallas_kernels.linear.dequantise import dequantise

GATE_UP, DOWN = "grouped_gate_up", "grouped_down"
# Values of one stack that are dequantised at a time: 32 experts of V4-Flash, 0.5 GB.
MAX_VALUES = 1 << 28
# Names in JAX of devices with at least 160 KB of shared memory per program.
LARGE_DEVICES = ("A100", "H100", "H200", "GH200", "H800", "H20", "B200", "B300")


@dataclasses.dataclass(frozen=True)
class GroupedTile:
    """Size of a program of a grouped product. It changes only the time of a launch.

    Attributes:
        rows: slots of a tile of the plan.
        columns: rows of the weight, which are columns of the product.
        depth: values of K per iteration.
        warps: warps of a program.
        stages: loads of `depth` values in flight.
    """

    rows: int = 128
    columns: int = 128
    depth: int = 64
    warps: int = 8
    stages: int = 3

    @classmethod
    def of(cls, pairs: int, experts: int, device_kind: str) -> GroupedTile:
        """The tile for `pairs` of rows and experts. If an expert has few rows, a smaller tile has fewer empty slots.

        Devices that are not in `LARGE_DEVICES` get tiles that fit into 99 KB of shared memory.
        """
        if not any(name in device_kind for name in LARGE_DEVICES):
            return cls(rows=64, columns=64, warps=4)
        return cls() if pairs >= 64 * experts else cls(rows=64, warps=4)

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory of gate and up, the larger of the two products."""
        return 2 * self.stages * self.depth * (self.rows + 2 * self.columns)


def fits(dim: int, hidden: int) -> bool:
    """Whether D = `dim` and F = `hidden` of the experts are multiples of the tile sizes."""
    tile = GroupedTile()
    return all(width % max(tile.columns, tile.depth) == 0 for width in (dim, hidden))


def _product(x: jax.Array, w: jax.Array, acc: jax.Array) -> jax.Array:
    """acc + x Wᵀ of bfloat16 tiles. The precision is explicit because the program's default may differ."""
    contract = (((1,), (1,)), ((), ()))
    return acc + jax.lax.dot_general(x, w, contract, precision=jax.lax.Precision.DEFAULT, preferred_element_type=jnp.float32)


def _place(span_ref: Any, columns: int, tile: GroupedTile) -> tuple[jax.Array, jax.Array]:
    """A program's tile of the plan and its first column. Programs with the same weights are close to each other."""
    program, across = pl.program_id(0), columns // tile.columns
    down = jax.lax.div(program, jnp.int32(across))
    return span_ref[1] + down, (program - down * across) * tile.columns


def _rectangle(rows: jax.Array, first: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """Indices [R, width] of `width` columns from `first` in rows int32 [R]."""
    shape = (rows.shape[0], width)
    return jnp.broadcast_to(rows[:, None], shape), first + jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def _gate_up_kernel(
    span_ref: Any, expert_ref: Any, pair_ref: Any, share_ref: Any, x_ref: Any, gate_ref: Any, up_ref: Any, into_ref: Any,
    out_ref: Any, *, active: int, limit: float, tile: GroupedTile,
) -> None:  # fmt: skip
    n, k = gate_ref.shape[1:]
    number, first = _place(span_ref, n, tile)

    @pl.when(number < span_ref[2])
    def _() -> None:
        matrix = expert_ref[number] - span_ref[0]
        slots, columns = pl.ds(number * tile.rows, tile.rows), pl.ds(first, tile.columns)
        pair = plt.load(pair_ref.at[slots])
        # Empty slots read the first row; nothing reads their result.
        known = jnp.maximum(pair, 0)
        row = jax.lax.div(known, jnp.full_like(known, active))

        def step(i: jax.Array, accs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            depth = pl.ds(i * tile.depth, tile.depth)
            x = plt.load(x_ref.at[_rectangle(row, i * tile.depth, tile.depth)])
            gate, up = (plt.load(ref.at[matrix, columns, depth]) for ref in (gate_ref, up_ref))
            return _product(x, gate, accs[0]), _product(x, up, accs[1])

        zeros = jnp.zeros((tile.rows, tile.columns), jnp.float32)
        gate, up = jax.lax.fori_loop(0, k // tile.depth, step, (zeros, zeros))
        hidden = clamped(gate, up, limit) * plt.load(share_ref.at[known])[:, None]
        plt.store(out_ref.at[slots, columns], hidden.astype(jnp.bfloat16))


def _down_kernel(
    span_ref: Any, expert_ref: Any, pair_ref: Any, hidden_ref: Any, weight_ref: Any, into_ref: Any, out_ref: Any,
    *, tile: GroupedTile,
) -> None:  # fmt: skip
    n, k = weight_ref.shape[1:]
    number, first = _place(span_ref, n, tile)

    @pl.when(number < span_ref[2])
    def _() -> None:
        matrix = expert_ref[number] - span_ref[0]
        slots, columns = pl.ds(number * tile.rows, tile.rows), pl.ds(first, tile.columns)

        def step(i: jax.Array, acc: jax.Array) -> jax.Array:
            depth = pl.ds(i * tile.depth, tile.depth)
            return _product(plt.load(hidden_ref.at[slots, depth]), plt.load(weight_ref.at[matrix, columns, depth]), acc)

        zeros = jnp.zeros((tile.rows, tile.columns), jnp.float32)
        y = jax.lax.fori_loop(0, k // tile.depth, step, zeros)
        pair = plt.load(pair_ref.at[slots])
        real = pair >= 0
        # The index of an empty slot is past the end; interpret mode drops its values.
        place = jnp.where(real, pair, out_ref.shape[0])
        plt.store(out_ref.at[_rectangle(place, first, tile.columns)], y, mask=jnp.broadcast_to(real[:, None], y.shape))


def _launch(kernel: Callable[..., None], name: str, inputs: tuple[jax.Array, ...], into: jax.Array, tiles: int, columns: int,
            tile: GroupedTile, interpret: bool) -> jax.Array:  # fmt: skip
    """Run a kernel that updates `into` in place."""
    made: jax.Array = pl.pallas_call(
        functools.partial(kernel, tile=tile),
        out_shape=jax.ShapeDtypeStruct(into.shape, into.dtype),
        grid=(tiles * (columns // tile.columns),),
        input_output_aliases={len(inputs): 0},
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=name,
    )(*inputs, into)
    return made


def span_of(groups: Plan, first: jax.Array, count: int) -> jax.Array:
    """Tiles of `count` experts from `first`, int32 [3]: first expert, first tile, and the tile after the last."""
    return jnp.stack([first, groups.first_tile[first], groups.first_tile[first + count]])


def gate_up(
    x: jax.Array, share: jax.Array, groups: Plan, span: jax.Array, gate: jax.Array, up: jax.Array, into: jax.Array,
    *, limit: float, tile: GroupedTile, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """silu(min(gate, limit)) · clip(up, ±limit) · share for each slot of the experts of `span`.

    Args:
        x: bfloat16 [T, D].
        share: float32 [T, K], routing weights.
        groups: a plan with `tile.rows` slots per tile.
        span: int32 [3], `span_of` the experts in gate and up.
        gate, up: bfloat16 [count, F, D].
        into: bfloat16 [slots, F]; the experts' tiles are written in place.

    Returns:
        `into` with the experts' tiles.
    """
    (count, n, _), active = gate.shape, share.shape[1]
    tiles = min(groups.expert.shape[0], max_tiles(share.size, count, tile.rows))
    kernel = functools.partial(_gate_up_kernel, active=active, limit=limit)
    inputs = (span, groups.expert, groups.pair, share.reshape(-1), x, gate, up)
    return _launch(kernel, GATE_UP, inputs, into, tiles, n, tile, interpret)


def down(
    hidden: jax.Array, groups: Plan, span: jax.Array, weight: jax.Array, into: jax.Array,
    *, tile: GroupedTile, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """Multiply hidden values by the down matrices of the experts of `span`.

    Args:
        hidden: bfloat16 [slots, F].
        groups, span: as for `gate_up`.
        weight: bfloat16 [count, D, F].
        into: float32 [T·K, D]; the rows of the experts' pairs are written in place.

    Returns:
        `into` with the experts' pairs.
    """
    count, n, _ = weight.shape
    tiles = min(groups.expert.shape[0], max_tiles(into.shape[0], count, tile.rows))
    return _launch(_down_kernel, DOWN, (span, groups.expert, groups.pair, hidden, weight), into, tiles, n, tile, interpret)


def experts_per_pass(experts: int, n: int, k: int) -> int:
    """Experts that are dequantised at a time: the largest divisor of `experts` within `MAX_VALUES`, or 1."""
    return next(count for count in range(experts, 0, -1) if experts % count == 0 and (count * n * k <= MAX_VALUES or count == 1))


def experts(
    x: jax.Array, chosen: jax.Array, share: jax.Array, gate: Quantized | Cut, up: Quantized | Cut, weight: Quantized | Cut,
    *, limit: float, tile: GroupedTile | None = None, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """Weighted sum of the chosen experts' outputs, for many rows.

    Weights are dequantised for some experts at a time. Activations, weights and hidden values are rounded to bfloat16; sums are
    float32.

    Args:
        x: float32 [T, D]; `fits(D, F)` must hold.
        chosen: int32 [T, K], expert numbers from 0 to E − 1; they are not checked.
        share: float32 [T, K], routing weights, applied before the down product.
        gate, up: stacks [E, F, D]; their formats may differ. Of cut ones the hidden values are gathered.
        weight: the down stack [E, D, F]. Of a cut one the outputs of this device's rows are made.
        limit: static; the gate is clamped to at most `limit`, up to ±limit.
        tile: static, how the work is cut; by default `GroupedTile.of` for this device.
        interpret: static; run in interpret mode, without a GPU.

    Returns:
        float32 [T, D].

    Raises:
        ValueError: T·K pairs and E experts need more than 31 bits, or `dequantise` does not support D and F.

    Source: the meaning is `pallas_kernels.experts.meaning.one_by_one`.
    """
    (total, n, k), (tokens, active) = rows_of(up).shape, chosen.shape
    own_gate, own_up, own_down = map(rows_of, (gate, up, weight))
    tile = tile or GroupedTile.of(chosen.size, total, jax.devices()[0].device_kind)
    groups, count, narrow = plan(chosen, total, tile.rows), experts_per_pass(total, n, k), x.astype(jnp.bfloat16)

    def into_hidden(first: jax.Array, hidden: jax.Array) -> jax.Array:
        span = span_of(groups, first, count)
        wide_gate, wide_up = (dequantise(stack, first, count, interpret=interpret) for stack in (own_gate, own_up))
        return gate_up(narrow, share, groups, span, wide_gate, wide_up, hidden, limit=limit, tile=tile, interpret=interpret)

    def into_y(first: jax.Array, hidden: jax.Array, y: jax.Array) -> jax.Array:
        wide_down = dequantise(own_down, first, count, interpret=interpret)
        return down(hidden, groups, span_of(groups, first, count), wide_down, y, tile=tile, interpret=interpret)

    def some(i: jax.Array, made: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden = into_hidden(i * count, made[0])
        # The barrier lets the down matrices reuse the memory of gate and up.
        hidden, ready = jax.lax.optimization_barrier((hidden, i * count))
        return hidden, into_y(ready, hidden, made[1])

    # Every row is written before it is read. Fill from x, not from a constant: XLA hoists constants, and 43 layers of them took
    # 28 GB.
    hidden = jnp.full((groups.pair.shape[0], n), narrow[0, 0])
    y = jnp.full((chosen.size, own_down.shape[1]), x[0, 0])
    if isinstance(up, Cut):
        # The hidden values of all experts are gathered at once, so that there is one exchange.
        hidden = jax.lax.fori_loop(0, total // count, lambda i, hidden: into_hidden(i * count, hidden), hidden)
        hidden = gathered(hidden, up)
        y = jax.lax.fori_loop(0, total // count, lambda i, y: into_y(i * count, hidden, y), y)
    else:
        _, y = jax.lax.fori_loop(0, total // count, some, (hidden, y))
    return jnp.sum(y.reshape(tokens, active, -1), axis=1)

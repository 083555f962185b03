"""Gate and up of a decode step of many rows: each chosen expert's weights are read and decoded once for all rows that chose it.

Pairs of a row and an expert are ordered by expert. A program is one warp and owns a few rows of gate and up. It walks over
experts: it loads the rows, decodes them, multiplies them by the expert's first pair, and then by its other pairs, one after the
other. A pair's sums are those of `experts.decode`, in the same order, so it has the same bits. The down product adds a row's
experts in one chain of sums; it stays by row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.core import arithmetic, loads
from pallas_kernels.core.arithmetic import LANES
from pallas_kernels.core.launch import Part
from pallas_kernels.experts.swiglu import clamped
from pallas_kernels.formats import Quantized
from pallas_kernels.linear.activation import Activation
from pallas_kernels.linear.activation_k import ActivationK
from pallas_kernels.linear.lane_row import LaneRow, Sums, codebook, lane_format
from pallas_kernels.linear.lanes import Format

NAME, GROUPS = "expert_gate_up_grouped", "expert_groups"
# Pairs that a program of the grouping places.
PLACED = 32


@dataclasses.dataclass(frozen=True)
class GroupedTile:
    """How the work is cut. It changes only the time of a launch.

    Attributes:
        rows: rows of gate and of up per program, multiplied one after the other.
        ahead: of these rows, how many a program loads before it needs them.
        walk: places in the order of the pairs per program. Most of them begin another expert, the others take no time.
    """

    rows: int = 2
    ahead: int = 1
    walk: int = 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
    """Pairs of M rows and K experts in the order of the experts; row m and its choice k are pair m·K + k.

    Attributes:
        pair: int32 [M·K], the pair at each place; pairs of one expert are in order.
        count: int32 [M·K], number of the expert's pairs at the place of its first pair, 0 at the others.
    """

    pair: jax.Array
    count: jax.Array


def _groups_kernel(chosen_ref: Any, pair_ref: Any, count_ref: Any, *, pairs: int) -> None:
    other = jax.lax.broadcasted_iota(jnp.int32, (pl.next_power_of_2(pairs),), 0)
    mine = pl.program_id(0) * PLACED + jax.lax.broadcasted_iota(jnp.int32, (PLACED,), 0)
    expert = plt.load(chosen_ref.at[other], mask=other < pairs, other=0)
    own = plt.load(chosen_ref.at[mine], mask=mine < pairs, other=0)
    shape = (PLACED, other.shape[0])
    expert, other = (jnp.broadcast_to(x[None, :], shape) for x in (expert, other))
    own, number = (jnp.broadcast_to(x[:, None], shape) for x in (own, mine))
    same = (other < pairs) & (expert == own)

    def count(what: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(what, jnp.int32(1), jnp.int32(0)), axis=1)

    before = count(same & (other < number))
    # The place of a masked pair is past the end; interpret mode drops it.
    place = jnp.where(mine < pairs, before + count((other < pairs) & (expert < own)), pairs)
    plt.store(pair_ref.at[place], mine, mask=mine < pairs)
    plt.store(count_ref.at[place], jnp.where(before == 0, count(same), 0), mask=mine < pairs)


@functools.partial(jax.jit, static_argnames="interpret")
def by_expert(chosen: jax.Array, *, interpret: bool = False) -> Groups:
    """Order the pairs of rows and experts by expert, in one small launch.

    Args:
        chosen: int32 [M, K], expert numbers; a row may choose an expert twice.
    """
    pairs = chosen.size
    made = pl.pallas_call(
        functools.partial(_groups_kernel, pairs=pairs),
        out_shape=(jax.ShapeDtypeStruct((pairs,), jnp.int32),) * 2,
        grid=(pl.cdiv(pairs, PLACED),),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name=GROUPS,
    )(chosen.reshape(-1))
    return Groups(*made)


@dataclasses.dataclass(frozen=True)
class _Expert:
    """The work of a program on one expert.

    Attributes:
        pair, chosen, share: references.
        place, count: place of the expert's first pair, and number of its pairs.
        first, n: first row of the program, and rows of the matrices.
    """

    pair: Any
    chosen: Any
    share: Any
    out: Any
    place: jax.Array
    count: jax.Array
    first: jax.Array
    n: int
    active: int
    limit: float
    interpret: bool

    def run(self, lanes: LaneRow, matrices: Sequence[Sequence[Any]], rows: int, ahead: int) -> None:
        """Multiply the rows by all pairs."""
        leader = self.pair[self.place]
        expert = self.chosen[leader]
        real = [self.first + r < self.n if self.n % rows else None for r in range(rows)]
        turns = [[(matrix, (expert, self.first + r), real[r]) for matrix in matrices] for r in range(rows)]

        def others(r: int, multiply: Callable[[Any], Sums]) -> None:
            def one(i: jax.Array, carry: jax.Array) -> jax.Array:
                pair = self.pair[self.place + i]
                self.store(multiply(pair // self.active), pair, self.first + r)
                return carry

            jax.lax.fori_loop(1, self.count, one, loads.value(0))

        made = lanes.share_weights(turns, leader // self.active, others, ahead)
        self.store([total for sums in made for total in sums], leader, self.first)

    def store(self, sums: Sequence[jax.Array], pair: jax.Array, first: jax.Array) -> None:
        """Sum gate and up of some rows over the lanes and store the hidden values of a pair."""
        total, place, owner = arithmetic.sum_lanes(sums, loads.numbers(), interpret=self.interpret)
        # The sums of gate and up of one row are in neighbouring groups of lanes.
        other = arithmetic.exchange(total, LANES // len(sums), interpret=self.interpret)
        hidden = clamped(total, other, self.limit) * self.share[pair]
        column = first + place // 2
        real = loads.all_of(owner, place % 2 == 0, column < self.n)
        assert real is not None
        plt.store(self.out.at[pair, jnp.where(real, column, self.n)], hidden, mask=real)


def _body(
    program: jax.Array, inputs: Sequence[Any], outputs: Sequence[Any],
    *, format: Format, columns: int, n: int, active: int, slots: int, rows: int, ahead: int, limit: float, planes: int,
    interpret: bool,
) -> None:  # fmt: skip
    pair_ref, count_ref, chosen_ref, share_ref, table_ref, *refs = inputs
    x_refs, gate, up = refs[: -2 * planes], refs[-2 * planes : -planes], refs[-planes:]
    [out_ref], tiles, pairs = outputs, pl.cdiv(n, rows), pair_ref.shape[0]
    lanes = LaneRow(format, x_refs, table_ref, columns, interpret)
    first, slot = program % tiles * rows, program // tiles

    def visit(i: jax.Array, carry: jax.Array) -> jax.Array:
        place = slot + i * slots
        count = jnp.where(place < pairs, count_ref[jnp.minimum(place, pairs - 1)], 0)
        work = _Expert(pair_ref, chosen_ref, share_ref, out_ref, place, count, first, n, active, limit, interpret)
        pl.when(count > 0)(functools.partial(work.run, lanes, (gate, up), rows, ahead))
        return carry

    jax.lax.fori_loop(0, pl.cdiv(pairs, slots), visit, loads.value(0))


def grouped_gate_up_part(
    x: Activation | ActivationK, chosen: jax.Array, share: jax.Array, gate: Quantized, up: Quantized, *, limit: float,
    groups: Groups | None = None, tile: GroupedTile | None = None, interpret: bool = False,
) -> Part:  # fmt: skip
    """`experts.decode.gate_up_part`, with each expert's weights read once. Its results have the same bits.

    Args:
        x, chosen, share, gate, up, limit: as for `gate_up_part`.
        groups: the pairs by expert; by default `by_expert(chosen)`, which is a launch.
        tile: static, how the work is cut. The result does not depend on it.

    Returns:
        A launch part with one result float32 [M·K, F]. Its programs have one warp.
    """
    (_, n, k), (tokens, active), planes = gate.shape, chosen.shape, jax.tree.leaves(gate)
    tile, format = tile or (GroupedTile(rows=1) if interpret else GroupedTile()), lane_format(type(gate), interpret)
    slots, columns = pl.cdiv(tokens * active, tile.walk), k // format.width
    groups = groups or by_expert(chosen, interpret=interpret)
    sizes: dict[str, Any] = {"columns": columns, "n": n, "active": active, "planes": len(planes), "slots": slots}
    return Part(
        name=f"{NAME}_{type(gate).__name__.lower()}_m{tokens}",
        programs=pl.cdiv(n, tile.rows) * slots,
        body=functools.partial(_body, format=format, limit=limit, rows=tile.rows, ahead=tile.ahead, interpret=interpret, **sizes),
        inputs=(
            groups.pair,
            groups.count,
            chosen.reshape(-1),
            share.reshape(-1),
            codebook(type(gate)),
            *jax.tree.leaves(x),
            *planes,
            *jax.tree.leaves(up),
        ),
        outputs=(jax.ShapeDtypeStruct((tokens * active, n), jnp.float32),),
        # As for `gate_up_part`; rows that share an expert read fewer bytes.
        traffic=2 * tokens * active * n * k // gate.BLOCK * gate.DEVICE_BYTES,
    )

"""Gate and up of many rows in IQ2_XXS: programs of several warps that look patterns up in shared memory.

The kernel of one warp (`decode.py`) looks patterns up through the L1, where the lanes of a warp wait for each other's banks. Here
the codebook lies in shared memory once for each lane, so that no lane waits, and an address takes two instructions in place of
four. A program fills it once for all of its warps and rows. Every sum has the order of the other kernel, so a row has the same
bits in both.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plt

from pallas_kernels.core import arithmetic
from pallas_kernels.core.arithmetic import LANES
from pallas_kernels.core.launch import Part
from pallas_kernels.experts import neighbours
from pallas_kernels.experts.swiglu import clamped
from pallas_kernels.formats import IQ2_XXS, Quantized
from pallas_kernels.formats.iq2_xxs import selectors
from pallas_kernels.linear.activation import Activation
from pallas_kernels.linear.activation_k import ActivationK
from pallas_kernels.linear.lane_codebooks import NEGATIVE, POSITIVE
from pallas_kernels.linear.lanes import moved

GATE_UP = "expert_gate_up"
# From so many rows on, gate and up have a launch of their own. All programs of a launch have the registers of its largest part,
# and the shared expert's products of more rows take so many that few programs of gate and up run at once.
MANY_ROWS = 5
# Warps of a program, rows of gate and of up that each of them multiplies, and how many parts of these rows it loads ahead.
WARPS, ROWS, AHEAD = 4, 4, 1
# Weights of 32 lanes, and planes of activations of a lane.
CHUNK, PLANES = 4096, 8
PATTERNS = 256
# Bytes of a pattern's copies for all lanes.
PITCH = 4 * LANES


def table() -> jax.Array:
    """The selectors of the patterns, the positive constants for each lane, and the pitch, int32 [289].

    The compiler must not know the pitch, so that it multiplies and does not shift. Why each lane has constants: see
    `pallas_kernels.linear.lane_codebooks`.
    """
    return jnp.asarray(np.concatenate([selectors(), np.full(LANES, POSITIVE), [PITCH]]).astype(np.int32))


class Codebook:
    """The patterns' selectors, as the threads of a program look them up."""

    def __init__(self, ref: Any, thread: jax.Array, interpret: bool):
        self._ref, self._interpret = ref, interpret
        self.positive = plt.load(ref.at[PATTERNS + thread % LANES])
        if not interpret:
            self._pitch = plt.load(ref.at[jnp.full_like(thread, PATTERNS + LANES)])
            self._own = self._filled(thread)

    def _filled(self, thread: jax.Array) -> jax.Array:
        """Store the table, four copies of a selector at a time. Returns where each thread's copy begins, int32 [32·W].

        Each instruction takes a result of the one before, because the compiler knows of no other order between them.
        """
        size, threads = PATTERNS * PITCH, thread.shape[0]
        begin = f".shared .align 16 .b8 codebook[{size}]; mov.u32 $0, codebook;"
        base = done = arithmetic.assembly(begin, "=r,r", jnp.int32, thread)
        for first in range(0, size // 16, threads):
            place = first + thread
            value = plt.load(self._ref.at[place // (PITCH // 16)])
            code = "st.shared.v4.b32 [$1], {$2, $2, $2, $2}; mov.b32 $0, $3;"
            done = arithmetic.assembly(code, "=r,r,r,r", jnp.int32, base + 16 * place, value, done)
        own = done + 4 * (thread % LANES)
        return arithmetic.assembly("bar.sync 0; mov.b32 $0, $1;", "=r,r", jnp.int32, own)

    def after_loads(self) -> None:
        """Let the lookups to come follow the loads before. The compiler would move loads behind products to save registers."""
        if not self._interpret:
            self._own = arithmetic.assembly("bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", jnp.int32, self._own)

    def look_up(self, index: jax.Array, group: int) -> jax.Array:
        """The selectors of the patterns in a byte of each index word, int32 [32·W, 4]."""
        if self._interpret:
            return plt.load(self._ref.at[(index >> (8 * group)) & 255])
        code = f"{{ .reg .b32 a; prmt.b32 a, $1, 0, {0x4440 + group:#x}; mad.lo.s32 a, a, $2, $3; ld.shared.b32 $0, [a]; }}"
        pitch, own = (jnp.broadcast_to(x[:, None], index.shape) for x in (self._pitch, self._own))
        return arithmetic.assembly(code, "=r,r,r,r", jnp.int32, index, pitch, own)


def _body(
    program: jax.Array, inputs: Sequence[Any], outputs: Sequence[Any],
    *, n: int, chunks: int, size: int, active: int, warps: int, rows: int, ahead: int, limit: float, interpret: bool,
) -> None:  # fmt: skip
    chosen_ref, share_ref, table_ref, quants_ref, x_scales_ref, _, *planes = inputs
    [out_ref] = outputs
    pair, tile = neighbours.place(program, chosen_ref.shape[0], size)
    thread = jnp.arange(warps * LANES, dtype=jnp.int32)
    lane = thread % LANES
    first = tile * (warps * rows) + thread // LANES * rows
    expert, x_row = jnp.full_like(thread, chosen_ref[pair]), jnp.full_like(thread, pair // active)
    matrices = planes[:4], planes[4:]
    word = jax.lax.broadcasted_iota(jnp.int32, (warps * LANES, 4), 1)

    def four(ref: Any, *index: Any, policy: str | None = None) -> jax.Array:
        spread = tuple(jnp.broadcast_to(i[:, None], word.shape) for i in index)
        return plt.load(ref.at[(*spread, word)], eviction_policy=policy)

    def weights(turn: int) -> tuple[jax.Array, ...]:
        chunk, (row, matrix) = turn // (2 * rows), divmod(turn % (2 * rows), 2)
        indices, signs, factors, scales = matrices[matrix]
        part, own = first + row, chunk * LANES + lane
        loaded = (four(ref, expert, part, own, policy="evict_first") for ref in (indices, signs))
        factor = plt.load(factors.at[expert, part, own], eviction_policy="evict_first")
        scale = plt.load(scales.at[expert, part, own // 2], eviction_policy="evict_first")
        return (*loaded, factor, scale)

    turns = 2 * rows * chunks
    under_way = [weights(turn) for turn in range(min(ahead, turns))]
    book = Codebook(table_ref, thread, interpret)
    accs = [jnp.zeros(warps * LANES, jnp.float32)] * (2 * rows)
    x: list[jax.Array] = []
    for turn in range(turns):
        if turn % (2 * rows) == 0:
            own = turn // (2 * rows) * LANES + lane
            x = [four(quants_ref, x_row, jnp.full_like(lane, plane), own) for plane in range(PLANES)]
            x_scale = plt.load(x_scales_ref.at[x_row, own // 2])
        if turn + ahead < turns:
            under_way.append(weights(turn + ahead))
        index, sign, factor, scale = under_way.pop(0)
        book.after_loads()
        total = jnp.zeros_like(index)
        for group in range(4):
            selector = book.look_up(index, group) | (moved(sign, 2 - group) & 0x44444444)
            for half, plane in ((selector, x[2 * group]), (selector >> 16, x[2 * group + 1])):
                values = arithmetic.pick_bytes(book.positive[:, None], NEGATIVE, half, interpret=interpret)
                total = arithmetic.dp4a(values, plane, total, interpret=interpret)
        factors = ((factor.astype(jnp.int32)[:, None] >> (4 * word)) & 15) * 2 + 1
        whole = jnp.sum(total * factors, axis=-1).astype(jnp.float32)
        times = arithmetic.multiply(scale.astype(jnp.float32), x_scale * 0.125, interpret=interpret)
        place = turn % (2 * rows)
        accs[place] = arithmetic.fma(whole, times, accs[place], interpret=interpret)
    # The sums of gate and up of one row are in neighbouring groups of lanes.
    total, number, owner = arithmetic.sum_lanes(accs, lane, interpret=interpret)
    other = arithmetic.exchange(total, LANES // (2 * rows), interpret=interpret)
    hidden = clamped(total, other, limit) * share_ref[pair]
    real = owner & (number % 2 == 0)
    plt.store(out_ref.at[jnp.full_like(thread, pair), jnp.where(real, first + number // 2, n)], hidden, mask=real)


def serves(rows: int, format: type[Quantized], shape: tuple[int, ...]) -> bool:
    """Whether the kernel takes so many rows of activations and stacks [E, F, D] of this format, and is the faster one."""
    _, n, k = shape
    return rows >= MANY_ROWS and format is IQ2_XXS and k % CHUNK == 0 and n % (WARPS * ROWS) == 0


def part(
    x: Activation | ActivationK, chosen: jax.Array, share: jax.Array, gate: Quantized, up: Quantized, *, limit: float,
    interpret: bool = False,
) -> Part:  # fmt: skip
    """As `pallas_kernels.experts.decode.gate_up_part`, to the last bit, by programs of `WARPS` warps."""
    (_, n, k), (tokens, active) = gate.shape, chosen.shape
    tiles = n // (WARPS * ROWS)
    size = neighbours.piece(tiles, WARPS * ROWS * k // gate.BLOCK * gate.DEVICE_BYTES)
    cut: dict[str, Any] = {"size": size, "warps": WARPS, "rows": ROWS, "ahead": AHEAD}
    sizes: dict[str, Any] = {"n": n, "chunks": k // CHUNK, "active": active, **cut}
    return Part(
        name=f"{GATE_UP}_{type(gate).__name__.lower()}_m{tokens}",
        programs=tiles * tokens * active,
        body=functools.partial(_body, limit=limit, interpret=interpret, **sizes),
        inputs=(
            chosen.reshape(-1), share.reshape(-1), table(), *jax.tree.leaves(x), *jax.tree.leaves(gate), *jax.tree.leaves(up),
        ),
        outputs=(jax.ShapeDtypeStruct((tokens * active, n), jnp.float32),),
        traffic=2 * tokens * active * n * k // gate.BLOCK * gate.DEVICE_BYTES,
    )  # fmt: skip

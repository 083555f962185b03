"""The compressor of a decode step: inputs into their rings, and the row of a block that the step closes, in one launch.

Two programs serve a row of the call. The first stores its inputs in the rings, the second pools the block that the row closes;
most rows close none and it ends at once. Both work side by side: the second takes tokens of this call from the call's own inputs
and older ones from ring slots that no row of the call may overwrite, so that neither waits for the other.

Every array of the pooling has one value a channel and a token is one load, so that the tokens' softmax needs no exchange between
threads. No body sees the number of rows: row m of any call has the bits of the same row alone.

Source: `Compressor` of the reference inference code of DeepSeek-V4.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.attention.stored_rows import NarrowKeys, NarrowRows, Stored, fp4_codes, fp8_codes
from pallas_kernels.core import rounding
from pallas_kernels.core.launch import Part, launch
from pallas_kernels.core.rounding import FP4_BLOCK, FP8_BLOCK
from pallas_kernels.core.row_rounding import angles, rotate, round_fp4

NAME = "compress"
OVERLAP_RATIO = 4
TOKENS_AT_ONCE = 8
WARPS = 8
FINISHES = ("fp8", "fp4", "none")

Finish = Literal["fp8", "fp4", "none"]
Sums = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """The launch's operands that bodies read, in its order; the rows, which are only written, stand before `sequence`.

    Attributes:
        values, gates: [M, C·w], the projections of the call's rows.
        ape: [ratio, C·w].
        norm: [w].
        cos, sin: [M, R/2].
        ring_values, ring_gates: [B, ring, C·w].
        sequence, position, live, start: [M].
    """

    values: Any
    gates: Any
    ape: Any
    norm: Any
    cos: Any
    sin: Any
    ring_values: Any
    ring_gates: Any
    sequence: Any
    position: Any
    live: Any
    start: Any


@dataclasses.dataclass(frozen=True)
class _Row:
    """What both programs of row m know."""

    given: _Inputs
    m: jax.Array
    sequence: jax.Array
    position: jax.Array
    ratio: int
    eps: float
    finish: Finish

    @property
    def overlap(self) -> int:
        """C."""
        return int(self.given.ape.shape[1] // self.given.norm.shape[0])

    @property
    def width(self) -> int:
        """w."""
        return int(self.given.norm.shape[0])

    def keep(self, ring_values: Any, ring_gates: Any) -> None:
        """Store the row's inputs in the rings."""
        slot = jax.lax.rem(self.position, jnp.int32(ring_values.shape[1]))
        bias = self.given.ape[jax.lax.rem(self.position, jnp.int32(self.ratio)), :].astype(jnp.float32)
        gates = self.given.gates[self.m, :] + bias
        ring_values[self.sequence, slot, :] = self.given.values[self.m, :]
        ring_gates[self.sequence, slot, :] = gates

    def token(self, back: jax.Array, first: int) -> tuple[jax.Array, jax.Array]:
        """Values and gates [w] of the token `back` positions before the row's, channels from `first` on."""
        given, position = self.given, self.position - back
        start, span = given.start[self.m], pl.ds(first, self.width)
        own, held = position >= start, position >= 0
        ring = jnp.broadcast_to(held & (position < start), (self.width,))
        call = jnp.broadcast_to(own, (self.width,))
        held_position = jnp.maximum(position, 0)
        slot = jax.lax.rem(held_position, jnp.int32(given.ring_values.shape[1]))
        bias = jax.lax.rem(held_position, jnp.int32(self.ratio))
        # A sequence's rows of the call stand one behind the other.
        row = jnp.maximum(self.m - back, 0)
        old_value = plt.load(given.ring_values.at[self.sequence, slot, span], mask=ring, other=0.0)
        old_gate = plt.load(given.ring_gates.at[self.sequence, slot, span], mask=ring, other=-jnp.inf)
        new_value = plt.load(given.values.at[row, span], mask=call, other=0.0)
        new_gate = plt.load(given.gates.at[row, span], mask=call, other=0.0)
        new_gate += plt.load(given.ape.at[bias, span], mask=call, other=0.0).astype(jnp.float32)
        return jnp.where(call, new_value, old_value), jnp.where(call, new_gate, old_gate)

    def add(self, chunk: jax.Array | int, sums: Sums) -> Sums:
        """The largest gate, the weighted values and the weights, with the tokens of one chunk taken in."""
        count = self.chunk
        last, tokens = self.overlap * self.ratio - 1, []
        for i in range(count):
            # Of two blocks, the earlier one's tokens use the first half of the channels and the later one's the second.
            first = self.width if self.overlap == 2 and i >= self.ratio else 0
            tokens.append(self.token(jnp.int32(last - i) - jnp.int32(count) * chunk, first))
        top = functools.reduce(jnp.maximum, (gate for _, gate in tokens), sums[0])
        shrink = jnp.exp(sums[0] - top)
        weighted, weight = sums[1] * shrink, sums[2] * shrink
        for value, gate in tokens:
            share = jnp.exp(gate - top)
            weighted, weight = weighted + share * value, weight + share
        return top, weighted, weight

    @property
    def chunk(self) -> int:
        """Tokens that are loaded at once: both blocks of the small ratio."""
        return 2 * self.ratio if self.overlap == 2 else min(self.ratio, TOKENS_AT_ONCE)

    def pool(self) -> jax.Array:
        """The gate-weighted mean [w] of the block's tokens. The first chunk holds a token with a gate, always."""
        zero = jnp.zeros(self.width, jnp.float32)
        sums: Sums = (zero - jnp.inf, zero, zero)
        passes = self.overlap * self.ratio // self.chunk
        if passes == 1:
            sums = self.add(jnp.int32(0), sums)
        else:
            sums = jax.lax.fori_loop(0, passes, self.add, sums)
        return sums[1] / sums[2]

    def entry(self) -> jax.Array:
        """The finished row [w]."""
        pooled, width = self.pool(), self.width
        mean = jnp.broadcast_to(jnp.sum(pooled * pooled) * jnp.float32(1 / width), (width,))
        normed = pooled * jax.lax.rsqrt(mean + jnp.float32(self.eps)) * self.given.norm[:]
        rotated = rotate(normed, *angles(self.given.cos, self.given.sin, self.m, width // 2))
        if self.finish == "fp4":
            return round_fp4(rotated)
        if self.finish == "none":
            return rotated
        rounded = rounding.fp8(rotated.reshape(width // FP8_BLOCK, FP8_BLOCK)).reshape(width)
        channel = jax.lax.broadcasted_iota(jnp.int32, (width,), 0)
        return jnp.where(channel < width - 2 * self.given.cos.shape[1], rounded, rotated)


def _store(rows: Any, sequence: jax.Array, block: jax.Array, entry: jax.Array) -> None:
    """Store a finished row [w] in the form that the rows have."""
    width = entry.shape[0]
    if isinstance(rows, NarrowRows):
        plain, blocks = rows.codes.shape[2], width // FP8_BLOCK
        codes, exponents = fp8_codes(entry.reshape(blocks, FP8_BLOCK))
        channel = jax.lax.broadcasted_iota(jnp.int32, (width,), 0)
        place = jax.lax.broadcasted_iota(jnp.int32, (blocks,), 0)
        stays = channel < plain
        plt.store(rows.codes.at[sequence, block, channel], codes.reshape(width).astype(jnp.uint8), mask=stays)
        plt.store(rows.exponents.at[sequence, block, place], exponents.astype(jnp.int8), mask=place < plain // FP8_BLOCK)
        # What does not rotate points past the end, where interpret mode drops it.
        column = jnp.where(stays, width, channel - plain)
        plt.store(rows.turning.at[sequence, block, column], entry, mask=jnp.logical_not(stays))
    elif isinstance(rows, NarrowKeys):
        codes, exponents = fp4_codes(entry.reshape(width // FP4_BLOCK, FP4_BLOCK))
        halves = codes.reshape(2, width // 2)
        second = jax.lax.broadcasted_iota(jnp.int32, halves.shape, 0)
        rows.codes[sequence, block, :] = jnp.sum(halves << (4 * second), axis=0).astype(jnp.uint8)
        rows.exponents[sequence, block, :] = exponents.astype(jnp.int8)
    else:
        rows[sequence, block, :] = entry


def _body(
    program: jax.Array, inputs: Sequence[Any], outputs: Sequence[Any], *, form: Any, ratio: int, eps: float, finish: Finish
) -> None:
    given = _Inputs(*inputs[:8], *inputs[-4:])
    ring_values, ring_gates, *leaves = outputs
    rows = jax.tree.unflatten(form, leaves)
    m, pools = program // 2, program % 2 == 1
    sequence, position, live = given.sequence[m], given.position[m], given.live[m] != 0
    row = _Row(given, m, sequence, position, ratio, eps, finish)
    block = jax.lax.div(position, jnp.int32(ratio))
    closes = (jax.lax.rem(position, jnp.int32(ratio)) == ratio - 1) & (block < rows.shape[1])

    @pl.when(live & jnp.logical_not(pools))
    def _() -> None:
        row.keep(ring_values, ring_gates)

    @pl.when(live & pools & closes)
    def _() -> None:
        _store(rows, sequence, block, row.entry())


def _check(
    ape: jax.Array, norm_weight: jax.Array, cos: jax.Array, ring: int, rows: Stored, finish: str, per_sequence: int
) -> None:
    width, (ratio, channels) = norm_weight.shape[0], ape.shape
    overlap = 2 if ratio == OVERLAP_RATIO else 1
    span = overlap * ratio
    if finish not in FINISHES:
        raise ValueError(f"finish is {finish!r}; it must be one of {', '.join(FINISHES)}")
    if channels != overlap * width or channels != pl.next_power_of_2(channels):
        raise ValueError(f"ape is [{ratio}, {channels}]; [{ratio}, {overlap}·{width}] is needed, a power of two of channels")
    if overlap == 1 and ratio % min(ratio, TOKENS_AT_ONCE):
        raise ValueError(f"ratio is {ratio}; it must be a multiple of {TOKENS_AT_ONCE}, or less, or {OVERLAP_RATIO}")
    tokens = span + per_sequence - 1
    if ring < tokens:
        raise ValueError(f"the rings hold {ring} tokens; {per_sequence} rows of blocks of {span} need {tokens}")
    plain = width - 2 * cos.shape[1]
    if (finish == "fp8" and (plain % FP8_BLOCK or width % FP8_BLOCK)) or (finish == "fp4" and width % FP4_BLOCK):
        raise ValueError(f"{width} channels with {plain} that do not rotate do not divide into the blocks of {finish}")
    for form, needed in ((NarrowRows, "fp8"), (NarrowKeys, "fp4")):
        if isinstance(rows, form) and finish != needed:
            raise ValueError(f"finish is {finish!r}; {form.__name__} hold what {needed!r} leaves")


def compress_part(
    values: jax.Array,
    gates: jax.Array,
    ape: jax.Array,
    norm_weight: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    ring_values: jax.Array,
    ring_gates: jax.Array,
    rows: Stored,
    sequence: jax.Array,
    position: jax.Array,
    live: jax.Array,
    start: jax.Array,
    *,
    ratio: int,
    eps: float,
    finish: Finish,
    per_sequence: int | None = None,
) -> Part:
    """`compress` as a part of a launch; its results are the rings and the arrays of the rows."""
    m, ring = values.shape[0], ring_values.shape[1]
    _check(ape, norm_weight, cos, ring, rows, finish, m if per_sequence is None else per_sequence)
    leaves, form = jax.tree.flatten(rows)
    state = (ring_values, ring_gates, *leaves)
    return Part(
        name=NAME,
        programs=2 * m,
        body=functools.partial(_body, form=form, ratio=ratio, eps=eps, finish=finish),
        inputs=(values, gates, ape, norm_weight, cos, sin, *state, sequence, position, live, start),
        outputs=tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in state),
        aliases={6 + i: i for i in range(len(state))},
    )


def compress(
    values: jax.Array,
    gates: jax.Array,
    ape: jax.Array,
    norm_weight: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    ring_values: jax.Array,
    ring_gates: jax.Array,
    rows: Stored,
    sequence: jax.Array,
    position: jax.Array,
    live: jax.Array,
    start: jax.Array,
    *,
    ratio: int,
    eps: float,
    finish: Finish,
    per_sequence: int | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, Stored]:
    """Take in the rows of a call and write the rows of the blocks that they close: one launch, in place.

    Args:
        values, gates: float32 [M, C·w], projections of consecutive tokens of each sequence; C is 2 for ratio 4, 1 for any other.
        ape: float [ratio, C·w], added to the gates.
        norm_weight: float32 [w], w a power of two.
        cos, sin: float32 [M, R/2] of the angles at each row's position - (ratio - 1), the first token of the block it closes.
        ring_values, ring_gates: float32 [B, ring, C·w], the latest tokens at slot position mod ring, gates with their bias.
        rows: [B, S, w], finished rows at position // ratio; one past the end is dropped. float32, or `NarrowRows` with "fp8" and
            `NarrowKeys` with "fp4", which then hold the same values.
        sequence: int32 [M], which of the B sequences a row belongs to.
        position: int32 [M], in each sequence from its `start` on, row behind row; a row that is not live may repeat any.
        live: int32 [M], 1 or 0; a row with 0 leaves no trace.
        start: int32 [M], position of the first of the call's rows of the row's sequence.
        eps: of the RMS norm.
        per_sequence: maximum rows of one sequence, M if not given.
        finish: "fp8" rounds the first w - R channels to FP8 in blocks of 64, "fp4" transforms all by Hadamard's matrix and rounds
            them to FP4 in blocks of 32, "none" leaves them.

    Returns:
        ring_values, ring_gates and rows with the call's rows in them.

    Raises:
        ValueError: an unknown finish, shapes that do not fit it or each other, or rings too short for the rows.
    """
    part = compress_part(
        values, gates, ape, norm_weight, cos, sin, ring_values, ring_gates, rows, sequence, position, live, start,
        ratio=ratio, eps=eps, finish=finish, per_sequence=per_sequence,
    )  # fmt: skip
    [made] = launch([part], warps=WARPS, interpret=interpret)
    return taken_in(made, rows)


def taken_in(made: Sequence[jax.Array], rows: Stored) -> tuple[jax.Array, jax.Array, Stored]:
    """Rings and rows from what `compress_part` returns, given the rows before."""
    values, gates, *leaves = made
    return values, gates, jax.tree.unflatten(jax.tree.structure(rows), leaves)

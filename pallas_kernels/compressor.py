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

from pallas_kernels import rounding
from pallas_kernels.bundle import Part, launch
from pallas_kernels.finishing import angles, reference_fp4, reference_rotate, rotate, round_fp4
from pallas_kernels.narrow import NarrowKeys, NarrowRows, Stored, fp4_codes, fp8_codes
from pallas_kernels.rounding import FP4_BLOCK, FP8_BLOCK

NAME = "compress"
OVERLAP_RATIO = 4
TOKENS_AT_ONCE = 8
WARPS = 8
FINISHES = ("fp8", "fp4", "none")

Finish = Literal["fp8", "fp4", "none"]
Sums = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """The launch's operands that bodies read, in its order; the rows, which are only written, stand before `position`.

    Attributes:
        values, gates: [M, C·w], the projections of the call's rows.
        ape: [ratio, C·w].
        norm: [w].
        cos, sin: [M, R/2].
        ring_values, ring_gates: [ring, C·w].
        position, live: [M].
        start: [1].
    """

    values: Any
    gates: Any
    ape: Any
    norm: Any
    cos: Any
    sin: Any
    ring_values: Any
    ring_gates: Any
    position: Any
    live: Any
    start: Any


@dataclasses.dataclass(frozen=True)
class _Row:
    """What both programs of row m know."""

    given: _Inputs
    m: jax.Array
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
        slot = jax.lax.rem(self.position, jnp.int32(ring_values.shape[0]))
        bias = self.given.ape[jax.lax.rem(self.position, jnp.int32(self.ratio)), :].astype(jnp.float32)
        gates = self.given.gates[self.m, :] + bias
        ring_values[slot, :] = self.given.values[self.m, :]
        ring_gates[slot, :] = gates

    def token(self, back: jax.Array, first: int) -> tuple[jax.Array, jax.Array]:
        """Values and gates [w] of the token `back` positions before the row's, channels from `first` on."""
        given, position = self.given, self.position - back
        start, span = given.start[0], pl.ds(first, self.width)
        own, held = position >= start, position >= 0
        ring = jnp.broadcast_to(held & (position < start), (self.width,))
        call = jnp.broadcast_to(own, (self.width,))
        held_position = jnp.maximum(position, 0)
        slot = jax.lax.rem(held_position, jnp.int32(given.ring_values.shape[0]))
        bias = jax.lax.rem(held_position, jnp.int32(self.ratio))
        row = jnp.maximum(position - start, 0)
        old_value = plt.load(given.ring_values.at[slot, span], mask=ring, other=0.0)
        old_gate = plt.load(given.ring_gates.at[slot, span], mask=ring, other=-jnp.inf)
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
        most = functools.reduce(jnp.maximum, (gate for _, gate in tokens), sums[0])
        shrink = jnp.exp(sums[0] - most)
        weighted, weight = sums[1] * shrink, sums[2] * shrink
        for value, gate in tokens:
            share = jnp.exp(gate - most)
            weighted, weight = weighted + share * value, weight + share
        return most, weighted, weight

    @property
    def chunk(self) -> int:
        """Tokens that are loaded at once: both blocks of the small ratio."""
        return 2 * self.ratio if self.overlap == 2 else min(self.ratio, TOKENS_AT_ONCE)

    def pool(self) -> jax.Array:
        """The gate-weighted mean [w] of the block's tokens. The first chunk holds a token with a gate, always."""
        zero = jnp.zeros(self.width, jnp.float32)
        sums: Sums = (zero - jnp.inf, zero, zero)
        turns = self.overlap * self.ratio // self.chunk
        if turns == 1:
            sums = self.add(jnp.int32(0), sums)
        else:
            sums = jax.lax.fori_loop(0, turns, self.add, sums)
        return sums[1] / sums[2]

    def entry(self) -> jax.Array:
        """The finished row [w]."""
        pooled, width = self.pool(), self.width
        mean = jnp.broadcast_to(jnp.sum(pooled * pooled) * jnp.float32(1 / width), (width,))
        normed = pooled * jax.lax.rsqrt(mean + jnp.float32(self.eps)) * self.given.norm[:]
        turned = rotate(normed, *angles(self.given.cos, self.given.sin, self.m, width // 2))
        if self.finish == "fp4":
            return round_fp4(turned)
        if self.finish == "none":
            return turned
        rounded = rounding.fp8(turned.reshape(width // FP8_BLOCK, FP8_BLOCK)).reshape(width)
        channel = jax.lax.broadcasted_iota(jnp.int32, (width,), 0)
        return jnp.where(channel < width - 2 * self.given.cos.shape[1], rounded, turned)


def _store(rows: Any, block: jax.Array, entry: jax.Array) -> None:
    """Store a finished row [w] in the form that the rows have."""
    width = entry.shape[0]
    if isinstance(rows, NarrowRows):
        still, blocks = rows.codes.shape[1], width // FP8_BLOCK
        codes, exponents = fp8_codes(entry.reshape(blocks, FP8_BLOCK))
        channel = jax.lax.broadcasted_iota(jnp.int32, (width,), 0)
        place = jax.lax.broadcasted_iota(jnp.int32, (blocks,), 0)
        stays = channel < still
        plt.store(rows.codes.at[block, channel], codes.reshape(width).astype(jnp.uint8), mask=stays)
        plt.store(rows.exponents.at[block, place], exponents.astype(jnp.int8), mask=place < still // FP8_BLOCK)
        # What does not turn points past the end, where interpret mode drops it.
        plt.store(rows.turning.at[block, jnp.where(stays, width, channel - still)], entry, mask=jnp.logical_not(stays))
    elif isinstance(rows, NarrowKeys):
        codes, exponents = fp4_codes(entry.reshape(width // FP4_BLOCK, FP4_BLOCK))
        halves = codes.reshape(2, width // 2)
        second = jax.lax.broadcasted_iota(jnp.int32, halves.shape, 0)
        rows.codes[block, :] = jnp.sum(halves << (4 * second), axis=0).astype(jnp.uint8)
        rows.exponents[block, :] = exponents.astype(jnp.int8)
    else:
        rows[block, :] = entry


def _body(
    program: jax.Array, inputs: Sequence[Any], outputs: Sequence[Any], *, form: Any, ratio: int, eps: float, finish: Finish
) -> None:
    given = _Inputs(*inputs[:8], *inputs[-3:])
    ring_values, ring_gates, *leaves = outputs
    rows = jax.tree.unflatten(form, leaves)
    m, pools = program // 2, program % 2 == 1
    position, live = given.position[m], given.live[m] != 0
    row = _Row(given, m, position, ratio, eps, finish)
    block = jax.lax.div(position, jnp.int32(ratio))
    closes = (jax.lax.rem(position, jnp.int32(ratio)) == ratio - 1) & (block < rows.shape[0])

    @pl.when(live & jnp.logical_not(pools))
    def _() -> None:
        row.keep(ring_values, ring_gates)

    @pl.when(live & pools & closes)
    def _() -> None:
        _store(rows, block, row.entry())


def _check(
    values: jax.Array, ape: jax.Array, norm_weight: jax.Array, cos: jax.Array, ring: int, rows: Stored, finish: str
) -> None:
    width, (ratio, channels) = norm_weight.shape[0], ape.shape
    overlap = 2 if ratio == OVERLAP_RATIO else 1
    span, m = overlap * ratio, values.shape[0]
    if finish not in FINISHES:
        raise ValueError(f"finish is {finish!r}; it must be one of {', '.join(FINISHES)}")
    if channels != overlap * width or channels != pl.next_power_of_2(channels):
        raise ValueError(f"ape is [{ratio}, {channels}]; [{ratio}, {overlap}·{width}] is needed, a power of two of channels")
    if overlap == 1 and ratio % min(ratio, TOKENS_AT_ONCE):
        raise ValueError(f"ratio is {ratio}; it must be a multiple of {TOKENS_AT_ONCE}, or less, or {OVERLAP_RATIO}")
    if ring < span + m - 1:
        raise ValueError(f"the rings hold {ring} tokens; {m} rows of blocks of {span} need {span + m - 1}")
    still = width - 2 * cos.shape[1]
    if (finish == "fp8" and (still % FP8_BLOCK or width % FP8_BLOCK)) or (finish == "fp4" and width % FP4_BLOCK):
        raise ValueError(f"{width} channels with {still} that do not turn do not divide into the blocks of {finish}")
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
    position: jax.Array,
    live: jax.Array,
    start: jax.Array,
    *,
    ratio: int,
    eps: float,
    finish: Finish,
) -> Part:
    """`compress` as a part of a launch; its results are the rings and the arrays of the rows, without their first axis."""
    m, ring = values.shape[0], ring_values.shape[1]
    _check(values, ape, norm_weight, cos, ring, rows, finish)
    leaves, form = jax.tree.flatten(rows)
    state = tuple(array[0] for array in (ring_values, ring_gates, *leaves))
    return Part(
        name=NAME,
        programs=2 * m,
        body=functools.partial(_body, form=form, ratio=ratio, eps=eps, finish=finish),
        inputs=(values, gates, ape, norm_weight, cos, sin, *state, position, live, start),
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
    position: jax.Array,
    live: jax.Array,
    start: jax.Array,
    *,
    ratio: int,
    eps: float,
    finish: Finish,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, Stored]:
    """Take in the rows of one call of one sequence and write the rows of the blocks that they close: one launch, in place.

    Args:
        values, gates: float32 [M, C·w], projections of consecutive tokens; C is 2 for ratio 4, 1 for any other.
        ape: float [ratio, C·w], added to the gates.
        norm_weight: float32 [w], w a power of two.
        cos, sin: float32 [M, R/2] of the angles at each row's position - (ratio - 1), the first token of the block it closes.
        ring_values, ring_gates: float32 [1, ring, C·w], the latest tokens at slot position mod ring, gates with their bias.
        rows: [1, S, w], finished rows at position // ratio; one past the end is dropped. float32, or `NarrowRows` with "fp8" and
            `NarrowKeys` with "fp4", which then hold the same values.
        position: int32 [M], `start` onwards; a row that is not live may repeat any.
        live: int32 [M], 1 or 0; a row with 0 leaves no trace.
        start: int32 [1], the first row's position.
        eps: of the RMS norm.
        finish: "fp8" rounds the first w - R channels to FP8 in blocks of 64, "fp4" transforms all by Hadamard's matrix and rounds
            them to FP4 in blocks of 32, "none" leaves them.

    Returns:
        ring_values, ring_gates and rows with the call's rows in them.

    Raises:
        ValueError: an unknown finish, shapes that do not fit it or each other, or rings too short for M rows.
    """
    part = compress_part(
        values, gates, ape, norm_weight, cos, sin, ring_values, ring_gates, rows, position, live, start,
        ratio=ratio, eps=eps, finish=finish,
    )  # fmt: skip
    [made] = launch([part], warps=WARPS, interpret=interpret)
    return taken_in(made, rows)


def taken_in(made: Sequence[jax.Array], rows: Stored) -> tuple[jax.Array, jax.Array, Stored]:
    """Rings and rows from what `compress_part` returns, given the rows before."""
    values, gates, *leaves = (array[None] for array in made)
    return values, gates, jax.tree.unflatten(jax.tree.structure(rows), leaves)


def reference_rows(
    values: jax.Array,
    gates: jax.Array,
    ape: jax.Array,
    norm_weight: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    ratio: int,
    eps: float,
    finish: Finish,
) -> jax.Array:
    """All finished rows [T/ratio, w] of a whole sequence in plain jnp.

    Args:
        values, gates: float32 [T, C·w], from position 0 on.
        cos, sin: float32 [T/ratio, R/2], at the first token of each block.
        ape, norm_weight, ratio, eps, finish: as for `compress`.
    """
    width = norm_weight.shape[0]
    count = values.shape[0] // ratio
    shape = (count, ratio, values.shape[1] // width, width)
    a, g = values[: count * ratio].reshape(shape), gates[: count * ratio].reshape(shape) + ape.reshape(shape[1:])
    if shape[2] == 2:
        before = ((1, 0), (0, 0), (0, 0))
        a = jnp.concatenate([jnp.pad(a[:-1, :, 0], before), a[:, :, 1]], axis=1)
        g = jnp.concatenate([jnp.pad(g[:-1, :, 0], before, constant_values=-jnp.inf), g[:, :, 1]], axis=1)
    else:
        a, g = a[:, :, 0], g[:, :, 0]
    x = jnp.sum(jax.nn.softmax(g, axis=1) * a, axis=1)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + jnp.float32(eps)) * norm_weight
    x = reference_rotate(x, cos, sin)
    if finish == "none":
        return x
    if finish == "fp4":
        return reference_fp4(x)
    still = width - 2 * cos.shape[1]
    blocks = rounding.fp8(x[:, :still].reshape(count, still // FP8_BLOCK, FP8_BLOCK))
    return jnp.concatenate([blocks.reshape(count, still), x[:, still:]], axis=1)

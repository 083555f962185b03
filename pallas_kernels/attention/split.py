"""One split of a decode step's attention: 16 heads of one query and some spans of the rows that it may see.

Products run on tensor cores: queries and weights as the sum of two float16 numbers, rows in float16, which holds FP8-rounded
values exactly. The columns that rotate are not rounded to FP8; float32 rows have them as the sum of two numbers too.
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

from pallas_kernels.attention.merge import LOG2_E, finite_top, power_of_two
from pallas_kernels.attention.stored_rows import NarrowRows, Stored, fp8_values, scales
from pallas_kernels.core import arithmetic, rotary
from pallas_kernels.core.rounding import FP8_BLOCK

# A tensor core's tile has 16 rows.
HEADS = 16
SPAN = 32
CHUNK = 128
MAX_SPLITS = 64
# Groups of neighbouring splits. The splits of a group are added up first.
GROUPS = 4

Parts = tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]
# One float16 number for each value of a row, or two.
Chunks = list[tuple[jax.Array, ...]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Leading:
    """Compressed rows of which each query sees the first ones.

    Attributes:
        rows: [B, S, Q], S rows of each sequence.
        visible: int32 [M], how many.
    """

    rows: Stored
    visible: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen:
    """Compressed rows of which each query sees its own choice.

    Attributes:
        rows: [B, S, Q], S rows of each sequence.
        index: int32 [M, K] into those of the query's sequence, below 0 for none.
    """

    rows: Stored
    index: jax.Array


Compressed = Leading | Chosen


@dataclasses.dataclass(frozen=True)
class Form:
    """What is known of a call before it runs.

    Attributes:
        rope: R.
        window: rows that a query sees of the ring, its own included.
        window_splits, splits: splits of the ring, and of everything.
        longest: spans that a split may have.
        chosen: whether compressed rows are chosen one by one.
    """

    heads: int
    dim: int
    rope: int
    window: int
    window_splits: int
    splits: int
    longest: int
    chosen: bool
    scale: float
    eps: float
    interpret: bool

    @classmethod
    def of(cls, ring: int, compressed: Compressed | None, **sizes: Any) -> Form:
        """The splits that a ring and the compressed rows need."""
        window_splits, spans = pl.cdiv(ring, SPAN), 0
        if compressed is not None:
            rows = compressed.index if isinstance(compressed, Chosen) else compressed.rows
            spans = pl.cdiv(rows.shape[1], SPAN)
        limit = max(MAX_SPLITS - window_splits, 1)
        splits, chosen = window_splits + min(spans, limit), isinstance(compressed, Chosen)
        return cls(window_splits=window_splits, splits=splits, longest=max(pl.cdiv(spans, limit), 1), chosen=chosen, **sizes)

    @property
    def chunk(self) -> int:
        """Columns that a kernel takes at a time; they divide Q."""
        return min(CHUNK, self.dim & -self.dim)

    @property
    def columns(self) -> list[jax.Array]:
        """Column numbers of each chunk."""
        return [jnp.arange(self.chunk, dtype=jnp.int32) + first for first in range(0, self.dim, self.chunk)]

    def rotates(self, chunk: int) -> bool:
        """Whether a chunk has columns that rotate."""
        return (chunk + 1) * self.chunk > self.plain

    @property
    def in_group(self) -> int:
        """Splits of a group; the last group may have fewer."""
        return pl.cdiv(self.splits, GROUPS)

    @property
    def groups(self) -> int:
        """Groups that have splits, at most `GROUPS`."""
        return pl.cdiv(self.splits, self.in_group)

    @property
    def plain(self) -> int:
        """Columns that do not rotate."""
        return self.dim - self.rope


def tile(row: jax.Array, column: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Indices [rows, columns] of a tile."""
    shape = (row.shape[0], column.shape[0])
    return jnp.broadcast_to(row[:, None], shape), jnp.broadcast_to(column[None, :], shape)


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two float16 numbers whose sum is x to 22 bits."""
    high = x.astype(jnp.float16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.float16)


def _dot(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...], axis: int) -> jax.Array:
    """Product of a [M, K] with b over its `axis`, both in parts of float16, summed in float32; without that of two low parts."""
    pairs = [(part, b[0]) for part in a] + [(a[0], part) for part in b[1:]]
    dimensions = (((1,), (axis,)), ((), ()))
    dots = [jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32) for x, y in pairs]
    return functools.reduce(jnp.add, dots)


@dataclasses.dataclass(frozen=True)
class Split:
    """One program: 16 heads of query m, and one split of the rows of its sequence that it may see."""

    form: Form
    m: jax.Array
    tile: jax.Array
    split: jax.Array
    sequence: jax.Array
    q: Any
    cos: Any
    sin: Any
    position: Any
    end: Any
    ring: Any
    rows: Any
    which: Any

    @property
    def heads(self) -> jax.Array:
        """The 16 heads' numbers, of which those past the last are padding."""
        return self.tile * HEADS + jnp.arange(HEADS, dtype=jnp.int32)

    @property
    def own(self) -> jax.Array:
        """Number of the split among those of the compressed rows, below 0 for one of the ring."""
        return self.split - self.form.window_splits

    def passes(self) -> jax.Array:
        """Spans of the split that may hold a row that the query sees."""
        form = self.form
        in_window = (self.split * SPAN < self.end[self.m]).astype(jnp.int32)
        if self.rows is None:
            return in_window
        visible = self.which.shape[1] if form.chosen else self.which[self.m]
        spans = (visible + SPAN - 1) // SPAN - self.own
        stride = form.splits - form.window_splits
        return jnp.where(self.own < 0, in_window, jnp.maximum(spans + stride - 1, 0) // stride)

    def queries(self) -> list[tuple[jax.Array, jax.Array]]:
        """Normed and rotated queries, two float16 halves of each chunk."""
        form = self.form
        chunks = [self.load_heads(column) for column in form.columns]
        # The pair's other value comes from memory again: lanes would have to exchange registers for it.
        partners = {i: self.load_heads(column ^ 1) for i, column in enumerate(form.columns) if form.rotates(i)}
        squares = functools.reduce(jnp.add, [jnp.sum(self.times(x, x), axis=-1) for x in chunks])
        scale = jax.lax.rsqrt(squares / form.dim + form.eps)[:, None]
        for i, partner in partners.items():
            cos, sin = rotary.factors(self.cos, self.sin, self.m, form.columns[i], form.plain, inverse=False)
            chunks[i] = rotary.rotate_columns(chunks[i], partner, cos[None, :], sin[None, :], interpret=form.interpret)
        return [_halves(self.times(x, jnp.broadcast_to(scale, x.shape))) for x in chunks]

    def load_heads(self, column: jax.Array) -> jax.Array:
        """Columns of the heads' raw queries."""
        heads, column = tile(self.heads, column)
        return plt.load(self.q.at[jnp.full_like(heads, self.m), heads, column], mask=heads < self.form.heads, other=0.0)

    def span(self, number: jax.Array) -> tuple[jax.Array, Chunks]:
        """Which rows of span `number` the query sees, bool [SPAN], and all of them, float16."""
        form, place, of_ring = self.form, jnp.arange(SPAN, dtype=jnp.int32), self.own < 0
        slot = self.split * SPAN + place
        in_window = self.in_window(slot)
        load_ring = functools.partial(self.load_rows, self.ring, slot, in_window)
        if self.rows is None:
            # Outside a branch, the compiler would take each chunk through shared memory before it loads the next.
            return in_window, jax.lax.cond(of_ring, load_ring, self.no_rows)
        row = (self.own + number * (form.splits - form.window_splits)) * SPAN + place
        if form.chosen:
            inside = (row >= 0) & (row < self.which.shape[1])
            row = plt.load(self.which.at[jnp.full_like(row, self.m), row], mask=inside, other=-1)
            visible = row >= 0
        else:
            visible = (row >= 0) & (row < self.which[self.m])
        # The compiler makes of the branches one load from a chosen address where both load float32.
        load = self.load_narrow if isinstance(self.rows, NarrowRows) else functools.partial(self.load_rows, self.rows)
        chunks = jax.lax.cond(of_ring, load_ring, functools.partial(load, row, visible))
        return jnp.where(of_ring, in_window, visible), chunks

    def in_window(self, slot: jax.Array) -> jax.Array:
        """Which slots of the ring hold a row that the query sees."""
        size, last = self.ring.shape[1], self.end[self.m] - 1
        held = last - jax.lax.rem(last - slot + size, jnp.full_like(slot, size))
        age = self.position[self.m] - held
        return (slot < size) & (held >= 0) & (age >= 0) & (age < self.form.window)

    def whose(self, place: jax.Array) -> jax.Array:
        """The query's sequence, in the shape of another index."""
        return jnp.full_like(place, self.sequence)

    def load_rows(self, ref: Any, row: jax.Array, seen: jax.Array) -> Chunks:
        """Chunks of the rows that are seen, zeros for the others."""
        chunks: Chunks = []
        for i, column in enumerate(self.form.columns):
            place = tile(row, column)
            mask = jnp.broadcast_to(seen[:, None], place[0].shape)
            x = plt.load(ref.at[self.whose(place[0]), *place], mask=mask, other=0.0)
            chunks.append(_halves(x.astype(jnp.float32)) if self.in_two(i) else (x.astype(jnp.float16),))
        return chunks

    def load_narrow(self, row: jax.Array, seen: jax.Array) -> Chunks:
        """What `load_rows` makes of narrow compressed rows, with the bits of the float32 rows."""
        chunks: Chunks = []
        for i, column in enumerate(self.form.columns):
            x = self.load_plain(i, row, seen)
            if self.form.rotates(i):
                place, rotates = tile(row, jnp.maximum(column - self.form.plain, 0)), column >= self.form.plain
                mask = jnp.broadcast_to(seen[:, None] & rotates[None, :], place[0].shape)
                rotated = plt.load(self.rows.turning.at[self.whose(place[0]), *place], mask=mask, other=0.0)
                x = jnp.where(jnp.broadcast_to(rotates[None, :], x.shape), rotated, x)
            chunks.append(_halves(x) if self.in_two(i) else (x.astype(jnp.float16),))
        return chunks

    def load_plain(self, chunk: int, row: jax.Array, seen: jax.Array) -> jax.Array:
        """A chunk of narrow rows float32, of which the columns that rotate mean nothing."""
        rows, column = self.rows, self.form.columns[chunk]
        last = rows.exponents.shape[2] - 1
        mask = seen[:, None] & (column < self.form.plain)[None, :]
        place = tile(row, column)
        codes = plt.load(rows.codes.at[self.whose(place[0]), *place], mask=mask, other=0)
        first = chunk * self.form.chunk // FP8_BLOCK
        blocks = range(first, ((chunk + 1) * self.form.chunk - 1) // FP8_BLOCK + 1)
        # A chunk has columns of two blocks at most; the last may lie behind the columns that have a scale.
        of_block = [
            scales(plt.load(rows.exponents.at[self.whose(row), row, jnp.full_like(row, min(block, last))], mask=seen, other=0))
            for block in blocks
        ]
        scale = jnp.broadcast_to(of_block[0][:, None], codes.shape)
        for block, other in zip(blocks[1:], of_block[1:], strict=True):
            later = jnp.broadcast_to((column >= block * FP8_BLOCK)[None, :], codes.shape)
            scale = jnp.where(later, jnp.broadcast_to(other[:, None], codes.shape), scale)
        return fp8_values(codes) * scale

    def no_rows(self) -> Chunks:
        """Zeros in the form of `load_rows`."""
        zeros = jnp.zeros((SPAN, self.form.chunk), jnp.float16)
        return [(zeros,) * (2 if self.in_two(i) else 1) for i in range(len(self.form.columns))]

    def in_two(self, chunk: int) -> bool:
        """Whether a row's chunk is the sum of two float16 numbers."""
        rows = self.rows.turning if isinstance(self.rows, NarrowRows) else self.rows
        return self.form.rotates(chunk) and any(held is not None and held.dtype == jnp.float32 for held in (self.ring, rows))

    def nothing(self) -> Parts:
        """The parts of no rows."""
        outs = tuple(jnp.zeros((HEADS, self.form.chunk), jnp.float32) for _ in self.form.columns)
        return jnp.full(HEADS, -jnp.inf, jnp.float32), jnp.zeros(HEADS, jnp.float32), outs

    def weigh(
        self, queries: Sequence[tuple[jax.Array, jax.Array]], seen: jax.Array, chunks: Chunks, top: jax.Array
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array], jax.Array]:
        """The largest score of a span and of `top`, the factor of older sums, the weights of the rows and their sum."""
        # Each chunk's scores are scaled on their own: one chain of all the products would be four times as long.
        dots = [_dot(q, kv, 1) for q, kv in zip(queries, chunks, strict=True)]
        scores = [self.times(dot, jnp.full_like(dot, self.form.scale * LOG2_E)) for dot in dots]
        score = functools.reduce(jnp.add, scores)
        score = jnp.where(jnp.broadcast_to(seen[None, :], score.shape), score, -jnp.inf)
        # Whole exponents, so that sums of several spans are scaled exactly.
        new = jnp.maximum(top, jnp.ceil(jnp.max(score, axis=-1)))
        finite = finite_top(new)
        weights = _halves(jnp.exp2(score - finite[:, None]))
        # Tensor cores add up in one order, however the weights lie in registers.
        ones = jnp.ones((SPAN, HEADS), jnp.float16)
        total = jnp.max(_dot(weights, (ones,), 0), axis=1)
        return new, power_of_two(top - finite), weights, total

    def weighted(
        self, weights: tuple[jax.Array, jax.Array], rows: tuple[jax.Array, ...], out: jax.Array, kept: jax.Array
    ) -> jax.Array:
        """A chunk of a span's weighted rows, added to those of older ones."""
        old = self.times(out, jnp.broadcast_to(kept[:, None], out.shape))
        return old + _dot(weights, rows, 0)

    def add(self, queries: Sequence[tuple[jax.Array, jax.Array]], span: tuple[jax.Array, Chunks], parts: Parts) -> Parts:
        """Parts with a span of rows added."""
        (seen, chunks), (top, total, outs) = span, parts
        new, kept, weights, own = self.weigh(queries, seen, chunks, top)
        outs = tuple(self.weighted(weights, kv, out, kept) for out, kv in zip(outs, chunks, strict=True))
        return new, self.times(total, kept) + own, outs

    def times(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """A product that is rounded by itself."""
        return arithmetic.multiply(a, b, interpret=self.form.interpret)

    def run(self, passes: jax.Array) -> Parts:
        """The parts of all the split's rows."""
        if self.form.longest == 1:
            # The rows are on their way while the queries are normed.
            span = self.span(jnp.zeros_like(passes))
            return self.add(self.queries(), span, self.nothing())
        queries = self.queries()
        parts: Parts = jax.lax.fori_loop(0, passes, lambda i, parts: self.add(queries, self.span(i), parts), self.nothing())
        return parts

    def store_state(self, top_ref: Any, total_ref: Any, top: jax.Array, total: jax.Array, number: jax.Array) -> None:
        """Store the largest scores and the sums of the weights."""
        heads = self.heads
        place, real = (jnp.full_like(heads, self.m), heads, jnp.full_like(heads, number)), heads < self.form.heads
        plt.store(top_ref.at[place], top, mask=real)
        plt.store(total_ref.at[place], total, mask=real)

    def store_outs(self, out_ref: Any, outs: Sequence[jax.Array], number: jax.Array) -> None:
        """Store the weighted rows."""
        for column, out in zip(self.form.columns, outs, strict=True):
            heads, column = tile(self.heads, column)
            place = (jnp.full_like(heads, self.m), heads, jnp.full_like(heads, number), column)
            plt.store(out_ref.at[place], out, mask=heads < self.form.heads)

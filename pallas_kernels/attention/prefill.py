"""Attention of a prefill: every row over its window and over compressed rows, with a sink; no array of rows by rows.

One program takes some heads of one query. All heads share the keys, which are values too, so the heads are the rows of the
products on the tensor cores and no query waits for another's choice of compressed rows. Rows come span by span, and sums are
rescaled as larger scores turn up. Operands are float16, which holds FP8-rounded rows exactly; sums are float32.

A program norms and rotates its queries after it loads them, and rotates its outputs back before it stores them. The queries of
4,096 rows of V4-Flash are 0.5 GB, so each pass over them that is a kernel of its own takes a quarter of a millisecond a layer.

Source of the ideas: FlashAttention's running softmax; the sparse attention of DeepSeek-V3.2, in which a token's heads are a tile.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.attention.split import Chosen, Compressed, Leading, tile
from pallas_kernels.attention.stored_rows import widen
from pallas_kernels.core import row_rounding

NAME = "attend_prefill"
CHUNK = 128

Parts = tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]


@dataclasses.dataclass(frozen=True)
class Tile:
    """How the work is cut; timed on an H200.

    Attributes:
        heads: of a query that one program takes.
        span: rows that it takes at a time.
        warps: of a program.
    """

    heads: int = 32
    span: int = 64
    warps: int = 4


@dataclasses.dataclass(frozen=True)
class _Form:
    tile: Tile
    heads: int
    dim: int
    rope: int
    window: int
    scale: float
    eps: float

    @property
    def chunk(self) -> int:
        """Columns of a chunk of a row."""
        return min(CHUNK, self.dim & -self.dim)

    @property
    def columns(self) -> list[jax.Array]:
        """Column numbers of each chunk of a row."""
        return [jnp.arange(self.chunk, dtype=jnp.int32) + first for first in range(0, self.dim, self.chunk)]


def _load(ref: Any, row: jax.Array, column: jax.Array, mask: jax.Array, *before: jax.Array) -> jax.Array:
    """A tile of rows [.., rows, columns], zeros where the mask [rows] says so."""
    place = tile(row, column)
    index = (*(jnp.broadcast_to(i, place[0].shape) for i in before), *place)
    return plt.load(ref.at[index], mask=jnp.broadcast_to(mask[:, None], place[0].shape), other=0.0)


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """a [M, K] with b over its `axis`, summed in float32."""
    return jax.lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


def _add(queries: list[jax.Array], keys: Any, row: jax.Array, seen: jax.Array, parts: Parts, form: _Form) -> Parts:
    """Parts with a span of rows added."""
    top, total, outs = parts
    chunks = [_load(keys, row, column, seen) for column in form.columns]
    scores = [_dot(q, kv, 1) for q, kv in zip(queries, chunks, strict=True)]
    score = functools.reduce(jnp.add, scores) * form.scale
    score = jnp.where(jnp.broadcast_to(seen[None, :], score.shape), score, -jnp.inf)
    new = jnp.maximum(top, jnp.max(score, axis=1))
    finite = jnp.where(new == -jnp.inf, 0.0, new)
    weight, kept = jnp.exp(score - finite[:, None]), jnp.exp(top - finite)
    low = weight.astype(jnp.float16)
    outs = tuple(out * kept[:, None] + _dot(low, kv, 0) for out, kv in zip(outs, chunks, strict=True))
    return new, total * kept + jnp.sum(weight, axis=1), outs


def _rotated(chunks: list[jax.Array], cos: Any, sin: Any, i: jax.Array, form: _Form, sign: int) -> list[jax.Array]:
    """A query's chunks [heads, columns] with the last columns rotated by `sign` times the angles of row i."""
    pair = jnp.arange(form.chunk // 2, dtype=jnp.int32)
    rotated = []
    for number, x in enumerate(chunks):
        before = (form.dim - form.rope - number * form.chunk) // 2
        if before < form.chunk // 2:
            mask, place = pair >= before, jnp.maximum(pair - before, 0)
            row = jnp.full_like(place, i)
            factors = (plt.load(cos.at[row, place], mask=mask, other=1.0), plt.load(sin.at[row, place], mask=mask, other=0.0))
            x = row_rounding.rotate(x, factors[0], sign * factors[1])
        rotated.append(x)
    return rotated


def _queries(q: Any, cos: Any, sin: Any, i: jax.Array, head: jax.Array, form: _Form) -> list[jax.Array]:
    """Chunks float16 [heads, columns] of row i's queries, normed and rotated."""
    chunks = [_load(q, head, column, head < form.heads, i) for column in form.columns]
    squares = functools.reduce(jnp.add, [jnp.sum(x * x, axis=1) for x in chunks])
    norm = jax.lax.rsqrt(squares / form.dim + form.eps)[:, None]
    return [x.astype(jnp.float16) for x in _rotated([x * norm for x in chunks], cos, sin, i, form, 1)]


def _kernel(*refs: Any, form: _Form, chosen: bool) -> None:
    q, cos, sin, keys, start, sink, *compressed, out = refs
    i, span = pl.program_id(0), form.tile.span
    head = pl.program_id(1) * form.tile.heads + jnp.arange(form.tile.heads, dtype=jnp.int32)
    real, place = head < form.heads, jnp.arange(span, dtype=jnp.int32)
    queries = _queries(q, cos, sin, i, head, form)

    def window(number: jax.Array, parts: Parts) -> Parts:
        offset = number * span + place
        row = i + 1 + offset
        # Of the rows before the call's own, the last `start` are there.
        return _add(queries, keys, row, (offset < form.window) & (row >= form.window - start[0]), parts, form)

    zeros = tuple(jnp.zeros((form.tile.heads, column.shape[0]), jnp.float32) for column in form.columns)
    parts: Parts = (jnp.full(form.tile.heads, -jnp.inf, jnp.float32), jnp.zeros(form.tile.heads, jnp.float32), zeros)
    parts = jax.lax.fori_loop(0, pl.cdiv(form.window, span), window, parts)
    if compressed:
        rows, *index, visible = compressed
        count = jnp.minimum(visible[i], index[0].shape[1] if chosen else rows.shape[0])

        def more(number: jax.Array, parts: Parts) -> Parts:
            row = number * span + place
            seen = row < count
            if chosen:
                row = plt.load(index[0].at[jnp.full_like(row, i), row], mask=seen, other=0)
            return _add(queries, rows, row, seen, parts, form)

        parts = jax.lax.fori_loop(0, (count + (span - 1)) // span, more, parts)
    top, total, outs = parts
    sinks = plt.load(sink.at[head], mask=real, other=0.0)
    top_of_all = jnp.maximum(top, sinks)
    kept = jnp.exp(top - top_of_all)
    share = kept / (total * kept + jnp.exp(sinks - top_of_all))
    shared = [x * share[:, None] for x in outs]
    for column, x in zip(form.columns, _rotated(shared, cos, sin, i, form, -1), strict=True):
        place_out = tile(head, column)
        index_out = (jnp.full_like(place_out[0], i), *place_out)
        mask = jnp.broadcast_to(real[:, None], x.shape)
        plt.store(out.at[index_out], x.astype(out.dtype), mask=mask)


def attend_prefill(
    q: jax.Array, cos: jax.Array, sin: jax.Array, keys: jax.Array, start: jax.Array, sink: jax.Array,
    compressed: Compressed | None = None, visible: jax.Array | None = None,
    *, window: int, scale: float, eps: float, dtype: Any = jnp.float16, tile: Tile | None = None, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """Attend from T consecutive rows of one sequence to their windows and to compressed rows.

    Each head's query is divided by its root mean square and rotated; the output is rotated back.

    Args:
        q: float32 [T, H, Q].
        cos, sin: float32 [T, R/2] of each row's angles; the last R columns of a head rotate.
        keys: float16 [W + T, Q]: the W = `window` rows before the call's first one, then the call's own.
        start: int32 [1], rows of the sequence before the call; of the rows before it no more than these are looked at.
        sink: float32 [H], a logit that takes part in the denominator alone.
        compressed: float16 rows [1, S, Q]: the first ones (`Leading`), or each query's own (`Chosen`).
        visible: int32 [T] with `Chosen`: how many of a row's indices, its first, name a row. `Leading` has its own.
        window: rows that a query sees, its own included.
        scale: what scores are multiplied with.
        eps: added to the mean square of a query.
        dtype: static, of the output.

    Returns:
        `dtype` [T, H, Q].

    Raises:
        ValueError: shapes or types that do not fit.

    Source: `Attention` of the reference inference code and the V4 report.
    """
    t, heads, dim = q.shape
    if keys.shape != (window + t, dim) or q.dtype != jnp.float32 or keys.dtype != jnp.float16:
        raise ValueError(f"keys are {keys.dtype}{list(keys.shape)}; float16 [{window + t}, {dim}] are needed")
    extra: tuple[jax.Array, ...] = ()
    if isinstance(compressed, Leading):
        extra = (widen(compressed.rows)[0], compressed.visible)
    elif isinstance(compressed, Chosen):
        if visible is None:
            raise ValueError("visible is missing; chosen rows need the number of each query's")
        extra = (widen(compressed.rows)[0], compressed.index, visible)
    tile = tile or Tile()
    tile = dataclasses.replace(tile, heads=min(tile.heads, max(pl.next_power_of_2(heads), 16)))
    form = _Form(tile, heads, dim, 2 * cos.shape[1], window, scale, eps)
    out: jax.Array = pl.pallas_call(
        functools.partial(_kernel, form=form, chosen=isinstance(compressed, Chosen)),
        out_shape=jax.ShapeDtypeStruct(q.shape, dtype),
        grid=(t, pl.cdiv(heads, tile.heads)),
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=2),
        interpret=interpret,
        name=NAME,
    )(q, cos, sin, keys, start, sink, *extra)
    return out

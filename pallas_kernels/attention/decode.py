"""Attention of a decode step's few rows over the window ring and the compressed rows, with a sink.

The rows that a query may see are split over programs: one takes 16 heads and one span of rows at a time, and leaves the largest
score, the sum of the weights and the weighted rows. A second kernel adds the splits up in a fixed order, rotates the result back
and quantises it. Which spans are a split's depends on the arrays' sizes alone, so that row m of any call has the bits of the same
row alone.

Source of the idea: Flash-Decoding.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.attention.split import HEADS, Chosen, Compressed, Form, Leading, split_kernel, tile
from pallas_kernels.attention.stored_rows import NarrowRows
from pallas_kernels.core import rotary
from pallas_kernels.formats import BLOCK, HALF, WORDS
from pallas_kernels.linear.activation import Activation, quantize_blocks

SPLIT_NAME = "attend_split"
COMBINE_NAME = "attend_combine"
SPLIT_WARPS = 8
COMBINE_WARPS = 4
# Splits that the combining kernel holds at once.
TOGETHER = 32

__all__ = ["COMBINE_NAME", "SPLIT_NAME", "Chosen", "Compressed", "Leading", "attend"]


def _combine_kernel(*refs: Any, form: Form, groups: int) -> None:
    top_ref, total_ref, part_ref, sink_ref, cos_ref, sin_ref, out_ref, quants_ref, scales_ref = refs
    m, head, chunk = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    width = min(TOGETHER, pl.next_power_of_2(form.splits))
    splits = [jnp.arange(width, dtype=jnp.int32) + first for first in range(0, form.splits, width)]

    def load(ref: Any, split: jax.Array, other: float) -> jax.Array:
        place = (jnp.full_like(split, m), jnp.full_like(split, head), split)
        return plt.load(ref.at[place], mask=split < form.splits, other=other)

    tops = [load(top_ref, split, -jnp.inf) for split in splits]
    totals = [load(total_ref, split, 0.0) for split in splits]
    sink = sink_ref[head]
    top_of_all = functools.reduce(jnp.maximum, [jnp.max(top) for top in tops], sink)
    weights = [jnp.exp(top - top_of_all) for top in tops]
    whole = functools.reduce(jnp.add, [jnp.sum(t * w) for t, w in zip(totals, weights, strict=True)], jnp.exp(sink - top_of_all))

    def add_up(column: jax.Array, wanted: jax.Array) -> jax.Array:
        total = jnp.zeros(column.shape, jnp.float32)
        for split, top, weight in zip(splits, tops, weights, strict=True):
            place = tile(split, column)
            index = (jnp.full_like(place[0], m), jnp.full_like(place[0], head), *place)
            # A split without rows has stored none.
            mask = (top > -jnp.inf)[:, None] & wanted[None, :]
            total += jnp.sum(plt.load(part_ref.at[index], mask=mask, other=0.0) * weight[:, None], axis=0)
        return total

    column = chunk * form.chunk + jnp.arange(form.chunk, dtype=jnp.int32)
    cos, sin = rotary.factors(cos_ref, sin_ref, m, column, form.plain, inverse=True)
    sums, partners = add_up(column, column >= 0), add_up(column ^ 1, column >= form.plain)
    out = rotary.rotate_columns(sums, partners, cos, sin, interpret=form.interpret) / whole
    plt.store(out_ref.at[m, head, pl.ds(chunk * form.chunk, form.chunk)], out)

    blocks, a_group = form.chunk // BLOCK, form.heads // groups
    words, scales = quantize_blocks(out.reshape(blocks, WORDS, 4), interpret=form.interpret)
    group, first = head // a_group, (head % a_group) * (form.dim // BLOCK) + chunk * blocks
    words = words.reshape(blocks, 2, HALF)
    block, half, word = (jax.lax.broadcasted_iota(jnp.int32, words.shape, axis) for axis in range(3))
    plt.store(quants_ref.at[jnp.full_like(block, m), jnp.full_like(block, group), half, first + block, word], words)
    plt.store(scales_ref.at[m, group, pl.ds(first, blocks)], scales)


@functools.partial(jax.jit, static_argnames=("window", "groups", "scale", "eps", "interpret"))
def attend(
    q: jax.Array, sink: jax.Array, cos: jax.Array, sin: jax.Array, ring: jax.Array, sequence: jax.Array, position: jax.Array,
    end: jax.Array, compressed: Compressed | None = None, *, window: int, groups: int, scale: float, eps: float,
    interpret: bool = False,
) -> tuple[jax.Array, Activation]:  # fmt: skip
    """Attend from M rows to the window and to compressed rows: two launches.

    Each head's query is divided by its root mean square and rotated; the output is rotated back.

    Args:
        q: float32 [M, H·Q], Q a multiple of 32.
        sink: float32 [H], a logit that takes part in the denominator alone.
        cos, sin: float32 [M, R/2] of each row's angles; the last R columns of a head rotate.
        ring: [B, ring, Q], the windows' rows; position p lies in slot p modulo ring, this call's rows included.
        sequence: int32 [M], which of the B sequences a row belongs to; it sees nothing of the others.
        position: int32 [M].
        end: int32 [M], rows of the row's sequence in the cache after this call. A row sees at least its own position.
        window: rows that a query sees of the ring, its own included.
        groups: groups of heads that are quantised apart, for the grouped output projection.
        scale: what scores are multiplied with.

    Returns:
        float32 [M, H·Q], and the same quantised, `groups` groups a row.

    Source: `Attention` of the reference inference code and the V4 report.
    """
    m, (heads,), dim = q.shape[0], sink.shape, ring.shape[-1]
    if dim % BLOCK:
        raise ValueError(f"a head has {dim} columns; blocks have {BLOCK}")
    stored = None if compressed is None else compressed.rows
    if isinstance(stored, NarrowRows) and stored.turning.shape[2] != 2 * cos.shape[1]:
        raise ValueError(f"{2 * cos.shape[1]} columns rotate; the narrow rows have {stored.turning.shape[2]} that do")
    sizes = {"heads": heads, "dim": dim, "rope": 2 * cos.shape[1], "window": window, "scale": scale, "eps": eps}
    form = Form.of(ring.shape[1], compressed, interpret=interpret, **sizes)
    extra = () if compressed is None else tuple(jax.tree.leaves(compressed))
    state = jax.ShapeDtypeStruct((m, heads, form.splits), jnp.float32)
    parts = pl.pallas_call(
        functools.partial(split_kernel, form=form, compressed=compressed is not None),
        out_shape=(state, state, jax.ShapeDtypeStruct((m, heads, form.splits, dim), jnp.float32)),
        grid=(m, pl.cdiv(heads, HEADS), form.splits),
        compiler_params=plt.CompilerParams(num_warps=SPLIT_WARPS, num_stages=1),
        interpret=interpret,
        name=SPLIT_NAME,
    )(sequence, q.reshape(m, heads, dim), cos, sin, position, end, ring, *extra)
    blocks = heads // groups * dim // BLOCK
    outputs = (
        jax.ShapeDtypeStruct((m, heads, dim), jnp.float32),
        jax.ShapeDtypeStruct((m, groups, 2, blocks, HALF), jnp.int32),
        jax.ShapeDtypeStruct((m, groups, blocks), jnp.float32),
    )
    out, quants, scales = pl.pallas_call(
        functools.partial(_combine_kernel, form=form, groups=groups),
        out_shape=outputs,
        grid=(m, heads, dim // form.chunk),
        compiler_params=plt.CompilerParams(num_warps=COMBINE_WARPS, num_stages=1),
        interpret=interpret,
        name=COMBINE_NAME,
    )(*parts, sink, cos, sin)
    return out.reshape(m, heads * dim), Activation(quants, scales)

"""Attention of a decode step's few rows over the window ring and the compressed rows, with a sink.

The rows that a query may see are split over programs: one takes 16 heads and one span of rows at a time, and leaves the largest
score, the sum of the weights and the weighted rows. A second kernel adds the splits up in a fixed order, rotates the result back
and quantises it. Which spans are a split's depends on the arrays' sizes alone, so that row m of any call has the bits of the same
row alone.

Source of the idea: Flash-Decoding.
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

from pallas_kernels.attention.split import GROUP, HEADS, LOG2_E, Chosen, Compressed, Form, Leading, group_kernel, merge, power_of_two, split_kernel, tile
from pallas_kernels.attention.stored_rows import NarrowRows
from pallas_kernels.core import arithmetic, rotary
from pallas_kernels.formats import BLOCK, HALF, WORDS
from pallas_kernels.linear.activation import Activation, quantize_blocks

SPLIT_NAME = "attend_split"
COMBINE_NAME = "attend_combine"
SPLIT_WARPS = 8
COMBINE_WARPS = 4
WAY = lambda m: (True, 16, 4, 1) if m >= 8 else (False, HEADS, SPLIT_WARPS, 1)
CHUNKS = 1

__all__ = ["COMBINE_NAME", "SPLIT_NAME", "Chosen", "Compressed", "Leading", "attend"]


def _combine_kernel(*refs: Any, form: Form, groups: int, grouped: bool, width: int, chunks: int) -> None:
    """`grouped`: the parts are of groups of splits."""
    m, head, first = pl.program_id(0), pl.program_id(1), pl.program_id(2) * chunks
    for i in range(chunks):
        _combine_chunk(refs, form, groups, grouped, width, m, head, first + i)


def sum_rows(x: jax.Array, interpret: bool) -> jax.Array:
    """Sum over the first axis. A CPU's compiler would choose the order by what comes before."""
    return functools.reduce(jnp.add, list(x)) if interpret else jnp.sum(x, axis=0)


def _combine_chunk(
    refs: Sequence[Any], form: Form, groups: int, grouped: bool, width: int, m: jax.Array, head: jax.Array, chunk: jax.Array
) -> None:
    top_ref, total_ref, part_ref, sink_ref, cos_ref, sin_ref, out_ref, quants_ref, scales_ref = refs
    column = chunk * width + jnp.arange(width, dtype=jnp.int32)
    group, count = jnp.arange(pl.next_power_of_2(form.groups), dtype=jnp.int32), part_ref.shape[2]

    def load(split: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """A part of each group: the largest score, and sums: of weights, of weighted rows, and of their pairs' other values."""
        place = (jnp.full_like(split, m), jnp.full_like(split, head), split)
        top = plt.load(top_ref.at[place], mask=split < count, other=-jnp.inf)
        total = plt.load(total_ref.at[place], mask=split < count, other=0.0)
        # A split without rows has stored none.
        there = (top != -jnp.inf)[:, None]
        outs = []
        for columns, wanted in ((column, column >= 0), (column ^ 1, column >= form.plain)):
            places = tile(split, columns)
            index = (jnp.full_like(places[0], m), jnp.full_like(places[0], head), *places)
            outs.append(plt.load(part_ref.at[index], mask=there & wanted[None, :], other=0.0))
        return top, [total, *outs]

    if grouped:
        top, (total, *outs) = load(group)
    else:
        top, total = jnp.full(group.shape, -jnp.inf, jnp.float32), jnp.zeros(group.shape, jnp.float32)
        outs = [jnp.zeros((group.shape[0], width), jnp.float32)] * 2
        for own, others in [load(group * GROUP + i) for i in range(GROUP)]:
            top, (total, *outs) = merge(top, own, [total, *outs], others, form.interpret)
    times = functools.partial(arithmetic.multiply, interpret=form.interpret)
    sink = times(jnp.full_like(top, sink_ref[head]), jnp.full_like(top, LOG2_E))
    top_of_all = jnp.maximum(jnp.max(top), jnp.ceil(jnp.max(sink)))
    weight = power_of_two(top - top_of_all)
    whole = sum_rows(times(total, weight), form.interpret) + jnp.max(jnp.exp2(sink - top_of_all))
    cos, sin = rotary.factors(cos_ref, sin_ref, m, column, form.plain, inverse=True)
    out, partner = (sum_rows(times(out, jnp.broadcast_to(weight[:, None], out.shape)), form.interpret) for out in outs)
    out = rotary.rotate_columns(out, partner, cos, sin, interpret=form.interpret) / whole
    plt.store(out_ref.at[m, head, pl.ds(chunk * width, width)], out)

    blocks, a_group = width // BLOCK, form.heads // groups
    words, scales = quantize_blocks(out.reshape(blocks, WORDS, 4), interpret=form.interpret)
    of_head, first = head // a_group, (head % a_group) * (form.dim // BLOCK) + chunk * blocks
    words = words.reshape(blocks, 2, HALF)
    block, half, word = (jax.lax.broadcasted_iota(jnp.int32, words.shape, axis) for axis in range(3))
    plt.store(quants_ref.at[jnp.full_like(block, m), jnp.full_like(block, of_head), half, first + block, word], words)
    plt.store(scales_ref.at[m, of_head, pl.ds(first, blocks)], scales)


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
    grouped, taken, warps, cut = WAY(m)
    form = dataclasses.replace(form, tile=taken)
    count = form.groups if grouped else form.splits
    state = jax.ShapeDtypeStruct((m, heads, count), jnp.float32)
    body = functools.partial(group_kernel, parts=cut) if grouped else split_kernel
    parts = pl.pallas_call(
        functools.partial(body, form=form, compressed=compressed is not None),
        out_shape=(state, state, jax.ShapeDtypeStruct((m, heads, count, dim), jnp.float32)),
        grid=(m, pl.cdiv(heads, taken), count * cut),
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name=SPLIT_NAME,
    )(sequence, q.reshape(m, heads, dim), cos, sin, position, end, ring, *extra)
    blocks = heads // groups * dim // BLOCK
    outputs = (
        jax.ShapeDtypeStruct((m, heads, dim), jnp.float32),
        jax.ShapeDtypeStruct((m, groups, 2, blocks, HALF), jnp.int32),
        jax.ShapeDtypeStruct((m, groups, blocks), jnp.float32),
    )
    width, chunks = form.chunk, CHUNKS
    out, quants, scales = pl.pallas_call(
        functools.partial(_combine_kernel, form=form, groups=groups, grouped=grouped, width=width, chunks=chunks),
        out_shape=outputs,
        grid=(m, heads, dim // width // chunks),
        compiler_params=plt.CompilerParams(num_warps=COMBINE_WARPS, num_stages=1),
        interpret=interpret,
        name=COMBINE_NAME,
    )(*parts, sink, cos, sin)
    return out.reshape(m, heads * dim), Activation(quants, scales)

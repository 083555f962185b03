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
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.attention.split import (
    GROUPS,
    HEADS,
    LOG2_E,
    Chosen,
    Compressed,
    Form,
    Leading,
    group_kernel,
    merge,
    power_of_two,
    split_kernel,
    tile,
)
from pallas_kernels.attention.stored_rows import NarrowRows
from pallas_kernels.core import arithmetic, rotary
from pallas_kernels.formats import BLOCK, HALF, WORDS
from pallas_kernels.linear.activation import Activation, quantize_blocks

SPLIT_NAME = "attend_split"
COMBINE_NAME = "attend_combine"
SPLIT_WARPS = 4
# Programs of groups of splits with which a GPU is busy. With fewer, each split has a program.
GROUP_PROGRAMS = 256
# Maximum rows of which the combining kernel's programs have four warps; those of more rows have one.
FEW_ROWS = 2

__all__ = ["COMBINE_NAME", "SPLIT_NAME", "Chosen", "Compressed", "Leading", "attend"]


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Parts of one head of one row, and some columns of their weighted rows."""

    m: jax.Array
    head: jax.Array
    column: jax.Array
    top: Any
    total: Any
    out: Any
    form: Form

    def load(self, number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The largest scores and the sums of weights of parts with numbers int32 [n], and their weighted rows [n, columns]."""
        count = self.out.shape[2]
        place = (jnp.full_like(number, self.m), jnp.full_like(number, self.head), number)
        top = plt.load(self.top.at[place], mask=number < count, other=-jnp.inf)
        total = plt.load(self.total.at[place], mask=number < count, other=0.0)
        places = tile(number, self.column)
        index = (jnp.full_like(places[0], self.m), jnp.full_like(places[0], self.head), *places)
        real = jnp.broadcast_to((number < count)[:, None], places[0].shape)
        out = plt.load(self.out.at[index], mask=real, other=0.0)
        # A split without rows has stored none. A mask would keep these loads waiting for the scores.
        return top, total, jnp.where((top != -jnp.inf)[:, None], out, 0.0)

    def groups(self, grouped: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The parts of every group, of which the kernel of splits has left those of single splits."""
        form, number = self.form, jnp.arange(GROUPS, dtype=jnp.int32)
        if grouped:
            return self.load(number)
        top, total = jnp.full(GROUPS, -jnp.inf, jnp.float32), jnp.zeros(GROUPS, jnp.float32)
        out = jnp.zeros((GROUPS, self.column.shape[0]), jnp.float32)
        for i in range(form.in_group):
            # Past the last split of all there is nothing; splits of the next group are not this one's.
            own, *others = self.load(number * form.in_group + i)
            top, (total, out) = merge(top, own, [total, out], others, form.interpret)
        return top, total, out


def _sum_groups(x: jax.Array, interpret: bool) -> jax.Array:
    """Sum over the groups, the first axis, one after the other: the others are zeros, so that a sum over all is exact."""
    if interpret:
        return functools.reduce(jnp.add, list(x), jnp.zeros(x.shape[1:], jnp.float32))
    number = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    rows = [jnp.sum(jnp.where(number == i, x, 0.0), axis=0) for i in range(GROUPS)]
    return functools.reduce(jnp.add, rows, jnp.zeros_like(rows[0]))


def _pairs(x: jax.Array) -> jax.Array:
    """Each column's partner, that of column ^ 1, of x [n]. A sum with zeros is exact."""
    pairs = x.reshape(x.shape[0] // 2, 2)
    second = jax.lax.broadcasted_iota(jnp.int32, pairs.shape, 1) == 1
    even, odd = (jnp.sum(jnp.where(second == wanted, pairs, 0.0), axis=1) for wanted in (False, True))
    return jnp.where(second, even[:, None], odd[:, None]).reshape(x.shape)


def _combine_kernel(*refs: Any, form: Form, groups: int, grouped: bool) -> None:
    """`grouped`: the parts are of groups of splits."""
    top_ref, total_ref, part_ref, sink_ref, cos_ref, sin_ref, out_ref, quants_ref, scales_ref = refs
    m, head, chunk, width = pl.program_id(0), pl.program_id(1), pl.program_id(2), form.chunk
    column = chunk * width + jnp.arange(width, dtype=jnp.int32)
    times = functools.partial(arithmetic.multiply, interpret=form.interpret)
    top, total, out = _Parts(m, head, column, top_ref, total_ref, part_ref, form).groups(grouped)
    sink = times(jnp.full_like(top, sink_ref[head]), jnp.full_like(top, LOG2_E))
    top_of_all = jnp.maximum(jnp.max(top), jnp.ceil(jnp.max(sink)))
    weight = power_of_two(top - top_of_all)
    whole = _sum_groups(times(total, weight), form.interpret) + jnp.max(jnp.exp2(sink - top_of_all))
    out = _sum_groups(times(out, jnp.broadcast_to(weight[:, None], out.shape)), form.interpret)
    cos, sin = rotary.factors(cos_ref, sin_ref, m, column, form.plain, inverse=True)
    out = rotary.rotate_columns(out, _pairs(out), cos, sin, interpret=form.interpret) / whole
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
    tiles = pl.cdiv(heads, HEADS)
    grouped = form.longest == 1 and m * tiles * form.groups >= GROUP_PROGRAMS
    count = form.groups if grouped else form.splits
    state = jax.ShapeDtypeStruct((m, heads, count), jnp.float32)
    parts = pl.pallas_call(
        functools.partial(group_kernel if grouped else split_kernel, form=form, compressed=compressed is not None),
        out_shape=(state, state, jax.ShapeDtypeStruct((m, heads, count, dim), jnp.float32)),
        grid=(m, tiles, count),
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
        functools.partial(_combine_kernel, form=form, groups=groups, grouped=grouped),
        out_shape=outputs,
        grid=(m, heads, dim // form.chunk),
        compiler_params=plt.CompilerParams(num_warps=4 if m <= FEW_ROWS else 1, num_stages=1),
        interpret=interpret,
        name=COMBINE_NAME,
    )(*parts, sink, cos, sin)
    return out.reshape(m, heads * dim), Activation(quants, scales)

"""Attention of a decode step's few rows over the window ring and the compressed rows, with a sink.

The rows that a query may see are split over programs: one takes 16 heads and one span of rows at a time, and leaves the largest
score, the sum of the weights and the weighted rows. In a call of many rows, a program takes a group of splits one after the other
and adds them up. A second kernel adds up what is left, first the splits of a group and then the groups, rotates the result back
and quantises it. Which spans are a split's, and which splits a group's, depends on the arrays' sizes alone. So sums have one
order, and row m of any call has the bits of the same row alone.

Source of the idea: Flash-Decoding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.attention.combine import combine_kernel
from pallas_kernels.attention.merge import merge
from pallas_kernels.attention.split import HEADS, Chosen, Compressed, Form, Leading, Parts, Split
from pallas_kernels.attention.stored_rows import NarrowRows
from pallas_kernels.formats import BLOCK, HALF
from pallas_kernels.linear.activation import Activation

SPLIT_NAME = "attend_split"
COMBINE_NAME = "attend_combine"
SPLIT_WARPS = 4
# Programs of groups of splits with which a GPU is busy. With fewer, each split has a program.
GROUP_PROGRAMS = 256
# Maximum rows of which the combining kernel's programs have four warps; those of more rows have one.
FEW_ROWS = 2

__all__ = ["COMBINE_NAME", "SPLIT_NAME", "Chosen", "Compressed", "Leading", "attend"]


def _programs(refs: Sequence[Any], form: Form, compressed: bool) -> tuple[Callable[[jax.Array], Split], Sequence[Any]]:
    """The program's part of a split, by the split's number, and the references of results."""
    sequence, q, cos, sin, position, end, ring, *extra, top_ref, total_ref, out_ref = refs
    *leaves, which = extra if compressed else (None, None)
    rows = leaves[0] if len(leaves) == 1 else NarrowRows(*leaves)
    m, tile = pl.program_id(0), pl.program_id(1)
    operands = sequence[m], q, cos, sin, position, end, ring, rows, which
    return lambda split: Split(form, m, tile, split, *operands), (top_ref, total_ref, out_ref)


def _split_kernel(*refs: Any, form: Form, compressed: bool) -> None:
    """The body of a program of one split; its operands are sequences, the fields of `Split` from q on, then the results."""
    of, (top_ref, total_ref, out_ref) = _programs(refs, form, compressed)
    split = pl.program_id(2)
    program = of(split)
    passes = program.passes()

    @pl.when(passes == 0)
    def nothing() -> None:
        top, total, _ = program.nothing()
        program.store_state(top_ref, total_ref, top, total, split)

    @pl.when(passes > 0)
    def something() -> None:
        top, total, outs = program.run(passes)
        program.store_state(top_ref, total_ref, top, total, split)
        program.store_outs(out_ref, outs, split)


def _group_kernel(*refs: Any, form: Form, compressed: bool) -> None:
    """The body of a program that takes the splits of a group one after the other and adds them up; a split has one span."""
    of, (top_ref, total_ref, out_ref) = _programs(refs, form, compressed)
    group = pl.program_id(2)
    start = group * form.in_group
    last = jnp.minimum(start + form.in_group, form.splits)
    first = of(start)
    queries = first.queries()

    def one(split: jax.Array, parts: Parts) -> Parts:
        (top, total, outs), program = parts, of(split)
        own, own_total, own_outs = program.add(queries, program.span(jnp.zeros_like(split)), program.nothing())
        top, (total, *made) = merge(top, own, [total, *outs], [own_total, *own_outs], form.interpret)
        return top, total, tuple(made)

    top, total, outs = jax.lax.fori_loop(start, last, one, first.nothing())
    first.store_state(top_ref, total_ref, top, total, group)
    first.store_outs(out_ref, outs, group)


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
        functools.partial(_group_kernel if grouped else _split_kernel, form=form, compressed=compressed is not None),
        out_shape=(state, state, jax.ShapeDtypeStruct((m, heads, count, dim), jnp.float32)),
        grid=(m, tiles, count),
        compiler_params=plt.CompilerParams(num_warps=SPLIT_WARPS, num_stages=1),
        interpret=interpret,
        name=SPLIT_NAME,
    )(sequence, q.reshape(m, heads, dim), cos, sin, position, end, ring, *extra)
    return _combined(form, groups, grouped, *parts, sink, cos, sin)


def _combined(form: Form, groups: int, grouped: bool, *operands: jax.Array) -> tuple[jax.Array, Activation]:
    """The second launch."""
    (m, heads, _), dim = operands[0].shape, form.dim
    blocks = heads // groups * dim // BLOCK
    outputs = (
        jax.ShapeDtypeStruct((m, heads, dim), jnp.float32),
        jax.ShapeDtypeStruct((m, groups, 2, blocks, HALF), jnp.int32),
        jax.ShapeDtypeStruct((m, groups, blocks), jnp.float32),
    )
    out, quants, scales = pl.pallas_call(
        functools.partial(combine_kernel, form=form, groups=groups, grouped=grouped),
        out_shape=outputs,
        grid=(m, heads, dim // form.chunk),
        compiler_params=plt.CompilerParams(num_warps=4 if m <= FEW_ROWS else 1, num_stages=1),
        interpret=form.interpret,
        name=COMBINE_NAME,
    )(*operands)
    return out.reshape(m, heads * dim), Activation(quants, scales)

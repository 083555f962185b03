"""The second kernel of a decode step's attention: adds up the parts of the splits, rotates the result back and quantises it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.attention.merge import LOG2_E, merge, power_of_two
from pallas_kernels.attention.split import GROUPS, Form, tile
from pallas_kernels.core import arithmetic, rotary
from pallas_kernels.formats import BLOCK, HALF, WORDS
from pallas_kernels.linear.activation import quantize_blocks


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


def combine_kernel(*refs: Any, form: Form, groups: int, grouped: bool) -> None:
    """The kernel's body: some columns of one head of one row. `grouped`: the parts are of groups of splits."""
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

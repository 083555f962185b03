"""Some matrices of a stack of quantised ones in bfloat16, for products of many rows: read once, written once, no values between.

A thread owns a word of quants, or one pattern, and writes its weights in runs of four or eight that are whole sectors together
with its neighbours'. The values are those of `Quantized.dequantize`, whose one rounding is followed by that to bfloat16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.arithmetic import pick_bytes
from pallas_kernels.expert_lanes import NEGATIVE, POSITIVE, power_of_two, twice_e2m1
from pallas_kernels.formats import IQ2_XXS, MXFP4, Q2_K, Q4_K, Q8_0, Quantized
from pallas_kernels.formats.iq2_xxs import selectors

NAME = "expand"
WARPS = 4
# Units of a thread: their loads are on their way together.
UNITS = 4

# Where a run of weights begins in the flat matrix, int32 [B], and its values, float32 [B, 4 or 8].
Run = tuple[jax.Array, jax.Array]


def _run(words: jax.Array, mask: int | None = None) -> jax.Array:
    """The four bytes of each word, float32 [B, 4]: signed, or the unsigned bits under a mask."""
    byte = jax.lax.broadcasted_iota(jnp.int32, (words.shape[0], 4), 1)
    if mask is None:
        return ((words[:, None] << (24 - 8 * byte)) >> 24).astype(jnp.float32)
    return ((words[:, None] >> (8 * byte)) & mask).astype(jnp.float32)


def _iq2(refs: Any, expert: jax.Array, unit: jax.Array, *, values: int, interpret: bool) -> list[Run]:
    indices, signs, factors, scales, table = refs
    word, group = unit >> 2, unit & 3
    pattern = plt.load(table.at[(plt.load(indices.at[expert, word]) >> (8 * group)) & 255])
    # The sign of a weight becomes the bit of its selector that chooses among the constants below zero.
    selector = pattern | (((plt.load(signs.at[expert, word]) >> group) & 0x11111111) << 2)
    low, high = (pick_bytes(POSITIVE, NEGATIVE, half, interpret=interpret) for half in (selector, selector >> 16))
    byte = jax.lax.broadcasted_iota(jnp.int32, (unit.shape[0], 8), 1)
    words = jnp.where(byte < 4, low[:, None], high[:, None])
    weights = ((words << (24 - 8 * (byte & 3))) >> 24).astype(jnp.float32)
    factor = ((plt.load(factors.at[expert, word >> 2]).astype(jnp.int32) >> (4 * (word & 3))) & 15) * 2 + 1
    step = plt.load(scales.at[expert, word >> 3]).astype(jnp.float32) * 0.125 * factor.astype(jnp.float32)
    return [(unit * 8, weights * step[:, None])]


def _k_run(quants: jax.Array, mask: int, factor: jax.Array, offset: jax.Array, scale: jax.Array, minimum: jax.Array) -> jax.Array:
    """Both products are exact, so that it is all the same whether the difference is fused with one of them."""
    step, below = scale * factor.astype(jnp.float32), minimum * offset.astype(jnp.float32)
    return step[:, None] * _run(quants, mask) - below[:, None]


def _q2(refs: Any, expert: jax.Array, unit: jax.Array, *, values: int, interpret: bool) -> list[Run]:
    quants, groups, scales, minima = refs
    lane = unit >> 2
    quant, group = plt.load(quants.at[expert, unit]), plt.load(groups.at[expert, lane])
    scale, minimum = (plt.load(plane.at[expert, lane >> 2]).astype(jnp.float32) for plane in (scales, minima))
    first = (lane >> 1) * 128 + (lane & 1) * 16 + (unit & 3) * 4
    return [
        (
            first + 32 * s,
            _k_run(quant >> (2 * s), 3, (group >> (8 * s)) & 15, (group >> (8 * s + 4)) & 15, scale, minimum),
        )
        for s in range(4)
    ]


def _q4(refs: Any, expert: jax.Array, unit: jax.Array, *, values: int, interpret: bool) -> list[Run]:
    quants, groups, scales, minima = refs
    lane, half, word = unit >> 3, (unit >> 2) & 1, unit & 3
    quant, group = plt.load(quants.at[expert, half * (values // 16) + lane * 4 + word]), plt.load(groups.at[expert, lane])
    scale, minimum = (plt.load(plane.at[expert, lane >> 2]).astype(jnp.float32) for plane in (scales, minima))
    first = lane * 64 + half * 16 + word * 4
    return [
        (
            first + 32 * n,
            _k_run(quant >> (4 * n), 15, (group >> (8 * n)) & 63, (group >> (8 * n + 16)) & 63, scale, minimum),
        )
        for n in range(2)
    ]


def _mx(refs: Any, expert: jax.Array, unit: jax.Array, *, values: int, interpret: bool) -> list[Run]:
    quants, exponents = refs
    quant, block = plt.load(quants.at[expert, unit]), unit >> 2
    scale = power_of_two(plt.load(exponents.at[expert, block]))
    first = block * 32 + (unit & 3) * 4
    codes = ((quant >> (4 * n)) & 0x0F0F0F0F for n in range(2))
    return [(first + 16 * n, _run(twice_e2m1(code, interpret=interpret)) * scale[:, None]) for n, code in enumerate(codes)]


def _q8(refs: Any, expert: jax.Array, unit: jax.Array, *, values: int, interpret: bool) -> list[Run]:
    quants, scales = refs
    block, half, word = unit >> 3, (unit >> 2) & 1, unit & 3
    quant = plt.load(quants.at[expert, half * (values // 8) + block * 4 + word])
    return [(unit * 4, _run(quant) * plt.load(scales.at[expert, block]).astype(jnp.float32)[:, None])]


# How a unit of each format is expanded, and how many weights it has.
OF: dict[type[Quantized], tuple[Callable[..., list[Run]], int]] = {
    IQ2_XXS: (_iq2, 8),
    Q2_K: (_q2, 16),
    Q4_K: (_q4, 8),
    MXFP4: (_mx, 8),
    Q8_0: (_q8, 4),
}


def _kernel(first_ref: Any, *refs: Any, form: Callable[..., list[Run]], programs: int, values: int, interpret: bool) -> None:
    *planes, out_ref = refs
    program, threads = pl.program_id(0), 32 * WARPS
    matrix = jax.lax.div(program, jnp.int32(programs))
    expert, start = first_ref[0] + matrix, (program - matrix * programs) * (UNITS * threads)
    lane = jax.lax.broadcasted_iota(jnp.int32, (threads,), 0)
    runs: list[Run] = []
    for i in range(UNITS):
        runs += form(planes, expert, start + i * threads + lane, values=values, interpret=interpret)
    for first, weights in runs:
        column = first[:, None] + jax.lax.broadcasted_iota(jnp.int32, weights.shape, 1)
        plt.store(out_ref.at[matrix, column], weights.astype(jnp.bfloat16))


def expand(weight: Quantized, first: jax.Array, count: int, *, interpret: bool = False) -> jax.Array:
    """Matrices `first`, …, `first + count − 1` of a stack [E, N, K] in bfloat16, [count, N, K].

    Args:
        first: int32 scalar, at most E − count.

    Raises:
        ValueError: N·K does not divide into the programs of this kernel; N and K multiples of 128 always do.
    """
    experts, n, k = weight.shape
    form, width = OF[type(weight)]
    programs, rest = divmod(n * k, width * UNITS * 32 * WARPS)
    if rest:
        raise ValueError(f"weight is {list(weight.shape)}; N and K must be multiples of 128")
    # Every plane is contiguous, so that a matrix of it is one row.
    planes = [plane.reshape(experts, -1) for plane in jax.tree.leaves(weight)]
    extra = [jnp.asarray(selectors())] if isinstance(weight, IQ2_XXS) else []
    made = pl.pallas_call(
        functools.partial(_kernel, form=form, programs=programs, values=n * k, interpret=interpret),
        out_shape=jax.ShapeDtypeStruct((count, n * k), jnp.bfloat16),
        grid=(count * programs,),
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name=f"{NAME}_{type(weight).__name__.lower()}",
    )(first.reshape(1), *planes, *extra)
    return made.reshape(count, n, k)

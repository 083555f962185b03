"""Dequantises some matrices of a stack to bfloat16, for products of many rows. Each weight is read once and written once.

A thread owns a word of quants, or one pattern, and writes its weights in runs of four or eight; the runs of neighbouring threads
fill complete memory sectors. Each value equals `Quantized.dequantize`, rounded to bfloat16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.core.arithmetic import mask_bytes, pick_bytes
from pallas_kernels.formats import IQ2_S, IQ2_XXS, IQ3_XXS, MXFP4, Q2_K, Q4_K, Q5_K, Q6_K, Q8_0, Quantized
from pallas_kernels.formats.iq2_s import CODE
from pallas_kernels.formats.mxfp4 import power_of_two
from pallas_kernels.formats.q6_k import BIAS
from pallas_kernels.linear.lane_codebooks import NEGATIVE, POSITIVE
from pallas_kernels.linear.lane_formats import LANE_FORMATS, twice_e2m1

NAME = "dequantise"
WARPS = 4
# Units per thread. Their loads are in flight together.
UNITS = 4

# Start of a run of weights in the flat matrix, int32 [B], and its values, float32 [B, 4 or 8].
Run = tuple[jax.Array, jax.Array]


def _run(words: jax.Array, mask: int | None = None) -> jax.Array:
    """The four bytes of each word, float32 [B, 4]: signed, or unsigned with a mask."""
    byte = jax.lax.broadcasted_iota(jnp.int32, (words.shape[0], 4), 1)
    if mask is None:
        return ((words[:, None] << (24 - 8 * byte)) >> 24).astype(jnp.float32)
    return ((words[:, None] >> (8 * byte)) & mask).astype(jnp.float32)


def _pattern(selector: jax.Array, sign: jax.Array, step: jax.Array, *, interpret: bool) -> jax.Array:
    """The eight weights of a selector [B], float32 [B, 8]. `sign` has their signs four bits apart, from the lowest bit."""
    # The sign bit is inserted into the selector, where it selects the negative constants.
    selector = selector | ((sign & 0x11111111) << 2)
    low, high = (pick_bytes(POSITIVE, NEGATIVE, half, interpret=interpret) for half in (selector, selector >> 16))
    byte = jax.lax.broadcasted_iota(jnp.int32, (selector.shape[0], 8), 1)
    words = jnp.where(byte < 4, low[:, None], high[:, None])
    return ((words << (24 - 8 * (byte & 3))) >> 24).astype(jnp.float32) * step[:, None]


def _odd(factor: jax.Array) -> jax.Array:
    """2 · factor + 1 of the four lowest bits, float32."""
    return ((factor & 15) * 2 + 1).astype(jnp.float32)


def _iq2(refs: Any, expert: jax.Array, unit: jax.Array, *, values: int, interpret: bool) -> list[Run]:
    indices, signs, factors, scales, table = refs
    word, group = unit >> 2, unit & 3
    selector = plt.load(table.at[(plt.load(indices.at[expert, word]) >> (8 * group)) & 255])
    factor = plt.load(factors.at[expert, word >> 2]).astype(jnp.int32) >> (4 * (word & 3))
    step = plt.load(scales.at[expert, word >> 3]).astype(jnp.float32) * 0.125 * _odd(factor)
    return [(unit * 8, _pattern(selector, plt.load(signs.at[expert, word]) >> group, step, interpret=interpret))]


def _iq2s(refs: Any, expert: jax.Array, unit: jax.Array, *, values: int, interpret: bool) -> list[Run]:
    indices, rest, signs, factors, scales, table = refs
    word, group = unit >> 2, unit & 3
    lane, byte = word >> 2, 8 * (word & 3)
    # The fourth group has two of its bits here and eight in `rest`.
    code = jax.lax.shift_right_logical(plt.load(indices.at[expert, word]), CODE * group)
    code |= jnp.where(group == 3, ((plt.load(rest.at[expert, lane]) >> byte) & 255) << 2, 0)
    selector = plt.load(table.at[code & ((1 << CODE) - 1)])
    factor = plt.load(factors.at[expert, lane]) >> (byte + 4 * (group >> 1))
    step = plt.load(scales.at[expert, word >> 3]).astype(jnp.float32) * 0.125 * _odd(factor)
    return [(unit * 8, _pattern(selector, plt.load(signs.at[expert, word]) >> group, step, interpret=interpret))]


def _iq3(refs: Any, expert: jax.Array, unit: jax.Array, *, values: int, interpret: bool) -> list[Run]:
    indices, signs, factors, scales, table = refs
    lane, half = unit >> 4, (unit >> 3) & 1
    pattern = plt.load(table.at[(plt.load(indices.at[expert, unit >> 2]) >> (8 * (unit & 3))) & 255])
    sign = plt.load(signs.at[expert, half * (values // 64) + lane])
    mask = mask_bytes(sign << (unit & 7), interpret=interpret)
    factor = plt.load(factors.at[expert, lane]).astype(jnp.int32) >> (4 * half)
    step = plt.load(scales.at[expert, lane >> 2]).astype(jnp.float32) * 0.25 * _odd(factor)
    # −m is ~m + 1. No magnitude is 0, so a byte carries nothing into the next.
    return [(unit * 4, _run((pattern ^ mask) + (mask & 0x01010101)) * step[:, None])]


def _k_run(quants: jax.Array, mask: int, factor: jax.Array, offset: jax.Array, scale: jax.Array, minimum: jax.Array) -> jax.Array:
    """Both products are exact, so fusing the difference with one of them does not change the result."""
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


def _q5(refs: Any, expert: jax.Array, unit: jax.Array, *, values: int, interpret: bool) -> list[Run]:
    quants, fifths, groups, scales, minima = refs
    lane, half, word = unit >> 3, (unit >> 2) & 1, unit & 3
    quant, group = plt.load(quants.at[expert, half * (values // 16) + lane * 4 + word]), plt.load(groups.at[expert, lane])
    bits = plt.load(fifths.at[expert, (word >> 1) * (values // 64) + lane]) >> (4 * (word & 1) + half)
    scale, minimum = (plt.load(plane.at[expert, lane >> 2]).astype(jnp.float32) for plane in (scales, minima))
    first = lane * 64 + half * 16 + word * 4
    return [
        (
            first + 32 * n,
            _k_run(
                ((quant >> (4 * n)) & 0x0F0F0F0F) | (((bits >> (2 * n)) & 0x01010101) << 4),
                31, (group >> (8 * n)) & 63, (group >> (8 * n + 16)) & 63, scale, minimum,
            ),
        )
        for n in range(2)
    ]  # fmt: skip


def _q6(refs: Any, expert: jax.Array, unit: jax.Array, *, values: int, interpret: bool) -> list[Run]:
    low, high, factors, scales = refs
    lane = unit >> 2
    parts = [plt.load(low.at[expert, part * (values // 16) + unit]) for part in range(2)]
    bits, factor = plt.load(high.at[expert, unit]), plt.load(factors.at[expert, lane])
    scale = plt.load(scales.at[expert, lane >> 2]).astype(jnp.float32)
    first = (lane >> 1) * 128 + (lane & 1) * 16 + (unit & 3) * 4
    runs = []
    for s in range(4):
        quants = ((parts[s % 2] >> (4 * (s // 2))) & 0x0F0F0F0F) | (((bits >> (2 * s)) & 0x03030303) << 4)
        step = scale * ((factor << (24 - 8 * s)) >> 24).astype(jnp.float32)
        runs.append((first + 32 * s, (_run(quants, 63) - BIAS) * step[:, None]))
    return runs


def _mx(refs: Any, expert: jax.Array, unit: jax.Array, *, values: int, interpret: bool) -> list[Run]:
    quants, exponents = refs
    quant, block = plt.load(quants.at[expert, unit]), unit >> 2
    scale = power_of_two(plt.load(exponents.at[expert, block]))[:, None]
    first = block * 32 + (unit & 3) * 4
    halves = twice_e2m1(quant, interpret=interpret)
    return [(first + 16 * n, (_run(above) - _run(below)) * scale) for n, (above, below) in enumerate(halves)]


def _q8(refs: Any, expert: jax.Array, unit: jax.Array, *, values: int, interpret: bool) -> list[Run]:
    quants, scales = refs
    block, half, word = unit >> 3, (unit >> 2) & 1, unit & 3
    quant = plt.load(quants.at[expert, half * (values // 8) + block * 4 + word])
    return [(unit * 4, _run(quant) * plt.load(scales.at[expert, block]).astype(jnp.float32)[:, None])]


# For each format: the function that dequantises a unit, and the weights of a unit.
RUNS: dict[type[Quantized], tuple[Callable[..., list[Run]], int]] = {
    IQ2_XXS: (_iq2, 8),
    IQ2_S: (_iq2s, 8),
    IQ3_XXS: (_iq3, 4),
    Q2_K: (_q2, 16),
    Q4_K: (_q4, 8),
    Q5_K: (_q5, 8),
    Q6_K: (_q6, 16),
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


def dequantise(weight: Quantized, first: jax.Array, count: int, *, interpret: bool = False) -> jax.Array:
    """Dequantise matrices `first`, …, `first + count − 1` of a stack [E, N, K] to bfloat16 [count, N, K].

    Args:
        weight: the stack.
        first: int32 scalar, at most E − count.
        count: static.

    Raises:
        ValueError: N·K is not a multiple of the weights of a program; it is if N and K are multiples of 128.
    """
    experts, n, k = weight.shape
    form, width = RUNS[type(weight)]
    programs, rest = divmod(n * k, width * UNITS * 32 * WARPS)
    if rest:
        raise ValueError(f"weight is {list(weight.shape)}; N and K must be multiples of 128")
    # Every plane is contiguous, so each matrix is one row of it.
    planes = [plane.reshape(experts, -1) for plane in jax.tree.leaves(weight)]
    codebook = LANE_FORMATS[type(weight)].codebook()
    extra = [jnp.asarray(codebook)] if codebook.size > 1 else []
    made = pl.pallas_call(
        functools.partial(_kernel, form=form, programs=programs, values=n * k, interpret=interpret),
        out_shape=jax.ShapeDtypeStruct((count, n * k), jnp.bfloat16),
        grid=(count * programs,),
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name=f"{NAME}_{type(weight).__name__.lower()}",
    )(first.reshape(1), *planes, *extra)
    return made.reshape(count, n, k)

"""Projections of the streams for many rows, nearly in float32 on the tensor cores.

Streams of 4,096 rows of V4-Flash are 0.27 GB, so a program reads its part of them once, for the projections and for the mean
square. K is divided among a fixed number of programs, whose sums are added in order, so a row's bits do not depend on the number
of rows.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.core.parts import parts, products

NAME = "hc_project"
ROWS = 64
SPLITS = 16
DEPTH = 64
WARPS = 4
STAGES = 3
# Each operand is the sum of two bfloat16 numbers. A float16 weight is exactly that.
PARTS = 2


def _kernel(h: Any, fn: Any, out: Any, squares: Any, *, span: int, depth: int) -> None:
    split, (t, _), mixes = pl.program_id(1), h.shape, fn.shape[0]
    row = pl.program_id(0) * ROWS + jnp.arange(ROWS, dtype=jnp.int32)
    mix = jnp.arange(out.shape[2], dtype=jnp.int32)

    def load(ref: Any, rows: jax.Array, first: jax.Array, count: int) -> jax.Array:
        shape = rows.shape[0], depth
        column = first + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        index = jnp.broadcast_to(rows[:, None], shape), column
        return plt.load(ref.at[index], mask=jnp.broadcast_to((rows < count)[:, None], shape), other=0.0).astype(jnp.float32)

    def step(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        first = split * span + i * depth
        x, w = load(h, row, first, t), load(fn, mix, first, mixes)
        return sums[0] + products(x, parts(w, PARTS)), sums[1] + jnp.sum(x * x, axis=1)

    zeros = jnp.zeros((ROWS, out.shape[2]), jnp.float32), jnp.zeros(ROWS, jnp.float32)
    product, square = jax.lax.fori_loop(0, span // depth, step, zeros)
    real = row < t
    place = jnp.broadcast_to(row[:, None], product.shape), jnp.broadcast_to(mix[None, :], product.shape)
    index = (jnp.full_like(place[0], split), *place)
    plt.store(out.at[index], product, mask=jnp.broadcast_to(real[:, None], product.shape))
    plt.store(squares.at[jnp.full_like(row, split), row], square, mask=real)


def mixes(h: jax.Array, fn: jax.Array, norm_eps: float, *, interpret: bool = False) -> jax.Array:
    """Project the flattened streams, divided by their root mean square.

    Args:
        h: float32 [T, N, D], N·D a multiple of 1,024.
        fn: float [rows, N·D].
        norm_eps: static; added to the mean square.

    Returns:
        float32 [T, rows].

    Source: the meaning is `pallas_kernels.hyper_connections.meaning.mixes`.
    """
    t, k, rows = h.shape[0], h.shape[1] * h.shape[2], fn.shape[0]
    span = k // SPLITS
    shapes = (
        jax.ShapeDtypeStruct((SPLITS, t, max(pl.next_power_of_2(rows), 16)), jnp.float32),
        jax.ShapeDtypeStruct((SPLITS, t), jnp.float32),
    )
    product, square = pl.pallas_call(
        functools.partial(_kernel, span=span, depth=DEPTH),
        out_shape=shapes,
        grid=(pl.cdiv(t, ROWS), SPLITS),
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
        name=NAME,
    )(h.reshape(t, k), fn)
    scale = jax.lax.rsqrt(jnp.sum(square, axis=0) / k + norm_eps)
    return jnp.sum(product, axis=0)[:, :rows] * scale[:, None]

"""How index queries and compressed keys are finished, alike: rotation, Hadamard transform and FP4 rounding inside a kernel.

Each has its meaning in plain jnp below.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

from pallas_kernels import rounding
from pallas_kernels.rounding import FP4_BLOCK


def angles(cos: Any, sin: Any, m: jax.Array, pairs: int) -> tuple[jax.Array, jax.Array]:
    """Inside a kernel: cosines and sines [pairs] of row m, 1 and 0 for the first pairs where the references hold fewer."""
    pair = jax.lax.broadcasted_iota(jnp.int32, (pairs,), 0)
    first = pairs - cos.shape[1]
    turning, place = pair >= first, jnp.maximum(pair - first, 0)
    return plt.load(cos.at[m, place], mask=turning, other=1.0), plt.load(sin.at[m, place], mask=turning, other=0.0)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Inside a kernel: rotate the interleaved pairs of x [..., w] by angles whose cosines and sines are [w/2].

    Both of a pair lie in one thread; a sum with a zero takes one of them out of it exactly.
    """
    pairs = x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    second = jax.lax.broadcasted_iota(jnp.int32, pairs.shape, pairs.ndim - 1) == 1
    even = jnp.sum(jnp.where(second, 0.0, pairs), axis=-1)
    odd = jnp.sum(jnp.where(second, pairs, 0.0), axis=-1)
    cos, sin = jnp.broadcast_to(cos, even.shape), jnp.broadcast_to(sin, even.shape)
    turned = jnp.where(second, (even * sin + odd * cos)[..., None], (even * cos - odd * sin)[..., None])
    return turned.reshape(x.shape)


def _signs(n: int, ndim: int, row: int, column: int) -> jax.Array:
    """Sylvester's n × n matrix of signs on the axes `row` and `column` of an array of `ndim` axes, the others of size 1."""
    shape = [1] * ndim
    shape[row] = shape[column] = n
    common = jax.lax.broadcasted_iota(jnp.int32, shape, row) & jax.lax.broadcasted_iota(jnp.int32, shape, column)
    for shift in (4, 2, 1):
        common ^= common >> shift
    return (1 - 2 * (common & 1)).astype(jnp.float32)


def hadamard(x: jax.Array) -> jax.Array:
    """Inside a kernel: x [..., n], n a power of two up to 2¹⁶, times Sylvester's Hadamard matrix over √n.

    The matrix is the product of two small ones: sums of √n signed float32 values, which no dot product of halves would keep.
    """
    n = x.shape[-1]
    inner = 1 << (n.bit_length() // 2)
    outer = n // inner
    y = x.reshape(*x.shape[:-1], outer, 1, inner)
    y = jnp.sum(y * _signs(inner, y.ndim, y.ndim - 2, y.ndim - 1), axis=-1)
    y = y.reshape(*x.shape[:-1], 1, outer, inner)
    y = jnp.sum(y * _signs(outer, y.ndim, y.ndim - 3, y.ndim - 2), axis=-2)
    return y.reshape(x.shape) * jnp.float32(n**-0.5)


def round_fp4(x: jax.Array) -> jax.Array:
    """Inside a kernel: Hadamard transform of x [..., n], n at least 32, and FP4 rounding in blocks of 32."""
    blocks = hadamard(x).reshape(*x.shape[:-1], x.shape[-1] // FP4_BLOCK, FP4_BLOCK)
    return rounding.fp4(blocks).reshape(x.shape)


def reference_rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """`rotate` in plain jnp, of the last R dimensions of x [..., w] by angles [..., R/2]."""
    still = x.shape[-1] - 2 * cos.shape[-1]
    even, odd = x[..., still::2], x[..., still + 1 :: 2]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return jnp.concatenate([x[..., :still], turned.reshape(*x.shape[:-1], 2 * cos.shape[-1])], axis=-1)


def reference_fp4(x: jax.Array) -> jax.Array:
    """`round_fp4` in plain jnp, with the whole matrix."""
    n = x.shape[-1]
    matrix = jnp.ones((1, 1), jnp.float32)
    while matrix.shape[0] < n:
        matrix = jnp.block([[matrix, matrix], [matrix, -matrix]])
    y = jnp.dot(x, matrix, precision=jax.lax.Precision.HIGHEST) * jnp.float32(n**-0.5)
    return rounding.fp4(y.reshape(*x.shape[:-1], n // FP4_BLOCK, FP4_BLOCK)).reshape(x.shape)

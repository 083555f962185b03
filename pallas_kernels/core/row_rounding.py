"""The last steps of index queries and compressed keys inside a kernel: rotation, Hadamard transform and FP4 rounding.

Their meanings are `rotary.rotate`, `rounding.hadamard` and `rounding.hadamard_fp4`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

from pallas_kernels.core import rounding
from pallas_kernels.core.parts import parts
from pallas_kernels.core.rounding import FP4_BLOCK


def angles(cos: Any, sin: Any, m: jax.Array, pairs: int) -> tuple[jax.Array, jax.Array]:
    """Inside a kernel: cosines and sines [pairs] of row m. If the references hold fewer, the first pairs get 1 and 0."""
    pair = jax.lax.broadcasted_iota(jnp.int32, (pairs,), 0)
    first = pairs - cos.shape[1]
    rotary, place = pair >= first, jnp.maximum(pair - first, 0)
    return plt.load(cos.at[m, place], mask=rotary, other=1.0), plt.load(sin.at[m, place], mask=rotary, other=0.0)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Inside a kernel: rotate the interleaved pairs of x [..., w] by angles whose cosines and sines are [w/2].

    Both values of a pair are in one thread. Adding zero to one of them extracts it exactly.
    """
    pairs = x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    second = jax.lax.broadcasted_iota(jnp.int32, pairs.shape, pairs.ndim - 1) == 1
    even = jnp.sum(jnp.where(second, 0.0, pairs), axis=-1)
    odd = jnp.sum(jnp.where(second, pairs, 0.0), axis=-1)
    cos, sin = jnp.broadcast_to(cos, even.shape), jnp.broadcast_to(sin, even.shape)
    rotated = jnp.where(second, (even * sin + odd * cos)[..., None], (even * cos - odd * sin)[..., None])
    return rotated.reshape(x.shape)


def _signs(n: int, ndim: int, row: int, column: int) -> jax.Array:
    """Sylvester's n × n matrix of signs on the axes `row` and `column` of an array with `ndim` axes; other axes have size 1."""
    shape = [1] * ndim
    shape[row] = shape[column] = n
    common = jax.lax.broadcasted_iota(jnp.int32, shape, row) & jax.lax.broadcasted_iota(jnp.int32, shape, column)
    for shift in (4, 2, 1):
        common ^= common >> shift
    return (1 - 2 * (common & 1)).astype(jnp.float32)


def hadamard(x: jax.Array) -> jax.Array:
    """Inside a kernel: x [..., n], n a power of two up to 2¹⁶, times Sylvester's Hadamard matrix divided by √n.

    The matrix is a product of two small ones, so each sum has √n signed float32 values. A 16-bit dot product would lose digits.
    """
    n = x.shape[-1]
    inner = 1 << (n.bit_length() // 2)
    outer = n // inner
    y = x.reshape(*x.shape[:-1], outer, 1, inner)
    y = jnp.sum(y * _signs(inner, y.ndim, y.ndim - 2, y.ndim - 1), axis=-1)
    y = y.reshape(*x.shape[:-1], 1, outer, inner)
    y = jnp.sum(y * _signs(outer, y.ndim, y.ndim - 3, y.ndim - 2), axis=-2)
    return y.reshape(x.shape) * jnp.float32(n**-0.5)


def hadamard_of_many(x: jax.Array) -> jax.Array:
    """Inside a kernel: `hadamard` of x [m, n], m and n at least 16, on the tensor cores.

    x is the sum of three bfloat16 numbers, and so is its product with a sign.
    """
    signs = _signs(x.shape[1], 2, 0, 1).astype(jnp.bfloat16)
    total = jnp.zeros(x.shape, jnp.float32)
    for part in reversed(parts(x, 3)):
        total += jax.lax.dot_general(part, signs, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return total * jnp.float32(x.shape[1] ** -0.5)


def round_fp4(x: jax.Array, *, many: bool = False) -> jax.Array:
    """Inside a kernel: Hadamard transform of x [..., n], n at least 32, and FP4 rounding in blocks of 32.

    Args:
        many: static; transform on the tensor cores.
    """
    blocks = (hadamard_of_many(x) if many else hadamard(x)).reshape(*x.shape[:-1], x.shape[-1] // FP4_BLOCK, FP4_BLOCK)
    return rounding.fp4(blocks).reshape(x.shape)

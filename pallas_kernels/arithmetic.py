"""Pinned arithmetic for kernel bodies: PTX instructions on the GPU, jnp twins of the same arithmetic in interpret mode.

Bit-equality over the number of rows needs every float step to round the same way in every kernel, so that the compiler may not
choose between a fused and an unfused multiply-add.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt


def _asm(instruction: str, constraints: str, dtype: jnp.dtype, *args: jax.Array) -> jax.Array:
    operands = ", ".join(f"${i}" for i in range(len(args) + 1))
    shape = jax.ShapeDtypeStruct(args[0].shape, dtype)
    [result] = plt.elementwise_inline_asm(
        f"{instruction} {operands};", args=list(args), constraints=constraints, pack=1, result_shape_dtypes=[shape]
    )
    return result


def dp4a(a: jax.Array, b: jax.Array, c: jax.Array, *, interpret: bool) -> jax.Array:
    """c plus the dot product of the four int8 values in each word of a and b; exact, int32."""
    if not interpret:
        return _asm("dp4a.s32.s32", "=r,r,r,r", jnp.int32, a, b, c)
    shifts = (24, 16, 8, 0)
    return c + sum(((a << shift) >> 24) * ((b << shift) >> 24) for shift in shifts)


def fma(a: jax.Array, b: jax.Array, c: jax.Array, *, interpret: bool) -> jax.Array:
    """a · b + c in float32, rounded once on the GPU and twice in interpret mode, there always so.

    The barrier keeps a CPU compiler from fusing the two for some numbers of rows and not for others.
    """
    if not interpret:
        return _asm("fma.rn.f32", "=f,f,f,f", jnp.float32, a, b, c)
    return jax.lax.optimization_barrier(a * b) + c


def multiply(a: jax.Array, b: jax.Array, *, interpret: bool) -> jax.Array:
    """a · b in float32, never fused with an addition on the GPU."""
    return a * b if interpret else _asm("mul.rn.f32", "=f,f,f", jnp.float32, a, b)


def divide(a: jax.Array, b: jax.Array, *, interpret: bool) -> jax.Array:
    """a / b in float32, correctly rounded.

    XLA rewrites a division by a constant as a product, which misses the last bit in 4 % of cases; the barrier hides the constant.
    """
    if not interpret:
        return _asm("div.rn.f32", "=f,f,f", jnp.float32, a, b)
    return jax.lax.div(*jax.lax.optimization_barrier((a, b)))


def round_to_int(x: jax.Array, *, interpret: bool) -> jax.Array:
    """float32 to int32, half to even; a NaN becomes 0."""
    if not interpret:
        return _asm("cvt.rni.s32.f32", "=r,f", jnp.int32, x)
    return jnp.nan_to_num(jnp.round(x), nan=0.0).astype(jnp.int32)


def sum_lanes(x: jax.Array, *, interpret: bool) -> jax.Array:
    """Sum of a power of two of lanes, [rows, lanes] → [rows], halves added to halves as a warp's butterfly does."""
    if not interpret:
        return jnp.sum(x, axis=1)
    while x.shape[1] > 1:
        low, high = jnp.split(x, 2, axis=1)
        x = low + high
    return x[:, 0]

"""The rounding that the published weights were trained with: FP8 rows, and FP4 index keys after a Hadamard transform.

The scale of every block is a power of two. `fp8` and `fp4` work in kernel bodies and outside. Exponents are computed as integers,
because log2 and division might not be correctly rounded. No rounding instruction is used, because kernel bodies and jnp have
different ones.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

FP8_BLOCK = 64
FP4_BLOCK = 32
# Minimum of the largest magnitude that determines a block's scale, and the maximum value divided by the scale.
FP8_FLOOR, FP8_LIMIT = 1e-4, 448.0
FP4_FLOOR, FP4_LIMIT = 6 * 2.0**-120, 6.0
MANTISSA = (1 << 23) - 1
SIGN = -(1 << 31)


def _exponent(x: jax.Array) -> jax.Array:
    """Exponents of positive normal float32 numbers, int32."""
    return (jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) - 127


def power_of_two(exponent: jax.Array) -> jax.Array:
    """2^exponent, float32, for int32 exponents from -126 to 127."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def scale_exponents(amax: jax.Array, limit: float) -> jax.Array:
    """Exponents, int32, of the smallest powers of two such that amax / power is at most `limit`; amax is positive."""
    limit_exponent = math.floor(math.log2(limit))
    limit_mantissa = int((limit / 2**limit_exponent - 1) * 2**23)
    above = (jax.lax.bitcast_convert_type(amax, jnp.int32) & MANTISSA) > limit_mantissa
    return jnp.clip(_exponent(amax) - limit_exponent + above.astype(jnp.int32), -126, 126)


def _round(blocks: jax.Array, floor: float, limit: float, mantissa_bits: int, min_exponent: int) -> jax.Array:
    """Round each block of the last axis to small floats times the smallest power of two that keeps them within `limit`."""
    scale_exponent = scale_exponents(jnp.maximum(jnp.max(jnp.abs(blocks), axis=-1), floor), limit)
    scaled = jnp.abs(blocks) * power_of_two(-scale_exponent)[..., None]
    step_exponent = _exponent(jnp.maximum(scaled, 2.0**min_exponent)) - mantissa_bits
    # Adding 2²³ steps leaves no digits below one step, so the sum rounds to an integer number of steps, half to even.
    large = power_of_two(step_exponent + 23)
    rounded = ((scaled + large) - large) * power_of_two(scale_exponent)[..., None]
    sign = jax.lax.bitcast_convert_type(blocks, jnp.int32) & SIGN
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(rounded, jnp.int32) | sign, jnp.float32)


def fp8(blocks: jax.Array) -> jax.Array:
    """Round float32 [..., block] to E4M3 along the last axis, scale 2^ceil(log2(max(amax, 1e-4) / 448)).

    Source: `act_quant` of the reference's kernels with a power-of-two scale.
    """
    return _round(blocks, FP8_FLOOR, FP8_LIMIT, mantissa_bits=3, min_exponent=-6)


def fp4(blocks: jax.Array) -> jax.Array:
    """Round float32 [..., block] to E2M1 along the last axis, scale 2^ceil(log2(amax / 6)).

    Source: `fp4_act_quant` of the reference's kernels.
    """
    return _round(blocks, FP4_FLOOR, FP4_LIMIT, mantissa_bits=1, min_exponent=0)


def fp8_rows(x: jax.Array, block: int = FP8_BLOCK) -> jax.Array:
    """Round float32 [..., K] to E4M3 in blocks along K, a multiple of `block`."""
    return fp8(x.reshape(*x.shape[:-1], -1, block)).reshape(x.shape)


def fp4_rows(x: jax.Array, block: int = FP4_BLOCK) -> jax.Array:
    """Round float32 [..., K] to E2M1 in blocks along K, a multiple of `block`."""
    return fp4(x.reshape(*x.shape[:-1], -1, block)).reshape(x.shape)


def hadamard(x: jax.Array, *, precision: jax.lax.PrecisionLike = None) -> jax.Array:
    """Multiply x [..., n], n a power of two, by the Sylvester Hadamard matrix divided by √n."""
    n = x.shape[-1]
    index = np.arange(n, dtype=np.uint32)
    sign = 1 - 2 * (np.bitwise_count(index[:, None] & index[None, :]) % 2).astype(np.float32)
    return jnp.dot(x, jnp.asarray(sign * np.float32(n**-0.5)), precision=precision, preferred_element_type=jnp.float32)


def hadamard_fp4(x: jax.Array, *, precision: jax.lax.PrecisionLike = None) -> jax.Array:
    """Hadamard transform of x [..., n], then FP4 rounding in blocks of 32: the last steps of index queries and keys."""
    return fp4_rows(hadamard(x, precision=precision))

"""Rounding to FP8 and FP4 with a power-of-two scale a block, for kernel bodies and outside them alike.

Exponents are integers: log2 and division might not be correctly rounded. A rounding instruction is not needed either, which a
kernel body and jnp would have to spell differently.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

FP8_BLOCK = 64
FP4_BLOCK = 32
# The least magnitude that a block's scale is made for, and what its largest value may be in scales.
FP8_FLOOR, FP8_LIMIT = 1e-4, 448.0
FP4_FLOOR, FP4_LIMIT = 6 * 2.0**-120, 6.0
MANTISSA = (1 << 23) - 1
SIGN = -(1 << 31)


def _exponent(x: jax.Array) -> jax.Array:
    """Exponents of positive normal float32 numbers, int32."""
    return (jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) - 127


def power_of_two(exponent: jax.Array) -> jax.Array:
    """Powers of two float32 of exponents int32, -126 to 127."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def scale_exponents(amax: jax.Array, limit: float) -> jax.Array:
    """Exponents int32 of the least powers of two that bring positive numbers within a limit."""
    limit_exponent = math.floor(math.log2(limit))
    limit_mantissa = int((limit / 2**limit_exponent - 1) * 2**23)
    above = (jax.lax.bitcast_convert_type(amax, jnp.int32) & MANTISSA) > limit_mantissa
    return jnp.clip(_exponent(amax) - limit_exponent + above.astype(jnp.int32), -126, 126)


def _round(blocks: jax.Array, floor: float, limit: float, mantissa_bits: int, min_exponent: int) -> jax.Array:
    """Round each block of the last axis to a small float times the least power of two that keeps its values within the limit."""
    scale_exponent = scale_exponents(jnp.maximum(jnp.max(jnp.abs(blocks), axis=-1), floor), limit)
    scaled = jnp.abs(blocks) * power_of_two(-scale_exponent)[..., None]
    step_exponent = _exponent(jnp.maximum(scaled, 2.0**min_exponent)) - mantissa_bits
    # A float32 has no digits below 2²³ steps, so that the sum rounds to whole ones, half to even.
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

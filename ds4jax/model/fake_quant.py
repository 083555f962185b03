"""The rounding that published weights were trained with: FP8 rows, FP4 indexer keys, and the Hadamard transform before it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

MANTISSA = (1 << 23) - 1


def _bits(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Exponent and mantissa of positive normal float32 numbers, as int32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return (bits >> 23) - 127, bits & MANTISSA


def _power_of_two(exponent: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _round_blocks(x: jax.Array, block: int, floor: float, limit: float, mantissa_bits: int, min_exponent: int) -> jax.Array:
    """Round x [..., K] to a small float with one power-of-two scale per block, the least that keeps |x| / scale ≤ limit.

    Integer arithmetic on the exponents instead of log2 and division, which XLA may not round correctly; round half to even.
    """
    blocks = x.reshape(*x.shape[:-1], -1, block)
    amax = jnp.maximum(jnp.max(jnp.abs(blocks), axis=-1, keepdims=True), jnp.float32(floor))
    exponent, mantissa = _bits(amax)
    limit_exponent, limit_mantissa = int(np.floor(np.log2(limit))), int((limit / 2 ** np.floor(np.log2(limit)) - 1) * 2**23)
    scale_exponent = exponent - limit_exponent + (mantissa > limit_mantissa).astype(jnp.int32)
    scale_exponent = jnp.clip(scale_exponent, -126, 126)
    scaled = blocks * _power_of_two(-scale_exponent)
    value_exponent, _ = _bits(jnp.maximum(jnp.abs(scaled), jnp.float32(2.0**min_exponent)))
    step_exponent = value_exponent - mantissa_bits
    rounded = jnp.round(scaled * _power_of_two(-step_exponent)) * _power_of_two(step_exponent)
    return (rounded * _power_of_two(scale_exponent)).reshape(x.shape)


def fp8(x: jax.Array, block: int = 64) -> jax.Array:
    """Round x [..., K] to E4M3 in blocks along K, scale 2^ceil(log2(max(amax, 1e-4) / 448)).

    Source: `act_quant` of the reference's kernels with a power-of-two scale.
    """
    return _round_blocks(x, block, 1e-4, 448.0, mantissa_bits=3, min_exponent=-6)


def fp4(x: jax.Array, block: int = 32) -> jax.Array:
    """Round x [..., K] to E2M1 in blocks along K, scale 2^ceil(log2(amax / 6)).

    Source: `fp4_act_quant` of the reference's kernels.
    """
    return _round_blocks(x, block, 6 * 2.0**-120, 6.0, mantissa_bits=1, min_exponent=0)


def hadamard(x: jax.Array) -> jax.Array:
    """Multiply x [..., n], n a power of two, with the Sylvester Hadamard matrix over √n."""
    n = x.shape[-1]
    index = np.arange(n, dtype=np.uint32)
    sign = 1 - 2 * (np.bitwise_count(index[:, None] & index[None, :]) % 2).astype(np.float32)
    return jnp.dot(x, jnp.asarray(sign * np.float32(n**-0.5)), preferred_element_type=jnp.float32)

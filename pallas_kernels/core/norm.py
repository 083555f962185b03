"""RMS norm: a row divided by the root of the mean of its squares.

Kernel bodies sum in the order of their own columns; their tests compare them with these functions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rms_scale(x: jax.Array, eps: float) -> jax.Array:
    """1 / sqrt(mean(x²) + eps) over the last axis of x, float32 [..., K] → [..., 1]."""
    return jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """weight · x / sqrt(mean(x²) + eps) for x float32 [..., K] and a weight [K] of any float type."""
    return x * rms_scale(x, eps) * weight.astype(jnp.float32)

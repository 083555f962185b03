"""Rotary positions: the angle of each pair, with YaRN on layers with a compressor."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.config import Config
from pallas_kernels.core import rotary


@functools.lru_cache
def inverse_frequencies(config: Config, compressed: bool) -> np.ndarray:
    """Angle per position of each pair, float32 [R/2].

    Layers without a compressor (and the MTP block) use `rope_theta` alone; layers with one use `compress_rope_theta` with YaRN,
    without its amplitude factor. Every step is float32 as in the reference: one unit in the last place of a frequency is
    0.025 rad at a million tokens.

    Source: `precompute_freqs_cis` of the reference inference code; YaRN (arXiv 2309.00071).
    """
    theta = config.compress_rope_theta if compressed else config.rope_theta
    exponent = np.arange(0, config.rope_dim, 2, dtype=np.float32) / np.float32(config.rope_dim)
    # numpy's float32 power is off by one unit for some inputs; the correctly rounded power has the reference's bits.
    power = np.power(np.float64(theta), exponent.astype(np.float64)).astype(np.float32)
    plain = np.float32(1.0) / power
    if not compressed:
        return plain

    def pair_of(rotations: float) -> float:
        return config.rope_dim * math.log(config.original_context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_of(config.beta_fast)), 0)
    high = min(math.ceil(pair_of(config.beta_slow)), config.rope_dim - 1)
    ramp = (np.arange(config.rope_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(max(high - low, 1e-3))
    keep = np.float32(1.0) - np.clip(ramp, np.float32(0.0), np.float32(1.0))
    return plain / np.float32(config.rope_factor) * (np.float32(1.0) - keep) + plain * keep


def rotate(x: jax.Array, position: jax.Array, frequencies: np.ndarray, *, inverse: bool = False) -> jax.Array:
    """Rotate the last R dimensions of x [T, ..., Q] by the angles of positions [T], backwards when `inverse`."""
    pairs = frequencies.shape[0]
    angle = position.astype(jnp.float32)[:, None] * jnp.asarray(frequencies)
    angle = angle.reshape(x.shape[0], *(1,) * (x.ndim - 2), pairs)
    # Negate the angle, not the sine: a compiler may give sin(-a) and -sin(a) different bits.
    return rotary.rotate(x, jnp.cos(angle), jnp.sin(-angle if inverse else angle))

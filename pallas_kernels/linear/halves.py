"""float32 activations as pairs of float16 numbers, which tensor cores multiply by float16 weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# The second number of a pair is stored larger by this factor: so it is a normal float16 number whenever the first one is.
LOW_SCALE = 2.0**11


def halves_of(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two float16 arrays: x = high + low / 2048 to 22 bits; values above 65504 become infinite.

    Args:
        x: float32.
    """
    high = x.astype(jnp.float16)
    return high, ((x - high.astype(jnp.float32)) * LOW_SCALE).astype(jnp.float16)


def split_halves(x: jax.Array) -> jax.Array:
    """Rows float32 [M, K] → float16 [M, 2, K], `halves_of` as XLA computes it."""
    return jnp.stack(halves_of(x), axis=1)

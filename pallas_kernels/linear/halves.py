"""float32 activations as pairs of float16 numbers, which tensor cores multiply by float16 weights."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

# The second number of a pair is stored larger by this factor: so it is a normal float16 number whenever the first one is.
LOW_SCALE = 2.0**11


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FloatRows:
    """Rows of activations, for weights of any float type.

    Attributes:
        values: float32 [M, K].
        halves: float16 [M, 2, K], what `halves_of` makes of them.
    """

    values: jax.Array
    halves: jax.Array

    @classmethod
    def of(cls, x: jax.Array) -> FloatRows:
        """Split rows float32 [M, K] outside a kernel, where XLA would take x for its float16 value turned back to float32."""
        high = jax.lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10)
        return cls(x, jnp.stack([high.astype(jnp.float16), _low(x, high)], axis=1))


def halves_of(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two float16 arrays: x = high + low / 2048 to 22 bits; values above 65504 become infinite.

    Args:
        x: float32.
    """
    high = x.astype(jnp.float16)
    return high, _low(x, high.astype(jnp.float32))


def _low(x: jax.Array, high: jax.Array) -> jax.Array:
    return ((x - high) * LOW_SCALE).astype(jnp.float16)

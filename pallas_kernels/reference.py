"""What each kernel means, in the fewest lines of jnp, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.formats import Q8_0

Weight = jax.Array | Q8_0


def as_float32(weight: Weight) -> jax.Array:
    """The weight's values in float32, whatever it is stored as."""
    return weight.dequantize() if isinstance(weight, Q8_0) else weight.astype(jnp.float32)


def matmul(x: jax.Array, weight: Weight) -> jax.Array:
    """x [M, K] times the weight [N, K] transposed, accumulated in float32: [M, N]."""
    return jax.lax.dot_general(x, as_float32(weight), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

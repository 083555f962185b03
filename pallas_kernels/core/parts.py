"""Nearly float32 products on the tensor cores: a float32 number as a sum of bfloat16 numbers."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

HIGH_HALF = -(1 << 16)


def parts(x: jax.Array, count: int) -> list[jax.Array]:
    """Split float32 x into `count` bfloat16 arrays that sum to x; each has the leading eight digits of the remainder."""
    found = []
    for _ in range(count):
        # The digits are masked as integers, because a compiler may remove a conversion to bfloat16 and back.
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(HIGH_HALF)
        high = jax.lax.bitcast_convert_type(bits, jnp.float32)
        found.append(high.astype(jnp.bfloat16))
        x = x - high
    return found


def products(a: jax.Array, b: Sequence[jax.Array]) -> jax.Array:
    """Dot products float32 [m, n] of float32 a [m, k] and the parts of b [n, k]. Products of small parts are left out."""
    of_a, total = parts(a, len(b)), jnp.zeros((a.shape[0], b[0].shape[0]), jnp.float32)
    # The smallest first.
    for order in reversed(range(len(b))):
        for i in range(order + 1):
            dims = (((1,), (1,)), ((), ()))
            total += jax.lax.dot_general(of_a[i], b[order - i], dims, preferred_element_type=jnp.float32)
    return total

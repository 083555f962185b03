"""Sums of attention weights and weighted rows of several spans of rows, each weighted for the span's largest score.

Scores are exponents of two, and a largest score is rounded up to a whole number. So sums of spans are scaled exactly before they
are added, and only the order of the additions matters: it is the same in every kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.core import arithmetic

LOG2_E = math.log2(math.e)


def finite_top(top: jax.Array) -> jax.Array:
    """The largest scores, 0 where there is none."""
    return jnp.where(top == -jnp.inf, 0.0, top)


def power_of_two(exponent: jax.Array) -> jax.Array:
    """2 to a float32 integer of at most 0, exactly; 0 below -126."""
    whole = jnp.maximum(exponent, -127.0).astype(jnp.int32)
    return jax.lax.bitcast_convert_type((whole + 127) << 23, jnp.float32)


def merge(
    top: jax.Array, own: jax.Array, sums: Sequence[jax.Array], others: Sequence[jax.Array], interpret: bool
) -> tuple[jax.Array, list[jax.Array]]:
    """Add the sums of some rows, weighted for the largest score `own`, to sums that are weighted for `top`.

    Args:
        top, own: float32 [n].
        sums, others: float32 [n] or [n, ...] each.

    Returns:
        The largest score of all rows, and the sums weighted for it.
    """
    new = jnp.maximum(top, own)
    finite = finite_top(new)
    kept, added = power_of_two(top - finite), power_of_two(own - finite)
    made = []
    for old, other in zip(sums, others, strict=True):
        shape = (*top.shape, *(1,) * (old.ndim - top.ndim))
        a, b, there = (jnp.broadcast_to(x.reshape(shape), old.shape) for x in (kept, added, own != -jnp.inf))
        both = arithmetic.fma(old, a, arithmetic.multiply(other, b, interpret=interpret), interpret=interpret)
        made.append(jnp.where(there, both, old))
    return new, made

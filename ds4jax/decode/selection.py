"""Which tokens the filters keep, found without sorting the vocabulary.

In order of probability every filter keeps the first tokens. So the kept ones are those above a threshold, and of those at the
threshold the first by id. The threshold is found a few bits at a time: a pass over the vocabulary tries several at once.
Probabilities are added as integers, so that a sum has no order and a row the same tokens in any company.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Bits of a key, the bits of a float32 from 0 to 1 read as an integer: it has the order of the probabilities.
KEY_BITS = 30
# Bits of a key that a pass finds, a divisor of all: more make fewer passes, of 2**PASS_BITS - 1 sums each.
PASS_BITS = 3
# A probability of 1 in the sums. Those of a whole vocabulary stay below 2**32.
ONE = 2.0**31


def smallest(holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The smallest key of a probability for which a condition holds, int32.

    Args:
        holds: takes keys int32 [M] and returns bool [M]. If it holds for a key it holds for all larger ones, and it holds for the
            largest.
    """

    def find(i: jax.Array, found: jax.Array) -> jax.Array:
        low = KEY_BITS - PASS_BITS * (i + 1)
        ends_M = found - 1 + (jnp.arange(1, 1 << PASS_BITS, dtype=jnp.int32) << low)
        return found + (jnp.sum(~holds(ends_M), dtype=jnp.int32) << low)

    # On a GPU a loop in the decode loop would end its CUDA graph. On a CPU every pass would be compiled by itself.
    return jax.lax.fori_loop(0, KEY_BITS // PASS_BITS, find, jnp.int32(0), unroll=jax.default_backend() == "gpu")


def kept(probabilities_V: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """The tokens that all filters keep, bool [V].

    A token stays if fewer than `top_k` tokens rank before it, their probabilities sum to less than `top_p`, and its own is at
    least `min_p` times the largest. Of equal probabilities the lower id ranks first. The sum is that of the probabilities rounded
    to multiples of 2**-31.

    Args:
        probabilities_V: float32 [V], from 0 to 1.
        top_k: int32; 0 keeps all.
        top_p: float32 above 0; 1 keeps all.
        min_p: float32 from 0 to 1.
    """
    (size,) = probabilities_V.shape
    key_V = jax.lax.bitcast_convert_type(probabilities_V, jnp.int32)
    mass_V = jnp.round(probabilities_V * ONE).astype(jnp.uint32)
    most = jnp.where(top_k == 0, jnp.int32(size), top_k)
    mass = jnp.where(top_p >= 1, jnp.uint32(0xFFFFFFFF), jnp.ceil(top_p * ONE).astype(jnp.uint32))

    def above(key_M: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The number of tokens above each threshold, int32 [M], and their probabilities in all, uint32 [M]."""
        higher_MV = key_V > key_M[:, None]
        return jnp.sum(higher_MV, axis=1, dtype=jnp.int32), jnp.sum(jnp.where(higher_MV, mass_V, 0), axis=1, dtype=jnp.uint32)

    def few(key_M: jax.Array) -> jax.Array:
        count_M, mass_M = above(key_M)
        return (count_M < most) & (mass_M < mass)

    threshold = smallest(few)
    (count,), (before,) = above(threshold[None])
    each = jnp.round(jax.lax.bitcast_convert_type(threshold, jnp.float32) * ONE).astype(jnp.uint32)
    # How many tokens at the threshold still have less than `mass` before them: `mass - before` is positive.
    by_mass = jnp.where(each == 0, jnp.uint32(size), (mass - before - 1) // jnp.maximum(each, 1) + 1)
    ties = jnp.minimum(most - count, jnp.minimum(by_mass, jnp.uint32(size)).astype(jnp.int32))
    tie_V = key_V == threshold
    keep_V = (key_V > threshold) | (tie_V & (jnp.cumsum(tie_V, dtype=jnp.int32) <= ties))
    return keep_V & (probabilities_V >= min_p * jnp.max(probabilities_V))

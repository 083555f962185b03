"""The filters and the draw in plain jnp, without sorting the vocabulary.

In order of probability every filter keeps the first tokens. So the kept ones are those above a threshold, and of those at the
threshold the first by id. The threshold is found a few bits at a time: a pass over the vocabulary tries several at once.
Probabilities are added as integers, so that a sum has no order: a row has the same tokens in any company, and from the kernels.
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
# From here on every float32 is an integer.
INTEGERS = 2.0**23


def mass(probability: jax.Array) -> jax.Array:
    """A probability as a multiple of 2**-31, uint32: the nearest one, and of two the larger."""
    parts = probability * ONE
    # A half added to a large number would be rounded. Kernels have no rounding of their own.
    return jnp.where(parts < INTEGERS, parts + 0.5, parts).astype(jnp.uint32)


def bounds(size: int, top_k: jax.Array, top_p: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens are kept while fewer than this number, int32, and less than this mass, uint32, rank before them.

    Args:
        size: V.
        top_k, top_p: as for `keep`, of any shape.
    """
    most = jnp.where(top_k == 0, jnp.int32(size), top_k)
    return most, jnp.where(top_p >= 1, jnp.uint32(0xFFFFFFFF), jnp.ceil(top_p * ONE).astype(jnp.uint32))


def kept_ties(
    threshold: jax.Array, size: int, most: jax.Array, least: jax.Array, count: jax.Array, above: jax.Array
) -> jax.Array:
    """How many tokens at the threshold are kept at most, int32 [].

    Args:
        threshold: int32, the smallest key that `count` and `above` allow.
        size: V.
        most, least: the `bounds`.
        count, above: int32 and uint32, the number of tokens above the threshold and their mass; below the bounds.
    """
    each = mass(jax.lax.bitcast_convert_type(threshold, jnp.float32))
    # Those that still have less than the bound before them: `least - above` is positive.
    by_mass = jnp.where(each == 0, jnp.uint32(size), (least - above - 1) // jnp.maximum(each, 1) + 1)
    return jnp.minimum(most - count, jnp.minimum(by_mass, jnp.uint32(size)).astype(jnp.int32))


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


def keep(probabilities_V: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """The probabilities of the tokens that all filters keep, and 0 for the others, float32 [V].

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
    key_V, mass_V = jax.lax.bitcast_convert_type(probabilities_V, jnp.int32), mass(probabilities_V)
    most, least = bounds(size, top_k, top_p)

    def above(key_M: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The number of tokens above each threshold, int32 [M], and their mass in all, uint32 [M]."""
        higher_MV = key_V > key_M[:, None]
        return jnp.sum(higher_MV, axis=1, dtype=jnp.int32), jnp.sum(jnp.where(higher_MV, mass_V, 0), axis=1, dtype=jnp.uint32)

    def few(key_M: jax.Array) -> jax.Array:
        count_M, mass_M = above(key_M)
        return (count_M < most) & (mass_M < least)

    threshold = smallest(few)
    ties = kept_ties(threshold, size, most, least, *(sums[0] for sums in above(threshold[None])))
    tie_V = key_V == threshold
    keep_V = (key_V > threshold) | (tie_V & (jnp.cumsum(tie_V, dtype=jnp.int32) <= ties))
    return jnp.where(keep_V & (probabilities_V >= min_p * jnp.max(probabilities_V)), probabilities_V, 0.0)


def part(random: jax.Array, whole: jax.Array) -> jax.Array:
    """A random number below `whole`: the upper half of the product of two uint32.

    Args:
        random: uint32, all 2**32 values alike. A result is as likely as any other up to 2**-32.
        whole: uint32, above 0.
    """
    (a, b), (c, d) = ((x >> 16, x & 0xFFFF) for x in (random, whole))
    middle = a * d + (b * d >> 16)
    return a * c + (middle >> 16) + (b * c + (middle & 0xFFFF) >> 16)


def pick(weights_V: jax.Array, random: jax.Array) -> jax.Array:
    """Draw a token by one random number, int32: the first one up to which the masses sum to more than a part of their sum.

    A token's share is that of its weight rounded to multiples of 2**-31. The last token if all masses are 0.

    Args:
        weights_V: float32 [V], from 0 to 1, in all at most about 1.
        random: uint32.
    """
    sum_V = jnp.cumsum(mass(weights_V), dtype=jnp.uint32)
    count = jnp.sum(sum_V <= part(random, sum_V[-1]), dtype=jnp.int32)
    return jnp.minimum(count, jnp.int32(len(weights_V) - 1))

"""Signs of the I-quants, one bit a weight, moved between the file's order and that of a device word."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def spread(groups: Sequence[jax.Array], places: np.ndarray) -> jax.Array:
    """Put the signs of 32 weights into one word, int32 [...].

    Args:
        groups: of four groups of eight weights, uint32 [...] each; bit i is the sign of weight i, and higher bits are ignored.
        places: bit positions in the word, [4, 8].
    """
    word = jnp.zeros_like(groups[0])
    for group, row in zip(groups, places.tolist(), strict=True):
        for weight, place in enumerate(row):
            word |= ((group >> weight) & 1) << place
    return jax.lax.bitcast_convert_type(word, jnp.int32)


def gather(word: jax.Array, places: np.ndarray) -> list[jax.Array]:
    """The inverse of `spread`: four groups, uint32 [...] each, from words int32 [...]."""
    bits = jax.lax.bitcast_convert_type(word, jnp.uint32)
    groups = []
    for row in places.tolist():
        group = jnp.zeros_like(bits)
        for weight, place in enumerate(row):
            group |= ((bits >> place) & 1) << weight
        groups.append(group)
    return groups


def with_parity(packed: jax.Array) -> list[jax.Array]:
    """Four groups of eight signs from four times seven, the low 28 bits of uint32 [...]: their number is even."""
    sevens = [(packed >> (7 * group)) & 127 for group in range(4)]
    return [seven | ((jax.lax.population_count(seven) & 1) << 7) for seven in sevens]


def without_parity(groups: Sequence[jax.Array]) -> jax.Array:
    """The inverse of `with_parity`: uint32 [...]."""
    packed = jnp.zeros_like(groups[0])
    for number, group in enumerate(groups):
        packed |= (group & 127) << (7 * number)
    return packed

"""From logits to a token: the filters, each defined once, and the draw."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from ds4jax.errors import InputError

# Larger ones overflow float32; the distribution is uniform long before.
MOST_TEMPERATURE = 1e30


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose tokens; temperature 0 is greedy and ignores the filters.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens until their probabilities sum to p, the one that crosses included.
        min_p: keep tokens at least this fraction as likely as the most likely one.
        seed: the same seed draws the same tokens.

    Raises:
        InputError: a value outside its range; the message names it.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature is {self.temperature}; it must be a finite number of at least 0")
        if self.top_k < 0:
            raise InputError(f"top-k is {self.top_k}; it must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min-p is {self.min_p}; it must be between 0 and 1")
        if not -(2**63) <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}; it must fit in 64 bits")

    def arrays(self) -> Filters:
        """The numbers as traced values: changing them compiles nothing."""
        limit = min(self.top_k, 2**31 - 1)
        low, high = self.seed & 0xFFFFFFFF, self.seed >> 32 & 0xFFFFFFFF
        key = jax.random.fold_in(jax.random.key(low), jnp.uint32(high))
        temperature = jnp.float32(min(self.temperature, MOST_TEMPERATURE))
        return Filters(temperature, jnp.int32(limit), jnp.float32(self.top_p), jnp.float32(self.min_p), key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Filters:
    """A `Sampling` on the device: float32 and int32 scalars and a key."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    key: jax.Array


def filtered(logits_V: jax.Array, filters: Filters) -> jax.Array:
    """The distribution that is sampled from, float32 [V]; zero where a filter removes the token.

    All filters look at the same probabilities, softmax(logits / temperature) over the whole vocabulary, and a token stays when
    every one of them keeps it. Ties in likelihood rank the lower id first. The most likely token always stays.
    """
    # Shifted first: a tiny temperature must not make two infinities of the largest logits.
    probabilities = jax.nn.softmax((logits_V - jnp.max(logits_V)) / filters.temperature)
    order = jnp.argsort(-probabilities, stable=True)
    ranked = probabilities[order]
    rank = jnp.arange(ranked.shape[0], dtype=jnp.int32)
    before = jnp.cumsum(ranked) - ranked
    keep = (filters.top_k == 0) | (rank < filters.top_k)
    keep &= (before < filters.top_p) | (filters.top_p >= 1.0)
    keep &= ranked >= filters.min_p * ranked[0]
    kept = jnp.where(keep | (rank == 0), ranked, 0.0)
    return jnp.zeros_like(probabilities).at[order].set(kept / jnp.sum(kept))


def choose(logits_V: jax.Array, filters: Filters, position: jax.Array) -> jax.Array:
    """The token after `position`, int32; a draw depends on the seed and the position alone."""

    def draw(logits_V: jax.Array) -> jax.Array:
        key = jax.random.fold_in(filters.key, position)
        return jax.random.categorical(key, jnp.log(filtered(logits_V, filters))).astype(jnp.int32)

    def most_likely(logits_V: jax.Array) -> jax.Array:
        return jnp.argmax(logits_V).astype(jnp.int32)

    return jax.lax.cond(filters.temperature > 0, draw, most_likely, logits_V)

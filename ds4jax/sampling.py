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


# What a draw is for: each has its own key at its position.
NEXT, REPLACEMENT, ACCEPTANCE, PROPOSAL = range(4)


def _key(filters: Filters, position: jax.Array, purpose: jax.Array | int) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(filters.key, position), purpose)


def most_likely(logits: jax.Array) -> jax.Array:
    """The greedy choice over the last axis, int32; of equals the lower id."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def draw(weights_V: jax.Array, filters: Filters, position: jax.Array, replacement: jax.Array) -> jax.Array:
    """The token after `position`, int32, with probabilities in proportion to float32 [V] weights.

    `replacement` says that the token takes the place of a rejected draft.
    """
    key = _key(filters, position, jnp.where(replacement, REPLACEMENT, NEXT))
    return jax.random.categorical(key, jnp.log(weights_V)).astype(jnp.int32)


def uniform(filters: Filters, position: jax.Array) -> jax.Array:
    """A float32 in [0, 1) against which the draft after `position` is judged."""
    return jax.random.uniform(_key(filters, position, ACCEPTANCE), (), jnp.float32)


def propose(logits_V: jax.Array, filters: Filters, position: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A draft of the token after `position`, int32, and the distribution it was drawn from, [V]; zeros at temperature 0."""

    def drawn(logits_V: jax.Array) -> tuple[jax.Array, jax.Array]:
        q_V = filtered(logits_V, filters)
        return jax.random.categorical(_key(filters, position, PROPOSAL), jnp.log(q_V)).astype(jnp.int32), q_V

    def greedy(logits_V: jax.Array) -> tuple[jax.Array, jax.Array]:
        return most_likely(logits_V), jnp.zeros_like(logits_V)

    return jax.lax.cond(filters.temperature > 0, drawn, greedy, logits_V)

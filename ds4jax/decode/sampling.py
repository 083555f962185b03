"""Sampling: filters on the logits, and the draw of a token."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax import bounds
from ds4jax.decode.selection import kept

# Higher temperatures overflow float32; at this one the distribution is already uniform.
MAX_TEMPERATURE = 1e30
_ALLOWED: dict[str, bounds.Integers | bounds.Numbers] = {
    "temperature": bounds.TEMPERATURE,
    "top_k": bounds.TOP_K,
    "top_p": bounds.TOP_P,
    "min_p": bounds.MIN_P,
    "seed": bounds.SEED,
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose tokens. Temperature 0 is greedy and ignores the filters.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens until their probabilities sum to at least p.
        min_p: keep tokens whose probability is at least this fraction of the most likely token's.
        seed: the same seed draws the same tokens. None draws a seed, which the attribute then has.

    Raises:
        InputError: a value is not a number or outside its range; the message names the field.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = 0

    def __post_init__(self) -> None:
        if self.seed is None:
            object.__setattr__(self, "seed", secrets.randbits(63))
        # Convert to Python numbers, because saved sessions store them as JSON.
        for field, allowed in _ALLOWED.items():
            object.__setattr__(self, field, allowed.checked(field.replace("_", "-"), getattr(self, field)))

    def numbers(self) -> Numbers:
        """The values as numpy scalars of the device's types."""
        seed = int(self.seed or 0)
        return Numbers(
            np.float32(min(self.temperature, MAX_TEMPERATURE)),
            np.int32(min(self.top_k, 2**31 - 1)),
            np.float32(self.top_p),
            np.float32(self.min_p),
            np.array([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], np.uint32),
        )

    def arrays(self) -> Filters:
        """The values on the device, for one sequence. They are traced, so other values need no compilation."""
        return _one(self.numbers())


class Numbers(NamedTuple):
    """`Filters` before the seed is a key: its words uint32 [2], the lower one first, or [S, 2] for S sequences."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    seed: Any

    @classmethod
    def of(cls, samplings: Sequence[Sampling]) -> Numbers:
        """Numpy arrays of S sequences."""
        return cls(*map(np.stack, zip(*(sampling.numbers() for sampling in samplings), strict=True)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Filters:
    """`Sampling` on the device: scalars (float32, int32 and a key) for one sequence, or every field [S] for S sequences."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    key: jax.Array

    @classmethod
    def of(cls, samplings: Sequence[Sampling]) -> Filters:
        """The values of S sequences; every field is [S]."""
        return with_keys(Numbers.of(samplings))

    @property
    def sampled(self) -> jax.Array:
        """Which sequences draw tokens, bool of the fields' shape. The others take the most likely token."""
        return self.temperature > 0

    def usable(self) -> Filters:
        """Replace temperature 0 by 1. The sampled result of a greedy sequence is computed but not read."""
        return dataclasses.replace(self, temperature=jnp.where(self.sampled, self.temperature, jnp.float32(1)))


def _with_key(numbers: Numbers) -> Filters:
    low, high = numbers.seed
    return Filters(*numbers[:-1], jax.random.fold_in(jax.random.key(low), high))


_one = jax.jit(_with_key)
# Function of `Numbers` of S sequences: their `Filters`.
with_keys = jax.jit(jax.vmap(_with_key))


def filtered(logits_V: jax.Array, filters: Filters) -> jax.Array:
    """The distribution to draw from, float32 [V]; removed tokens have probability 0.

    All filters use the same probabilities, softmax(logits / temperature) over the complete vocabulary. A token stays if every
    filter keeps it. Of equal probabilities the lower id ranks first. The most likely token always stays.

    Args:
        logits_V: float32 [V].
        filters: of one sequence; the temperature must be positive.
    """
    # Subtract the maximum first. Otherwise a small temperature could give infinite values.
    probabilities = jax.nn.softmax((logits_V - jnp.max(logits_V)) / filters.temperature)
    kept_V = jnp.where(kept(probabilities, filters.top_k, filters.top_p, filters.min_p), probabilities, 0.0)
    return kept_V / jnp.sum(kept_V)


# Purposes of a draw. Each has its own key at each position.
NEXT, REPLACEMENT, ACCEPTANCE, PROPOSAL = range(4)


def _key(filters: Filters, position: jax.Array, purpose: jax.Array | int) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(filters.key, position), purpose)


def most_likely(logits: jax.Array) -> jax.Array:
    """The greedy choice over the last axis, int32; of equal logits the lower id."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def draw(weights_V: jax.Array, filters: Filters, position: jax.Array, replacement: jax.Array) -> jax.Array:
    """Draw the token after `position`, int32.

    Args:
        weights_V: float32 [V], proportional to the probabilities.
        filters: of one sequence.
        position: int32.
        replacement: bool, whether the token replaces a rejected draft.
    """
    key = _key(filters, position, jnp.where(replacement, REPLACEMENT, NEXT))
    return jax.random.categorical(key, jnp.log(weights_V)).astype(jnp.int32)


def uniform(filters: Filters, position: jax.Array) -> jax.Array:
    """A random float32 in [0, 1) for accepting the draft after `position`."""
    return jax.random.uniform(_key(filters, position, ACCEPTANCE), (), jnp.float32)


def propose(logits_SV: jax.Array, filters: Filters, position_S: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Choose a draft for each sequence.

    Args:
        logits_SV: float32 [S, V], from the drafter.
        filters: every field [S].
        position_S: int32 [S], the position before the draft.

    Returns:
        The drafts int32 [S], and their distributions float32 [S, V], which are undefined at temperature 0.
    """

    def one(logits_V: jax.Array, filters: Filters, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        q_V = filtered(logits_V, filters)
        return jax.random.categorical(_key(filters, position, PROPOSAL), jnp.log(q_V)).astype(jnp.int32), q_V

    def drawn(logits_SV: jax.Array) -> tuple[jax.Array, jax.Array]:
        token_S, q_SV = jax.vmap(one)(logits_SV, filters.usable(), position_S)
        return jnp.where(filters.sampled, token_S, most_likely(logits_SV)), q_SV

    def greedy(logits_SV: jax.Array) -> tuple[jax.Array, jax.Array]:
        return most_likely(logits_SV), jnp.zeros_like(logits_SV)

    # One condition for all sequences: if all are greedy, no probabilities are computed.
    return jax.lax.cond(jnp.any(filters.sampled), drawn, greedy, logits_SV)

"""Sampling: filters on the logits, and the draw of a token."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax import bounds
from ds4jax.model import paths
from pallas_kernels.sampling import decode, meaning

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


def kept(logits_V: jax.Array, filters: Filters, *, strict: bool = False) -> jax.Array:
    """The probabilities of the tokens that the filters keep, float32 [V]; removed tokens have probability 0.

    All filters use the same probabilities, softmax(logits / temperature) over the complete vocabulary. A token stays if every
    filter keeps it. Of equal probabilities the lower id ranks first. The most likely token always stays.

    Args:
        logits_V: float32 [V], or [..., V] with the axes of the filters' fields.
        filters: of one sequence, or of as many as there are rows; the temperatures must be positive.
        strict: static; without Pallas kernels.
    """
    # Subtract the maximum first. Otherwise a small temperature could give infinite values.
    weights = jnp.exp((logits_V - jnp.max(logits_V, axis=-1, keepdims=True)) / filters.temperature[..., None])
    probabilities = weights / jnp.sum(weights, axis=-1, keepdims=True)
    operands = probabilities, filters.top_k, filters.top_p, filters.min_p
    return _by_row(decode.keep, meaning.keep, operands, strict=strict)


def filtered(logits_V: jax.Array, filters: Filters, *, strict: bool = False) -> jax.Array:
    """The distribution to draw from: `kept`, divided by its sum."""
    kept_V = kept(logits_V, filters, strict=strict)
    return kept_V / jnp.sum(kept_V, axis=-1, keepdims=True)


def _by_row(
    kernel: Callable[..., jax.Array], meant: Callable[..., jax.Array], operands: tuple[jax.Array, ...], *, strict: bool
) -> jax.Array:
    """A function of rows of the vocabulary, by kernels on CUDA unless strict.

    Args:
        kernel, meant: functions of the same operands, of R rows and of one.
        operands: the first one [..., V], the others [...].
    """
    axes = operands[0].shape[:-1]
    rows = tuple(x.reshape(-1, *x.shape[len(axes) :]) for x in operands)
    default = jax.vmap(meant)
    if paths.why_not_sampling(strict=strict):
        made: jax.Array = default(*rows)
    else:
        made = jax.lax.platform_dependent(*rows, cuda=kernel, default=default)
    return made.reshape(*axes, *made.shape[1:])


# Purposes of a draw. Each has its own key at each position.
NEXT, REPLACEMENT, ACCEPTANCE, PROPOSAL = range(4)


def _random(make: Callable[[jax.Array], jax.Array], filters: Filters, position: jax.Array, purpose: jax.Array | int) -> jax.Array:
    """Random numbers made from the key of each position; all arguments have the position's axes."""

    def one(key: jax.Array, position: jax.Array, purpose: jax.Array) -> jax.Array:
        return make(jax.random.fold_in(jax.random.fold_in(key, position), purpose))

    for _ in range(position.ndim):
        one = jax.vmap(one)
    return one(filters.key, position, jnp.broadcast_to(jnp.asarray(purpose, jnp.int32), position.shape))


def most_likely(logits: jax.Array) -> jax.Array:
    """The greedy choice over the last axis, int32; of equal logits the lower id."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def draw(
    weights_V: jax.Array, filters: Filters, position: jax.Array, purpose: jax.Array | int, *, strict: bool = False
) -> jax.Array:
    """Draw the token after `position`, int32.

    Args:
        weights_V: float32 [V] or [..., V], from 0 to 1 and in all at most about 1: proportional to the probabilities, which they
            give up to multiples of 2**-31.
        filters, position: of one row, or with the axes of the rows; the position is int32.
        purpose: `NEXT`, `REPLACEMENT` or `PROPOSAL`.
        strict: static; without Pallas kernels.
    """
    random = _random(lambda key: jax.random.bits(key, (), jnp.uint32), filters, position, purpose)
    return _by_row(decode.pick, meaning.pick, (weights_V, random), strict=strict)


def uniform(filters: Filters, position: jax.Array) -> jax.Array:
    """A random float32 in [0, 1) for accepting the draft after `position`; arguments have the same axes."""
    return _random(lambda key: jax.random.uniform(key, (), jnp.float32), filters, position, ACCEPTANCE)


def propose(
    logits_SV: jax.Array, filters: Filters, position_S: jax.Array, *, strict: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Choose a draft for each sequence.

    Args:
        logits_SV: float32 [S, V], from the drafter.
        filters: every field [S].
        position_S: int32 [S], the position before the draft.
        strict: static; without Pallas kernels.

    Returns:
        The drafts int32 [S], and their distributions float32 [S, V], which are undefined at temperature 0.
    """

    def drawn(logits_SV: jax.Array) -> tuple[jax.Array, jax.Array]:
        q_SV = filtered(logits_SV, filters.usable(), strict=strict)
        token_S = draw(q_SV, filters, position_S, PROPOSAL, strict=strict)
        return jnp.where(filters.sampled, token_S, most_likely(logits_SV)), q_SV

    def greedy(logits_SV: jax.Array) -> tuple[jax.Array, jax.Array]:
        return most_likely(logits_SV), jnp.zeros_like(logits_SV)

    # One condition for all sequences: if all are greedy, no probabilities are computed.
    return jax.lax.cond(jnp.any(filters.sampled), drawn, greedy, logits_SV)

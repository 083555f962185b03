"""Drafters propose the next tokens. The verifier works with any drafter.

A drafter is a static argument of the compiled loop, so it is hashable and holds no arrays. Its state is a pytree that the loop
carries. Its proposals change the speed of the loop but not the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from ds4jax.cache.state import Rows
from ds4jax.config import Config
from ds4jax.decode.sampling import Filters
from ds4jax.model.transformer import Transformer

State = Any


class Drafts(NamedTuple):
    """Proposed tokens for S sequences, or for one without the axis S.

    Attributes:
        tokens: int32 [S, K] for the K positions after the last committed token. Entries from the current depth on are not read.
            A token outside the vocabulary is rejected.
        q: float32 [S, K, V], the distribution that each token was drawn from; not read at temperature 0.
        confidence: float32 [S, K], the drafter's own estimate that a draft is accepted if all earlier ones are; None without one.
            It shortens the drafts of sequences whose depth is automatic.
    """

    tokens: jax.Array
    q: jax.Array
    confidence: jax.Array | None = None

    @classmethod
    def none(cls, sequences: int, max_draft: int, vocabulary: int) -> Drafts:
        """Zeros of these shapes."""
        shape = (sequences, max_draft)
        return cls(jnp.zeros(shape, jnp.int32), jnp.zeros((*shape, vocabulary), jnp.float32))

    def known(self, vocabulary: int) -> jax.Array:
        """Which tokens are in a vocabulary of this size, bool of the shape of `tokens`."""
        return (self.tokens >= 0) & (self.tokens < vocabulary)


class Drafter(Protocol):
    """Three functions on a state. Hashable, because the loop is compiled for each drafter.

    In each call, an inactive sequence has `rows.end` equal to `rows.start`. Its part of the state must not change.

    A drafter with a class attribute `by_position` = True promises that arrays of its state which grow with the capacity hold one
    entry a position, and that entries past a sequence's rows are never read. A saved session then leaves those out.
    """

    def init(self, config: Config, capacity: int, rows: int, sequences: int) -> State:
        """The state before any token.

        Args:
            capacity: maximum rows of a sequence.
            rows: maximum rows of a sequence in a decode step.
            sequences: S, the number of sequences.
        """

    def draft(
        self, model: Transformer, state: State, last_S: jax.Array, rows: Rows, depth_S: jax.Array, maximum: int, filters: Filters
    ) -> tuple[Drafts, State]:
        """Propose the tokens after each sequence's last committed token.

        Args:
            last_S: int32 [S], the last committed tokens, at positions `rows.start`; they are not in the cache yet.
            rows: one row per sequence, at that position.
            depth_S: int32 [S], number of tokens that will be read; 0 for a sequence that does not draft.
            maximum: static, K, the maximum of every depth.
            filters: temperature, filters and key of each sequence, every field [S].

        Returns:
            The drafts, with tokens [S, K] and q [S, K, V], and the new state.
        """

    def commit(self, model: Transformer, state: State, h_TND: jax.Array, next_ids_T: jax.Array, rows: Rows) -> State:
        """Update the state with committed tokens, in prefill and after every step.

        Args:
            h_TND: float32 [T, N, D], the model's streams at the call's rows.
            next_ids_T: int32 [T], the token after each row.
            rows: sequence and position of each row; only live rows are committed.

        Returns:
            The new state.
        """


@runtime_checkable
class Tapping(Drafter, Protocol):
    """A drafter that reads the main model's layers."""

    def taps(self, config: Config) -> tuple[int, ...]:
        """Layers of the main model, counted from 0."""

    def commit(
        self, model: Transformer, state: State, h_TND: jax.Array, next_ids_T: jax.Array, rows: Rows,
        means: Sequence[jax.Array] = (),
    ) -> State:  # fmt: skip
        """As in `Drafter`; `means` has for each layer of `taps` the mean float32 [T, D] over the streams after it."""


def taps_of(drafter: Drafter | None, config: Config) -> tuple[int, ...]:
    """Layers that a drafter reads; none for a drafter that reads the last streams alone."""
    return drafter.taps(config) if isinstance(drafter, Tapping) else ()


def committed(
    drafter: Drafter, model: Transformer, state: State, h_TND: jax.Array, means: Sequence[jax.Array], next_ids_T: jax.Array,
    rows: Rows,
) -> State:  # fmt: skip
    """The drafter's state after its `commit`."""
    if isinstance(drafter, Tapping):
        return drafter.commit(model, state, h_TND, next_ids_T, rows, means)
    return drafter.commit(model, state, h_TND, next_ids_T, rows)

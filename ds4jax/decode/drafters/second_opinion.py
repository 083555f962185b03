"""Two drafters: the text so far drafts where it has a long match and the first drafter is unsure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ds4jax.bounds import Integers, Numbers
from ds4jax.cache.state import Rows
from ds4jax.config import Config
from ds4jax.decode.drafter import Drafter, Drafts, committed, taps_of
from ds4jax.decode.drafters.ngram import NgramDrafter, NgramState
from ds4jax.decode.sampling import Filters
from ds4jax.model.transformer import Transformer

SURE = Numbers(0, 1, "it must be between 0 and 1")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Opinions:
    """States of both drafters."""

    first: Any
    ngram: NgramState


@dataclasses.dataclass(frozen=True)
class SecondOpinion:
    """The first drafter, and n-gram drafts for a sequence with a long match whose first draft is doubtful.

    Both drafters run in every step. The choice depends on committed tokens only: a confidence in later drafts depends on the
    drawn ones before them, and choosing by it would change the distribution of the committed tokens.

    Attributes:
        first: its confidence in the first draft decides; without one the length of the match decides alone.
        ngram: the second drafter.
        long: number of equal tokens of a long match.
        sure: from this confidence in its first draft on, the first drafter's drafts are taken. The default is the share of
            n-gram drafts after five equal tokens that are right, see `ds4jax.decode.drafters.ngram.DOUBT`.

    Raises:
        InputError: `long` is not 1 to `ngram.longest`, or `sure` is not between 0 and 1.
    """

    first: Drafter
    ngram: NgramDrafter = dataclasses.field(default_factory=NgramDrafter)
    long: int = 5
    sure: float = 0.6

    def __post_init__(self) -> None:
        longest = self.ngram.longest
        allowed = Integers(1, longest, f"it must be 1 to {longest}, the longest match")
        object.__setattr__(self, "long", allowed.checked("long", self.long))
        object.__setattr__(self, "sure", SURE.checked("sure", self.sure))

    @property
    def by_position(self) -> bool:
        """Whether a saved session may leave out what lies past its rows: the first drafter's answer."""
        return bool(getattr(self.first, "by_position", False))

    def taps(self, config: Config) -> tuple[int, ...]:
        """The first drafter's."""
        return taps_of(self.first, config)

    def init(self, config: Config, capacity: int, rows: int, sequences: int) -> Opinions:
        """The first states of both."""
        return Opinions(*(drafter.init(config, capacity, rows, sequences) for drafter in (self.first, self.ngram)))

    def draft(
        self, model: Transformer, state: Opinions, last_S: jax.Array, rows: Rows, depth_S: jax.Array, maximum: int,
        filters: Filters,
    ) -> tuple[Drafts, Opinions]:  # fmt: skip
        """Each sequence's drafts come from one of the two, with that one's q and confidence."""
        drafts, first = self.first.draft(model, state.first, last_S, rows, depth_S, maximum, filters)
        repeat = self.ngram.repeat(state.ngram, last_S, rows.start, maximum)
        other = repeat.drafts(model.config.vocab_size)
        chosen_S = repeat.length >= self.long
        if drafts.confidence is None:
            # Without the first drafter's confidence the two cannot be compared, so no draft is cut.
            other = other._replace(confidence=None)
        else:
            # NaN is not sure.
            chosen_S &= ~(drafts.confidence[:, 0] >= self.sure)

        def choose(ours: jax.Array, theirs: jax.Array) -> jax.Array:
            return jnp.where(chosen_S.reshape(-1, *[1] * (ours.ndim - 1)), theirs, ours)

        merged: Drafts = jax.tree.map(choose, drafts, other)
        return merged, dataclasses.replace(state, first=first)

    def commit(
        self, model: Transformer, state: Opinions, h_TND: jax.Array, next_ids_T: jax.Array, rows: Rows,
        means: Sequence[jax.Array] = (),
    ) -> Opinions:  # fmt: skip
        """Both commit the rows."""
        first = committed(self.first, model, state.first, h_TND, list(means), next_ids_T, rows)
        return Opinions(first, self.ngram.commit(model, state.ngram, h_TND, next_ids_T, rows))

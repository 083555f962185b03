"""Drafts copied from the text so far: what followed the last tokens where they stood before. No weights."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from ds4jax.bounds import Integers
from ds4jax.cache.state import Rows
from ds4jax.config import Config
from ds4jax.decode.drafter import Drafts
from ds4jax.decode.sampling import Filters
from ds4jax.model.transformer import Transformer

LENGTH = Integers(1, 64, "it must be 1 to 64")
# After m equal tokens the next one is equal in about m / (m + DOUBT) of all cases. Measured with the tiny model's tokenizer on
# its held-out text, Python and Markdown: 0.2 at 1, 0.4 at 2, 0.5 at 3, 0.6 at 5, 0.7 at 8.
DOUBT = 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NgramState:
    """State of the n-gram drafter: the tokens by position, int32 [S, capacity + rows].

    Positions after the last committed token are stale. Position 0 is unknown, because `commit` gets the token after each row.
    """

    tokens: jax.Array


class Repeat(NamedTuple):
    """What followed an earlier occurrence of the last tokens, for S sequences.

    Attributes:
        tokens: int32 [S, K], the tokens after it; -1 for a sequence without one.
        length: int32 [S], number of equal tokens; 0 for a sequence without one.
    """

    tokens: jax.Array
    length: jax.Array

    @property
    def confidence(self) -> jax.Array:
        """m / (m + 3) after m equal tokens, float32 [S, K]. Earlier drafts are equal tokens, too; without a match it is 0."""
        before_SK = self.length[:, None] + jnp.arange(self.tokens.shape[1], dtype=jnp.int32)
        equal_SK = jnp.where(self.length[:, None] > 0, before_SK, 0).astype(jnp.float32)
        return equal_SK / (equal_SK + DOUBT)

    def drafts(self, vocabulary: int) -> Drafts:
        """The tokens as drafts. Nothing was drawn, so q is one-hot."""
        return Drafts(self.tokens, jax.nn.one_hot(self.tokens, vocabulary, dtype=jnp.float32), self.confidence)


@dataclasses.dataclass(frozen=True)
class NgramDrafter:
    """Prompt lookup: finds the last tokens earlier in prompt and output, and drafts what followed them there.

    The longest match wins, and of equal ones the latest. A copy that reaches the end of the text goes on with its own tokens, so
    a text that repeats itself is continued with its period.

    Attributes:
        longest: number of last tokens that are compared.
        shortest: a match of fewer tokens is none.

    Raises:
        InputError: not 1 <= shortest <= longest <= 64.

    Source: prompt lookup decoding, Saxena 2023 (github.com/apoorvumang/prompt-lookup-decoding).
    """

    by_position: ClassVar[bool] = True

    longest: int = 8
    shortest: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "longest", LENGTH.checked("longest", self.longest))
        shorter = Integers(1, self.longest, f"it must be 1 to {self.longest}, the longest match")
        object.__setattr__(self, "shortest", shorter.checked("shortest", self.shortest))

    def init(self, config: Config, capacity: int, rows: int, sequences: int) -> NgramState:
        """No token is known."""
        return NgramState(jnp.full((sequences, capacity + rows), -1, jnp.int32))

    def draft(
        self, model: Transformer, state: NgramState, last_S: jax.Array, rows: Rows, depth_S: jax.Array, maximum: int,
        filters: Filters,
    ) -> tuple[Drafts, NgramState]:  # fmt: skip
        """The tokens after the longest match; -1 with confidence 0 for a sequence without one."""
        return self.repeat(state, last_S, rows.start, maximum).drafts(model.config.vocab_size), state

    def commit(self, model: Transformer, state: NgramState, h_TND: jax.Array, next_ids_T: jax.Array, rows: Rows) -> NgramState:
        """Store the token after each live row."""
        place_T = jnp.where(rows.live, rows.position + 1, state.tokens.shape[1])
        return NgramState(state.tokens.at[rows.sequence, place_T].set(next_ids_T, mode="drop"))

    def repeat(self, state: NgramState, last_S: jax.Array, start_S: jax.Array, maximum: int) -> Repeat:
        """Find the longest match of each sequence.

        Args:
            last_S: int32 [S], the last committed tokens, at positions `start_S` int32 [S].
            maximum: static, K.
        """
        with jax.named_scope("ngram"):
            place_C = jnp.arange(state.tokens.shape[1], dtype=jnp.int32)
            text_SC = jnp.where(place_C == start_S[:, None], last_S[:, None], state.tokens)
            length_S, end_S = self._longest(text_SC, start_S)
            found_S1 = (length_S >= self.shortest)[:, None]
            # Modulo the distance, a copy never reads past the last token.
            distance_S1 = jnp.maximum(start_S - end_S, 1)[:, None]
            source_SK = end_S[:, None] + 1 + jnp.arange(maximum, dtype=jnp.int32) % distance_S1
            tokens_SK = jnp.take_along_axis(text_SC, source_SK, axis=1, mode="clip")
            return Repeat(jnp.where(found_S1, tokens_SK, -1), jnp.where(found_S1[:, 0], length_S, 0))

    def _longest(self, text_SC: jax.Array, start_S: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Length and last position of the longest match before the last token, int32 [S] each; of equal lengths the latest.

        Compares the text with each of the last tokens in turn, shifted by its distance, so no array is larger than [S, C].
        """
        size = text_SC.shape[1]
        place_C = jnp.arange(size, dtype=jnp.int32)
        equal_SC, length_SC = place_C < start_S[:, None], jnp.zeros(text_SC.shape, jnp.int32)
        for i in range(min(self.longest, size)):
            wanted_S1 = jnp.take_along_axis(text_SC, jnp.maximum(start_S - i, 0)[:, None], axis=1)
            shifted_SC = jnp.pad(text_SC[:, : size - i], ((0, 0), (i, 0)))
            equal_SC &= (shifted_SC == wanted_S1) & (place_C > i)
            length_SC += equal_SC.astype(jnp.int32)
        # One maximum finds both: the length is the higher digit, the position the lower one.
        best_S = jnp.max(length_SC * size + place_C, axis=1)
        return best_S // size, best_S % size

"""Which tokens a sequence may take next: bits that the host computes, for structured output."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

BITS = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """The allowed tokens of S sequences. Traced, so other values need no compilation.

    Attributes:
        words: uint32 [S, ceil(V/32)]; token v is allowed if bit v mod 32 of word v // 32 is 1.
        masked: bool [S]; the words of the other sequences are not read.
    """

    words: jax.Array
    masked: jax.Array

    @classmethod
    def none(cls, sequences: int, vocabulary: int) -> Mask:
        """All tokens are allowed."""
        return cls(jnp.zeros((sequences, words(vocabulary)), jnp.uint32), jnp.zeros(sequences, bool))

    def applied(self, logits_SWV: jax.Array) -> jax.Array:
        """The logits float32 [S, W, V] with -inf for tokens that are not allowed. Other bits do not change."""
        token_V = jnp.arange(logits_SWV.shape[-1], dtype=jnp.uint32)
        allowed_SV = (self.words[:, token_V // BITS] >> (token_V % BITS)) & 1 > 0
        return jnp.where((allowed_SV | ~self.masked[:, None])[:, None], logits_SWV, -jnp.inf)


def words(vocabulary: int) -> int:
    """Number of words of a mask."""
    return -(-vocabulary // BITS)

"""Log probabilities of the tokens of one call of the loop."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

# Most likely tokens that are noted for each token.
TOP = 20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """Natural logarithms of probabilities at temperature 1, without filters and masks, for the R first tokens of a call.

    Attributes:
        chosen: float32 [S, R], of the token itself.
        top: float32 [S, R, n], of the n most likely tokens, best first; of equal ones the lower id.
        top_ids: int32 [S, R, n], these tokens.
    """

    chosen: jax.Array
    top: jax.Array
    top_ids: jax.Array

    @classmethod
    def none(cls, sequences: int, size: int, vocabulary: int) -> Scores:
        """Zeros, for S sequences and R = `size` tokens."""
        shape = (sequences, size, min(TOP, vocabulary))
        return cls(jnp.zeros(shape[:2], jnp.float32), jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32))

    def after(
        self, wanted_S: jax.Array, logits_SWV: jax.Array, tokens_SW: jax.Array, made_S: jax.Array, count_S: jax.Array
    ) -> Scores:
        """The scores after one more step. If no sequence wants any, nothing is computed.

        Args:
            wanted_S: bool [S].
            logits_SWV: float32 [S, W, V], the model's logits.
            tokens_SW: int32 [S, W], the tokens that follow; the first `count_S` are committed.
            made_S: int32 [S], tokens of earlier steps of the call.
            count_S: int32 [S].
        """

        def scored(scores: Scores) -> Scores:
            offset = jnp.arange(tokens_SW.shape[1], dtype=jnp.int32)
            place_SW = jnp.where(offset < count_S[:, None], made_S[:, None] + offset, scores.chosen.shape[1])
            index_S1 = jnp.arange(len(count_S), dtype=jnp.int32)[:, None]
            logprobs_SWV = jax.nn.log_softmax(logits_SWV)
            chosen_SW = jnp.take_along_axis(logprobs_SWV, tokens_SW[..., None], axis=2)[..., 0]
            top_SWn, top_ids_SWn = jax.lax.top_k(logprobs_SWV, scores.top.shape[2])
            return Scores(
                scores.chosen.at[index_S1, place_SW].set(chosen_SW, mode="drop"),
                scores.top.at[index_S1, place_SW].set(top_SWn, mode="drop"),
                scores.top_ids.at[index_S1, place_SW].set(top_ids_SWn, mode="drop"),
            )

        return jax.lax.cond(jnp.any(wanted_S), scored, lambda scores: scores, self)

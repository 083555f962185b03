"""Acceptance of drafts, and the token after the accepted ones. One rule for every drafter.

The committed token after the accepted drafts has not been through the model yet. It is the first row of the next step.

Source: speculative sampling, Leviathan et al. (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ds4jax.decode.drafter import Drafts
from ds4jax.decode.sampling import Filters, draw, filtered, most_likely, uniform

Decision = tuple[jax.Array, jax.Array]


def accept(logits_SWV: jax.Array, drafts: Drafts, depth_S: jax.Array, filters: Filters, position_S: jax.Array) -> Decision:
    """Accept a prefix of each sequence's drafts, and choose the token after it.

    At temperature 0 a draft is accepted if it is the most likely token. At a higher temperature it is accepted with probability
    min(1, p/q), and a rejected draft is replaced by a draw from max(p - q, 0), normalised. So the committed tokens have the
    distribution p for any drafter.

    A drafted token outside the vocabulary has p = 0 and is rejected. A negative or NaN entry of q counts as 0.

    Args:
        logits_SWV: float32 [S, W, V], the model's logits at the last committed token and at the W - 1 = K drafts.
        drafts: tokens int32 [S, K] and their distributions q float32 [S, K, V].
        depth_S: int32 [S], the number of valid drafts; later entries are not read.
        filters: temperature, filters and key of each sequence, every field [S].
        position_S: int32 [S], position of the first row.

    Returns:
        The number of accepted drafts, int32 [S], and the token after them, int32 [S].

    Source: Leviathan et al. (arXiv 2211.17192), algorithm 1.
    """

    def sampled(logits_SWV: jax.Array) -> Decision:
        drawn = jax.vmap(_sampled)(logits_SWV, drafts, depth_S, filters.usable(), position_S)
        count_S, token_S = (jnp.where(filters.sampled, a, b) for a, b in zip(drawn, greedy(logits_SWV), strict=True))
        return count_S, token_S

    def greedy(logits_SWV: jax.Array) -> Decision:
        return jax.vmap(_greedy)(logits_SWV, drafts, depth_S)

    # One condition for all sequences: if all are greedy, no probabilities are computed.
    return jax.lax.cond(jnp.any(filters.sampled), sampled, greedy, logits_SWV)


def _accepted_prefix(accepted_K: jax.Array, depth: jax.Array) -> jax.Array:
    """Length of the prefix of true entries among the first `depth`."""
    real = jnp.arange(accepted_K.shape[0], dtype=jnp.int32) < depth
    return jnp.sum(jnp.cumprod((accepted_K & real).astype(jnp.int32)))


def _greedy(logits_WV: jax.Array, drafts: Drafts, depth: jax.Array) -> Decision:
    """One greedy sequence: logits [W, V], drafts [K], depth []."""
    tokens_W = most_likely(logits_WV)
    count = _accepted_prefix(drafts.tokens == tokens_W[:-1], depth)
    return count, tokens_W[count]


def _sampled(logits_WV: jax.Array, drafts: Drafts, depth: jax.Array, filters: Filters, position: jax.Array) -> Decision:
    """One sampled sequence: logits [W, V], drafts [K], other arguments []."""
    max_draft = drafts.tokens.shape[0]
    positions_W = position + jnp.arange(max_draft + 1, dtype=jnp.int32)
    p_WV = jax.vmap(filtered, in_axes=(0, None))(logits_WV, filters)
    uniform_K = jax.vmap(uniform, in_axes=(None, 0))(filters, positions_W[:-1])
    known_K = drafts.known(logits_WV.shape[1])
    chosen = (jnp.arange(max_draft), jnp.where(known_K, drafts.tokens, 0))
    count = _accepted_prefix(known_K & (uniform_K * _non_negative(drafts.q[chosen]) < p_WV[:-1][chosen]), depth)
    p_V = p_WV[count]
    replaced = count < depth
    above_V = jnp.maximum(p_V - _non_negative(drafts.q[jnp.minimum(count, max_draft - 1)]), 0.0) if max_draft else p_V
    # If p - q is nowhere positive, p and q are equal up to rounding, and rounding caused the rejection.
    residual_V = jnp.where(replaced & (jnp.sum(above_V) > 0), above_V, p_V)
    return count, draw(residual_V, filters, positions_W[count], replaced)


def _non_negative(q: jax.Array) -> jax.Array:
    """A drafter's probabilities, with 0 for negative entries and NaN."""
    return jnp.where(q > 0, q, 0.0)

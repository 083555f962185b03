"""Acceptance of drafts, and the token after the accepted ones. One rule for every drafter.

The committed token after the accepted drafts has not been through the model yet. It is the first row of the next step.

Source: speculative sampling, Leviathan et al. (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ds4jax.decode.drafter import Drafts
from ds4jax.decode.sampling import NEXT, REPLACEMENT, Filters, draw, filtered, kept, most_likely, uniform
from pallas_kernels.sampling import meaning

Decision = tuple[jax.Array, jax.Array]


def accept(
    logits_SWV: jax.Array, drafts: Drafts, depth_S: jax.Array, filters: Filters, position_S: jax.Array, *, strict: bool = False
) -> Decision:
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
        strict: static; without Pallas kernels.

    Returns:
        The number of accepted drafts, int32 [S], and the token after them, int32 [S].

    Source: Leviathan et al. (arXiv 2211.17192), algorithm 1.
    """

    def sampled(logits_SWV: jax.Array) -> Decision:
        drawn = _sampled(logits_SWV, drafts, depth_S, filters.usable(), position_S, strict)
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


def _sampled(
    logits_SWV: jax.Array, drafts: Drafts, depth_S: jax.Array, filters: Filters, position_S: jax.Array, strict: bool
) -> Decision:
    """The rows of all sequences together, because the kernels share programs among them."""
    sequences, width, vocabulary = logits_SWV.shape
    positions_SW = position_S[:, None] + jnp.arange(width, dtype=jnp.int32)
    filters_SW = jax.tree.map(lambda field: jnp.broadcast_to(field[:, None], positions_SW.shape), filters)
    if width == 1:
        # Without drafts nothing asks for a sum of 1.
        p_SWV = kept(logits_SWV, filters_SW, strict=strict)
        return jnp.zeros_like(depth_S), draw(p_SWV[:, 0], filters, position_S, NEXT, strict=strict)
    p_SWV, index_S = filtered(logits_SWV, filters_SW, strict=strict), jnp.arange(sequences, dtype=jnp.int32)
    earlier = jax.tree.map(lambda field: field[:, :-1], filters_SW)
    known_SK, q_SKV = drafts.known(vocabulary), drafts.q
    chosen_SK1 = jnp.where(known_SK, drafts.tokens, 0)[..., None]
    p_SK, q_SK = (jnp.take_along_axis(x, chosen_SK1, axis=2)[..., 0] for x in (p_SWV[:, :-1], q_SKV))
    accepted_SK = known_SK & (uniform(earlier, positions_SW[:, :-1]) * _non_negative(q_SK) < p_SK)
    count_S = jax.vmap(_accepted_prefix)(accepted_SK, depth_S)
    p_SV, replaced_S = p_SWV[index_S, count_S], count_S < depth_S
    above_SV = jnp.maximum(p_SV - _non_negative(q_SKV[index_S, jnp.minimum(count_S, width - 2)]), 0.0)
    # If p - q is nowhere positive, p and q are equal up to rounding, and rounding caused the rejection.
    some_S = replaced_S & jnp.any(meaning.mass(above_SV) > 0, axis=1)
    residual_SV = jnp.where(some_S[:, None], above_SV, p_SV)
    purpose_S = jnp.where(replaced_S, REPLACEMENT, NEXT)
    return count_S, draw(residual_SV, filters, positions_SW[index_S, count_S], purpose_S, strict=strict)


def _non_negative(q: jax.Array) -> jax.Array:
    """A drafter's probabilities, with 0 for negative entries and NaN."""
    return jnp.where(q > 0, q, 0.0)

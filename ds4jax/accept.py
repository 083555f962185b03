"""Which drafts stand, and the token that follows them: one rule for every drafter.

Source: speculative sampling, Leviathan et al. (arXiv 2211.17192) and Chen et al. (arXiv 2302.01318). A rejected draft's
replacement, or the token after drafts that all stand, is committed without having been through the model; it is the first row of
the next step.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ds4jax.drafter import Drafts
from ds4jax.sampling import Filters, draw, filtered, most_likely, uniform

Decision = tuple[jax.Array, jax.Array]


def accept(logits_WV: jax.Array, drafts: Drafts, depth: jax.Array, filters: Filters, position: jax.Array) -> Decision:
    """Decide how many drafts stand and what is committed after them.

    Args:
        logits_WV: float32 [W, V], the model's logits at the last committed token and at the W - 1 drafts.
        depth: int32, how many of the drafts are real.
        position: int32, of the first row.

    Returns:
        int32, the number of drafts that stand, and int32, the token that follows them.
    """
    return jax.lax.cond(filters.temperature > 0, _sampled, _greedy, logits_WV, drafts, depth, filters, position)


def _leading(stands_K: jax.Array, depth: jax.Array) -> jax.Array:
    """How many of the first `depth` entries are true before one is not."""
    real = jnp.arange(stands_K.shape[0], dtype=jnp.int32) < depth
    return jnp.sum(jnp.cumprod((stands_K & real).astype(jnp.int32)))


def _greedy(logits_WV: jax.Array, drafts: Drafts, depth: jax.Array, filters: Filters, position: jax.Array) -> Decision:
    tokens_W = most_likely(logits_WV)
    count = _leading(drafts.tokens == tokens_W[:-1], depth)
    return count, tokens_W[count]


def _sampled(logits_WV: jax.Array, drafts: Drafts, depth: jax.Array, filters: Filters, position: jax.Array) -> Decision:
    """A draft stands with probability min(1, p/q); its replacement comes from what p has above q."""
    most = drafts.tokens.shape[0]
    positions_W = position + jnp.arange(most + 1, dtype=jnp.int32)
    p_WV = jax.vmap(filtered, in_axes=(0, None))(logits_WV, filters)
    uniform_K = jax.vmap(uniform, in_axes=(None, 0))(filters, positions_W[:-1])
    chosen = (jnp.arange(most), drafts.tokens)
    count = _leading(uniform_K * drafts.q[chosen] < p_WV[:-1][chosen], depth)
    p_V = p_WV[count]
    replaced = count < depth
    above_V = jnp.maximum(p_V - drafts.q[jnp.minimum(count, most - 1)], 0.0) if most else p_V
    # Where rounding alone rejected, nothing lies above and the two are the same distribution.
    residual_V = jnp.where(replaced & (jnp.sum(above_V) > 0), above_V, p_V)
    return count, draw(residual_V, filters, positions_W[count], replaced)

"""The meaning of the indexer's kernels in plain jnp."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.attention.stored_rows import Stored, widen
from pallas_kernels.core import rotary, rounding

# Larger than every index.
LAST = (1 << 31) - 1


def scores(q_THI: jax.Array, weights_TH: jax.Array, keys: jax.Array) -> jax.Array:
    """Scores float32 [T, S]: Σ over heads of weight · relu(query · key) / √(Di · Hi).

    Args:
        q_THI: float32 [T, Hi, Di], rotated and rounded queries.
        weights_TH: float32 [T, Hi], weights of the heads.
        keys: float32 [S, Di] shared by the queries, or [T, S, Di] for each query.
    """
    spec = "thi,si->ths" if keys.ndim == 2 else "thi,tsi->ths"
    weights_TH = weights_TH * (q_THI.shape[2] ** -0.5 * q_THI.shape[1] ** -0.5)
    products = jnp.einsum(spec, q_THI, keys, preferred_element_type=jnp.float32)
    return jnp.einsum("ths,th->ts", jax.nn.relu(products), weights_TH, preferred_element_type=jnp.float32)


def decode_scores(
    q: jax.Array, weights: jax.Array, cos: jax.Array, sin: jax.Array, keys: Stored, sequence: jax.Array, *, qat: bool
) -> jax.Array:
    """Scores float32 [M, S] of queries before rotation; arguments as for `decode.index`."""
    x = rotary.rotate(q.reshape(*weights.shape, keys.shape[2]), cos, sin)
    return scores(rounding.hadamard_fp4(x, precision="highest") if qat else x, weights, widen(keys)[sequence])


def select(score: jax.Array, visible: jax.Array, *, topk: int) -> jax.Array:
    """`decode.select` of all S scores."""
    block = jnp.arange(score.shape[1], dtype=jnp.int32)
    best, index = jax.lax.top_k(jnp.where(block < visible[:, None], score, -jnp.inf), min(topk, score.shape[1]))
    ascending = jnp.sort(jnp.where(best > -jnp.inf, index, LAST), axis=1)
    ascending = jnp.pad(ascending, ((0, 0), (0, topk - ascending.shape[1])), constant_values=LAST)
    return jnp.where(ascending == LAST, -1, ascending)

"""Hyper-connections: N residual streams, mixed by a doubly stochastic matrix around every sub-layer.

Source: Manifold-constrained hyper-connections as in the V4 report and the reference code's `hc_split_sinkhorn`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ds4jax.config import Config
from ds4jax.model.layers import rms_scale


def mixes(h_TND: jax.Array, fn: jax.Array, eps: float) -> jax.Array:
    """Project the norm-scaled flattened streams: [T, N, D] with fn [rows, N·D] → [T, rows], float32."""
    flat = h_TND.reshape(h_TND.shape[0], -1)
    product = jax.lax.dot_general(flat, fn.astype(jnp.float32), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return product * rms_scale(flat, eps)


def sinkhorn(weights_TNN: jax.Array, iterations: int, eps: float) -> jax.Array:
    """Make rows and columns of positive matrices [T, N, N] sum to one, columns last.

    The first round normalises columns alone, for the rows come out of a softmax. Rolled, to keep 43 layers' programs small.
    """

    def columns(c: jax.Array) -> jax.Array:
        return c / (jnp.sum(c, axis=-2, keepdims=True) + eps)

    def one_round(_: int, c: jax.Array) -> jax.Array:
        return columns(c / (jnp.sum(c, axis=-1, keepdims=True) + eps))

    return jax.lax.fori_loop(0, iterations - 1, one_round, columns(weights_TNN))


def split(mixes_TM: jax.Array, scale: jax.Array, base: jax.Array, config: Config) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Turn projections [T, (2+N)·N] into pre [T, N], post [T, N] and comb [T, source stream, target stream]."""
    n, eps = config.hc_mult, config.hc_eps
    pre, post, comb = jnp.split(mixes_TM, [n, 2 * n], axis=-1)
    pre_b, post_b, comb_b = jnp.split(base, [n, 2 * n])
    pre_TN = jax.nn.sigmoid(pre * scale[0] + pre_b) + eps
    post_TN = 2.0 * jax.nn.sigmoid(post * scale[1] + post_b)
    logits_TNN = (comb * scale[2] + comb_b).reshape(-1, n, n)
    comb_TNN = sinkhorn(jax.nn.softmax(logits_TNN, axis=-1) + eps, config.hc_iters, eps)
    return pre_TN, post_TN, comb_TNN


def collapse(h_TND: jax.Array, pre_TN: jax.Array) -> jax.Array:
    """Weighted sum of the streams: the sub-layer's input [T, D]."""
    return jnp.sum(h_TND * pre_TN[..., None], axis=1)


def expand(y_TD: jax.Array, h_TND: jax.Array, post_TN: jax.Array, comb_TNN: jax.Array) -> jax.Array:
    """Write a sub-layer's output back: stream k gets post[k] · y + Σ_j comb[j, k] · h[j]; [T, N, D]."""
    mixed = jnp.sum(comb_TNN[..., None] * h_TND[:, :, None, :], axis=1)
    return post_TN[..., None] * y_TD[:, None, :] + mixed


def head(h_TND: jax.Array, fn: jax.Array, scale: jax.Array, base: jax.Array, config: Config) -> jax.Array:
    """Collapse the streams after the last layer: [T, D]. No Sinkhorn, no factor 2."""
    weights_TN = jax.nn.sigmoid(mixes(h_TND, fn, config.norm_eps) * scale + base) + config.hc_eps
    return collapse(h_TND, weights_TN)

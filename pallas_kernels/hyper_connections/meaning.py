"""Hyper-connections: N residual streams, mixed by a doubly stochastic matrix around every sub-layer.

Source: manifold-constrained hyper-connections as in the V4 report and the reference code's `hc_split_sinkhorn`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.core.norm import rms_scale


def mixes(h_TND: jax.Array, fn: jax.Array, norm_eps: float, precision: jax.lax.PrecisionLike = None) -> jax.Array:
    """Project the flattened streams, divided by their root mean square.

    Args:
        h_TND: float32 [T, N, D].
        fn: float [rows, N·D].
        norm_eps: added to the mean square.
        precision: of the product.

    Returns:
        float32 [T, rows].
    """
    flat, contract = h_TND.reshape(h_TND.shape[0], -1), (((1,), (1,)), ((), ()))
    product = jax.lax.dot_general(flat, fn.astype(jnp.float32), contract, precision=precision, preferred_element_type=jnp.float32)
    return product * rms_scale(flat, norm_eps)


def sinkhorn(weights_TNN: jax.Array, iterations: int, eps: float) -> jax.Array:
    """Normalise rows and columns of positive matrices [T, N, N] alternately, columns last.

    The first round normalises only columns, because the rows come from a softmax. A loop keeps the program of 43 layers small.
    """

    def columns(c: jax.Array) -> jax.Array:
        return c / (jnp.sum(c, axis=-2, keepdims=True) + eps)

    def one_round(_: int, c: jax.Array) -> jax.Array:
        return columns(c / (jnp.sum(c, axis=-1, keepdims=True) + eps))

    return jax.lax.fori_loop(0, iterations - 1, one_round, columns(weights_TNN))


def split(
    mixes_TM: jax.Array, scale: jax.Array, base: jax.Array, *, n: int, iterations: int, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Split projections into the weights of the streams before and after a sub-layer.

    Args:
        mixes_TM: float32 [T, (2+N)·N], the result of `mixes`; columns of pre, post and comb, in this order.
        scale: float32 [3], factors of the projections of pre, post and comb.
        base: float32 [(2+N)·N], added to the scaled projections.
        n: static, N, the number of streams.
        iterations: static, Sinkhorn rounds, at least 1.
        eps: added to pre, to comb before the Sinkhorn rounds, and to each sum that a round divides by.

    Returns:
        pre float32 [T, N], the weights of the sub-layer's input; post float32 [T, N], the weights of its output; comb float32
        [T, source stream, target stream], the weights between streams.

    Source: `hc_split_sinkhorn` of the reference code.
    """
    pre, post, comb = jnp.split(mixes_TM, [n, 2 * n], axis=-1)
    pre_b, post_b, comb_b = jnp.split(base, [n, 2 * n])
    pre_TN = jax.nn.sigmoid(pre * scale[0] + pre_b) + eps
    post_TN = 2.0 * jax.nn.sigmoid(post * scale[1] + post_b)
    logits_TNN = (comb * scale[2] + comb_b).reshape(-1, n, n)
    comb_TNN = sinkhorn(jax.nn.softmax(logits_TNN, axis=-1) + eps, iterations, eps)
    return pre_TN, post_TN, comb_TNN


def collapse(h_TND: jax.Array, pre_TN: jax.Array) -> jax.Array:
    """The sub-layer's input, float32 [T, D]: the sum of the streams [T, N, D] with weights [T, N]."""
    return jnp.sum(h_TND * pre_TN[..., None], axis=1)


def write_back(y_TD: jax.Array, h_TND: jax.Array, post_TN: jax.Array, comb_TNN: jax.Array) -> jax.Array:
    """Write a sub-layer's output y [T, D] back: stream k becomes post[k] · y + Σ_j comb[j, k] · h[j]; float32 [T, N, D]."""
    mixed = jnp.sum(comb_TNN[..., None] * h_TND[:, :, None, :], axis=1)
    return post_TN[..., None] * y_TD[:, None, :] + mixed


def head(h_TND: jax.Array, fn: jax.Array, scale: jax.Array, base: jax.Array, *, eps: float, norm_eps: float) -> jax.Array:
    """Weighted sum of the streams after the last layer, float32 [T, D]. Without Sinkhorn rounds and factor 2.

    Args:
        h_TND: float32 [T, N, D].
        fn: float [N, N·D], the projections.
        scale, base: float32 [1] and [N].
        eps: added to the weights.
        norm_eps: added to the mean square before the projection.
    """
    weights_TN = jax.nn.sigmoid(mixes(h_TND, fn, norm_eps) * scale + base) + eps
    return collapse(h_TND, weights_TN)

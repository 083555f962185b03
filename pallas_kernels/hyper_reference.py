"""What the kernels of hyper_connections.py mean, in jnp in float32; int8 blocks aside."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def _scale(x: jax.Array, eps: float) -> jax.Array:
    return jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def _mixes(h_MND: jax.Array, fn: jax.Array, norm_eps: float) -> jax.Array:
    flat = h_MND.reshape(h_MND.shape[0], -1)
    return jnp.dot(flat, fn.astype(jnp.float32).T, precision="highest") * _scale(flat, norm_eps)


def _collapse(h_MND: jax.Array, pre_MN: jax.Array, norm_weight: jax.Array, norm_eps: float) -> jax.Array:
    x_MD = jnp.sum(h_MND * pre_MN[..., None], axis=1)
    return x_MD * _scale(x_MD, norm_eps) * norm_weight.astype(jnp.float32)


def _sinkhorn(comb_MNN: jax.Array, iterations: int, eps: float) -> jax.Array:
    def columns(comb: jax.Array) -> jax.Array:
        return comb / (jnp.sum(comb, axis=1, keepdims=True) + eps)

    def one_round(_: int, comb: jax.Array) -> jax.Array:
        return columns(comb / (jnp.sum(comb, axis=2, keepdims=True) + eps))

    return jax.lax.fori_loop(0, iterations - 1, one_round, columns(comb_MNN))


def written(h: jax.Array, *, outputs: tuple[jax.Array, ...], post: jax.Array, comb: jax.Array) -> jax.Array:
    """Streams [M, N, D] with the sum of the outputs [M, D] written back: post[k] · y + Σ_j comb[j, k] · h[j]."""
    y_MD = sum(outputs[1:], start=outputs[0])
    return post[..., None] * y_MD[:, None, :] + jnp.sum(comb[..., None] * h[:, :, None, :], axis=1)


def enter(
    h: jax.Array, fn: jax.Array, scale: jax.Array, base: jax.Array, norm_weight: jax.Array, *,
    iterations: int, eps: float, norm_eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """post [M, N], comb [M, N, N] and x [M, D] of the kernels' `enter`, for streams with nothing to write back."""
    m, n = h.shape[:2]
    pre, post, comb = jnp.split(_mixes(h, fn, norm_eps), [n, 2 * n], axis=-1)
    pre = jax.nn.sigmoid(pre * scale[0] + base[:n]) + eps
    post = 2.0 * jax.nn.sigmoid(post * scale[1] + base[n : 2 * n])
    comb = jax.nn.softmax((comb * scale[2] + base[2 * n :]).reshape(m, n, n), axis=-1) + eps
    return post, _sinkhorn(comb, iterations, eps), _collapse(h, pre, norm_weight, norm_eps)


def leave(
    h: jax.Array, fn: jax.Array, scale: jax.Array, base: jax.Array, norm_weight: jax.Array, *, eps: float, norm_eps: float
) -> jax.Array:
    """x [M, D] of the kernels' `leave`, for streams with nothing to write back."""
    pre = jax.nn.sigmoid(_mixes(h, fn, norm_eps) * scale + base) + eps
    return _collapse(h, pre, norm_weight, norm_eps)

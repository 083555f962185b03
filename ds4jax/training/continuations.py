"""Windows that begin with a text and go on as the model writes: what a draft head meets when it drafts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.cache import state as caches
from ds4jax.cache.state import Rows
from ds4jax.model.transformer import Transformer

# Share of a window that is text before the model goes on: at least and at most.
SHORTEST, LONGEST = 1 / 8, 5 / 8


def text_windows(ids_T: np.ndarray, count: int, context: int, bos: int, rng: np.random.Generator) -> np.ndarray:
    """`count` windows int32 [count, context] at random places of a text int32 [T], each after a begin-of-sentence token."""
    starts = rng.integers(0, len(ids_T) - context + 2, count)
    windows = ids_T[starts[:, None] + np.arange(context - 1)]
    return np.concatenate([np.full((count, 1), bos, np.int32), windows], axis=1)


def lengths(count: int, context: int, rng: np.random.Generator) -> np.ndarray:
    """Random numbers of tokens of `count` windows that stay text, int32 [count]."""
    return rng.integers(round(SHORTEST * context), round(LONGEST * context) + 1, count).astype(np.int32)


def continued(model: Transformer, windows_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Windows int32 [B, T] whose tokens from `lengths` int32 [B] on are the model's own greedy choice."""
    size, context = windows_BT.shape
    one_B = jnp.ones(size, jnp.int32)

    def step(carry: tuple[caches.Cache, jax.Array], place: jax.Array) -> tuple[tuple[caches.Cache, jax.Array], jax.Array]:
        cache, ids_B = carry
        h_BND, cache = model.streams(ids_B, Rows.step(cache.length, 1, one_B), cache)
        own_B = jnp.argmax(model.logits(h_BND), axis=-1).astype(jnp.int32)
        ids_B = jnp.where(place < lengths_B, windows_BT[:, place], own_B)
        return (cache, ids_B), ids_B

    start = (caches.empty(model.config, context, sequences=size), windows_BT[:, 0])
    _, ids_TB = jax.lax.scan(step, start, jnp.arange(1, context, dtype=jnp.int32))
    return jnp.concatenate([windows_BT[:, :1], ids_TB.T], axis=1)

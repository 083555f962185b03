"""How finished compressed rows and indexer keys are kept: as float32, or in the narrow types that training rounded them to.

The only place that writes rows and reads them. A narrow row read back has the bits of the rounded float32 row, so that a model
says the same with either; the windows and the compressors' inputs, of which there are few, are float32 always.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ds4jax.config import Config
from pallas_kernels.narrow import NarrowKeys, NarrowRows, Stored, expanded, narrow_keys, narrow_rows
from pallas_kernels.rounding import FP4_BLOCK, FP8_BLOCK

__all__ = ["Stored", "empty_keys", "empty_rows", "expanded", "put", "taken"]


def empty_rows(config: Config, count: int) -> Stored:
    """Zero rows of one sequence, [1, count, Q], as `config.cache` says."""
    if config.cache != "narrow":
        return jnp.zeros((1, count, config.head_dim), jnp.float32)
    still = config.head_dim - config.rope_dim
    turning = jnp.zeros((1, count, config.rope_dim), jnp.float32)
    return NarrowRows(*_zeros(count, still, still // FP8_BLOCK), turning)


def empty_keys(config: Config, count: int) -> Stored:
    """Zero indexer keys of one sequence, [1, count, index_dim], as `config.cache` says."""
    if config.cache != "narrow":
        return jnp.zeros((1, count, config.index_dim), jnp.float32)
    return NarrowKeys(*_zeros(count, config.index_dim // 2, config.index_dim // FP4_BLOCK))


def _zeros(count: int, codes: int, scales: int) -> tuple[jax.Array, jax.Array]:
    """Codes and exponents of zeros: bytes of a row."""
    return jnp.zeros((1, count, codes), jnp.uint8), jnp.zeros((1, count, scales), jnp.int8)


def put(rows: Stored, sequence: jax.Array, block: jax.Array, entries: jax.Array) -> Stored:
    """Rows [B, S, w] with finished entries float32 [n, w] at [sequence, block]; those past the end are dropped."""
    made: Stored = entries
    if isinstance(rows, NarrowRows):
        made = narrow_rows(entries, rows.turning.shape[-1])
    elif isinstance(rows, NarrowKeys):
        made = narrow_keys(entries)
    put: Stored = jax.tree.map(lambda held, new: held.at[sequence, block].set(new, mode="drop"), rows, made)
    return put


def taken(rows: Stored, index: jax.Array) -> jax.Array:
    """Rows of [B, S, w] at indices into the flattened [B·S], float32 [*index.shape, w]."""
    return expanded(jax.tree.map(lambda held: held.reshape(-1, held.shape[-1])[index], rows))

"""Storage of finished compressed rows and indexer keys: float32, or the narrow types that training rounded them to.

All rows are read and written here. A narrow row has the bits of the rounded float32 row when it is read back, so both types give
the same results. Windows and the compressors' inputs are small and always float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ds4jax.config import Config
from pallas_kernels.attention.stored_rows import NarrowKeys, NarrowRows, Stored, narrow_keys, narrow_rows, widen
from pallas_kernels.core.rounding import FP4_BLOCK, FP8_BLOCK

__all__ = ["Stored", "empty_keys", "empty_rows", "put", "taken", "widen"]


def empty_rows(config: Config, sequences: int, count: int) -> Stored:
    """Zero rows [B, count, Q] of the type of `config.cache`."""
    if config.cache != "narrow":
        return jnp.zeros((sequences, count, config.head_dim), jnp.float32)
    plain = config.head_dim - config.rope_dim
    rotary = jnp.zeros((sequences, count, config.rope_dim), jnp.float32)
    return NarrowRows(*_zeros(sequences, count, plain, plain // FP8_BLOCK), rotary)


def empty_keys(config: Config, sequences: int, count: int) -> Stored:
    """Zero indexer keys [B, count, index_dim] of the type of `config.cache`."""
    if config.cache != "narrow":
        return jnp.zeros((sequences, count, config.index_dim), jnp.float32)
    return NarrowKeys(*_zeros(sequences, count, config.index_dim // 2, config.index_dim // FP4_BLOCK))


def _zeros(sequences: int, count: int, codes: int, scales: int) -> tuple[jax.Array, jax.Array]:
    """Codes and exponents of zero rows; `codes` and `scales` are bytes of a row."""
    return jnp.zeros((sequences, count, codes), jnp.uint8), jnp.zeros((sequences, count, scales), jnp.int8)


def put(rows: Stored, sequence: jax.Array, block: jax.Array, entries: jax.Array) -> Stored:
    """Rows [B, S, w] with entries float32 [n, w] written at [sequence, block]; entries past the end are dropped."""
    made: Stored = entries
    if isinstance(rows, NarrowRows):
        made = narrow_rows(entries, rows.turning.shape[-1])
    elif isinstance(rows, NarrowKeys):
        made = narrow_keys(entries)
    put: Stored = jax.tree.map(lambda held, new: held.at[sequence, block].set(new, mode="drop"), rows, made)
    return put


def taken(rows: Stored, sequence: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of [B, S, w] at each query's indices int32 [T, k] into its own sequence, int32 [T]: float32 [T, k, w]."""
    return widen(jax.tree.map(lambda held: held[sequence[:, None], index], rows))

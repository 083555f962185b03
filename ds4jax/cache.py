"""The position-addressed cache: rejecting drafted rows is setting a number.

Window rows and compressor inputs live in rings whose slot is the position modulo the ring; compressed rows lie at position
// ratio. What a query may see follows from positions and lengths, never from what happens to be stored, so stale rows need no
clearing: they are overwritten before they can become visible.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from ds4jax.config import Config
from ds4jax.row_store import Stored, empty_keys, empty_rows

OVERLAP_RATIO = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Where the T rows of one call stand.

    The live rows of a sequence are consecutive positions from `start` to `end` - 1, in order. A row that is not live (padding
    of a prompt's bucket, a clone in a narrow step) computes something and leaves no trace.

    Attributes:
        position: int32 [T], from 0 in each sequence.
        sequence: int32 [T], index of the row's sequence.
        live: bool [T].
        start: int32 [B], rows of each sequence already in the cache.
        end: int32 [B], rows in the cache after this call.
        strict: static; the call's products are float32 and free of Pallas kernels.
    """

    position: jax.Array
    sequence: jax.Array
    live: jax.Array
    start: jax.Array
    end: jax.Array
    strict: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def following(cls, start: jax.Array, width: int, count: jax.Array | int, *, strict: bool = False) -> Rows:
        """The next `count` rows of one sequence that holds `start` rows, in a call of `width` rows; the rest clones the last."""
        offset = jnp.minimum(jnp.arange(width, dtype=jnp.int32), jnp.maximum(count - 1, 0))
        live = jnp.arange(width, dtype=jnp.int32) < count
        start = jnp.asarray(start, jnp.int32).reshape(1)
        end = start + jnp.asarray(count, jnp.int32)
        return cls(start[0] + offset, jnp.zeros(width, jnp.int32), live, start, end, strict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompressorCache:
    """State of one compressor of row width w.

    Attributes:
        values, gates: float32 rings [B, ring, w or 2w] of the projections of the latest tokens, gates with their position bias.
        rows: [B, S, w], finished rows at index position // ratio, float32 or narrow; `row_store` reads and writes them.
    """

    values: jax.Array
    gates: jax.Array
    rows: Stored


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """State of one attention layer: window ring [B, ring, Q], and what its ratio adds."""

    window: jax.Array
    compressor: CompressorCache | None = None
    indexer: CompressorCache | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """State of a whole model.

    Attributes:
        layers: one entry a layer.
        length: int32 [B], rows of each sequence; the only number that speculation has to roll back.
    """

    layers: tuple[LayerCache, ...]
    length: jax.Array


def _compressor(rows: Stored, ratio: int, slack: int, ring: bool) -> CompressorCache:
    overlap = 2 if ratio == OVERLAP_RATIO else 1
    inputs = (1, (overlap * ratio + slack) if ring else 0, overlap * rows.shape[-1])
    return CompressorCache(jnp.zeros(inputs, jnp.float32), jnp.zeros(inputs, jnp.float32), rows)


def _layer(config: Config, ratio: int, capacity: int, slack: int, ring: bool) -> LayerCache:
    window = jnp.zeros((1, (config.window + slack) if ring else 0, config.head_dim), jnp.float32)
    if ratio == 0:
        return LayerCache(window)
    count = -(-capacity // ratio) + slack
    rows = _compressor(empty_rows(config, count), ratio, slack, ring)
    keys = _compressor(empty_keys(config, count), ratio, slack, ring) if ratio == OVERLAP_RATIO else None
    return LayerCache(window, rows, keys)


def empty(config: Config, capacity: int, *, slack: int = 1, ring: bool = True) -> Cache:
    """A cache for one sequence of at most `capacity` rows.

    Args:
        slack: the most rows of one decode step. Rings are this much longer than their windows, so that a rejected row never
            overwrites one that is still needed.
        ring: False leaves the rings out, for a call that starts at position 0 and is not continued.
    """
    layers = tuple(_layer(config, ratio, capacity, slack, ring) for ratio in config.layer_ratios)
    return Cache(layers, jnp.zeros(1, jnp.int32))


def empty_mtp(config: Config, capacity: int, *, slack: int = 1, ring: bool = True) -> LayerCache:
    """The MTP block's own layer; arguments as for `empty`."""
    return _layer(config, config.mtp_ratio, capacity, slack, ring)


def with_ring(ring_BRW: jax.Array, new_TW: jax.Array) -> jax.Array:
    """Ring rows and the call's own rows behind each other: [B·ring + T, W]."""
    return jnp.concatenate([ring_BRW.reshape(-1, ring_BRW.shape[-1]), new_TW])


def ring_positions(size: int, length_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Positions and sequences of the rings' rows [B·size] when each sequence has `length` rows; -1 marks an empty slot."""
    slot = jnp.arange(size, dtype=jnp.int32)
    last = length_B[:, None] - 1
    held_BR = jnp.maximum(last - (last - slot) % max(size, 1), -1)
    return held_BR.reshape(-1), jnp.repeat(jnp.arange(length_B.shape[0], dtype=jnp.int32), size)


def held_positions(size: int, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """Positions and sequences of `with_ring`'s rows [B·size + T]; position -1 marks a row that nobody may see."""
    position, sequence = ring_positions(size, rows.start)
    position = jnp.concatenate([position, jnp.where(rows.live, rows.position, -1)])
    return position, jnp.concatenate([sequence, rows.sequence])


def write_ring(ring_BRW: jax.Array, new_TW: jax.Array, rows: Rows) -> jax.Array:
    """Store the call's live rows, of a call longer than the ring only the last ones."""
    size = ring_BRW.shape[1]
    if size == 0:
        return ring_BRW
    kept = rows.live & (rows.position >= rows.end[rows.sequence] - size)
    slot = jnp.where(kept, rows.position % size, size)
    return ring_BRW.at[rows.sequence, slot].set(new_TW, mode="drop")

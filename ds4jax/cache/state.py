"""A cache addressed by position: setting its length rejects drafted rows.

Window rows and compressor inputs live in rings whose slot is the position modulo the ring; compressed rows lie at position
// ratio. Visibility follows from positions and lengths alone, so stale rows need no clearing: they are overwritten before they
can become visible.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp

from ds4jax.cache.stored_rows import Stored, empty_keys, empty_rows
from ds4jax.config import Config
from pallas_kernels.attention.meaning import ring_positions
from pallas_kernels.core.limits import MAX_ROWS

OVERLAP_RATIO = 4

# An array, or stored rows or keys.
Held = TypeVar("Held")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Positions and sequences of the T rows of one call.

    The live rows of a sequence are consecutive positions from `start` to `end` - 1, in order. A row that is not live (padding
    of a prompt's bucket, a clone in a decode step) is computed but not stored.

    Attributes:
        position: int32 [T], from 0 in each sequence.
        sequence: int32 [T], index of the row's sequence.
        live: bool [T].
        start: int32 [B], rows of each sequence already in the cache.
        end: int32 [B], rows of each sequence in the cache after this call.
        strict: static; the call's products are float32 and free of Pallas kernels.
        per_sequence: static; maximum rows of one sequence in the call.
        both_ways: static; each row sees all rows of its sequence in the call, and the window before the call. Otherwise a row
            sees the window that ends with it.
        sees: bool [T, ring + T], which rows of the ring and of the call each row sees, in place of what its position says; for
            calls with rows of one sequence whose caches are not kept. None in all other calls.
        decoding: static; a decode or verify step, or a call of as few rows as a single sequence has there. Otherwise the call is
            a chunk of a prompt, whose products have another arithmetic. It never depends on the number of sequences.
    """

    position: jax.Array
    sequence: jax.Array
    live: jax.Array
    start: jax.Array
    end: jax.Array
    strict: bool = dataclasses.field(metadata={"static": True})
    per_sequence: int = dataclasses.field(metadata={"static": True})
    both_ways: bool = dataclasses.field(default=False, metadata={"static": True})
    sees: jax.Array | None = None
    decoding: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def single(self) -> bool:
        """Whether all rows belong to one sequence; static."""
        return self.per_sequence == self.position.shape[0]

    @property
    def readers(self) -> jax.Array:
        """Sequences of the state that the rows read, int32 [N]: one for all rows, N = 1, or each row's own, N = T."""
        return self.sequence[:1] if self.single else self.sequence

    @property
    def horizon(self) -> jax.Array:
        """The last position that each row sees, int32 [T]."""
        return self.end[self.sequence] - 1 if self.both_ways else self.position

    def reach(self, window: int) -> int:
        """Number of positions up to its horizon that a row sees of a window of this size; static."""
        return window + self.per_sequence if self.both_ways else window

    @classmethod
    def following(
        cls, start: jax.Array, width: int, count: jax.Array | int, *, slot: jax.Array | int = 0, strict: bool = False
    ) -> Rows:
        """A call with the next `count` rows of one sequence, padded to `width` rows with clones of the last.

        Args:
            start: int32 [B], rows of each sequence in the cache; [] for one sequence.
            width: T, static.
            count: int32 [], live rows, 0 to `width`.
            slot: int32 [], index of the sequence, 0 to B - 1.
            strict: static; as the attribute.

        Returns:
            Rows with `single` True, `start` and `end` [B].
        """
        offset = jnp.minimum(jnp.arange(width, dtype=jnp.int32), jnp.maximum(count - 1, 0))
        live = jnp.arange(width, dtype=jnp.int32) < count
        start_B, slot = jnp.asarray(start, jnp.int32).reshape(-1), jnp.asarray(slot, jnp.int32)
        end_B = start_B.at[slot].add(jnp.asarray(count, jnp.int32))
        flat = (start_B[slot] + offset, jnp.broadcast_to(slot, (width,)), live)
        return cls(*flat, start_B, end_B, strict, width, decoding=width <= MAX_ROWS)

    @classmethod
    def step(cls, start_B: jax.Array, width: int, count_B: jax.Array, *, strict: bool = False) -> Rows:
        """A call with the next `count` rows of each sequence, `width` rows for each sequence in order: T = B·width.

        A sequence's rows beyond its `count` clone its last one. A sequence with `count` 0 clones the first row of the first
        sequence that has any, so that its rows choose no experts of their own.

        Args:
            start_B: int32 [B], rows of each sequence in the cache.
            count_B: int32 [B], 0 to `width`.
        """
        size = start_B.shape[0]
        if size == 1:
            return dataclasses.replace(cls.following(start_B, width, count_B[0], strict=strict), decoding=True)
        place = jnp.arange(width, dtype=jnp.int32)
        some_B = count_B > 0
        sequence_B = jnp.where(some_B, jnp.arange(size, dtype=jnp.int32), jnp.argmax(some_B).astype(jnp.int32))
        offset_BW = jnp.minimum(place, jnp.maximum(count_B - 1, 0)[:, None])
        position_BW = start_B[sequence_B][:, None] + offset_BW
        live_BW = place < count_B[:, None]
        sequence_BW = jnp.broadcast_to(sequence_B[:, None], (size, width))
        flat = (position_BW.reshape(-1), sequence_BW.reshape(-1), live_BW.reshape(-1))
        return cls(*flat, start_B, start_B + count_B, strict, width, decoding=True)

    def some(self, position_n: jax.Array) -> Rows:
        """The rows at `position_n` int32 [n] of a call whose rows are all of one sequence, as queries: all are live."""
        if len(position_n) == len(self.position):
            return self
        count = len(position_n)
        sequence = jnp.broadcast_to(self.sequence[:1], (count,))
        live = jnp.ones(count, bool)
        return dataclasses.replace(self, position=position_n, sequence=sequence, live=live, per_sequence=count)

    @property
    def last(self) -> jax.Array:
        """Index of each sequence's last live row in the call, int32 [B]; 0 for a sequence without one."""
        if self.single:
            return jnp.broadcast_to(jnp.maximum(jnp.sum(self.end - self.start) - 1, 0), self.start.shape)
        mine_BT = self.live & (self.sequence == jnp.arange(self.start.shape[0], dtype=jnp.int32)[:, None])
        return jnp.max(jnp.where(mine_BT, jnp.arange(mine_BT.shape[1], dtype=jnp.int32), 0), axis=1)

    def spread(self, entries_BW: jax.Array) -> jax.Array:
        """Entries [B, W, ..] of the sequences' next positions → entries [T, ..] of the rows; clones get their original's."""
        if entries_BW.shape[0] == 1:
            return entries_BW[0][self.position - self.start[0]]
        return entries_BW[self.sequence, self.position - self.start[self.sequence]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompressorCache:
    """State of one compressor of row width w.

    Attributes:
        values, gates: float32 rings [B, ring, w or 2w] of the projections of the latest tokens, gates with their position bias.
        rows: [B, S, w], finished rows at index position // ratio, float32 or narrow; `stored_rows` reads and writes them.
    """

    values: jax.Array
    gates: jax.Array
    rows: Stored


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """State of one attention layer: its window's ring [B, ring, Q], and the caches of its ratio."""

    window: jax.Array
    compressor: CompressorCache | None = None
    indexer: CompressorCache | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """State of all layers of a model.

    Attributes:
        layers: one entry a layer.
        length: int32 [B], rows of each sequence. Rejecting drafts sets it back and changes nothing else.
    """

    layers: tuple[LayerCache, ...]
    length: jax.Array


def _compressor(rows: Stored, ratio: int, slack: int, ring: bool) -> CompressorCache:
    overlap = 2 if ratio == OVERLAP_RATIO else 1
    inputs = (rows.shape[0], (overlap * ratio + slack) if ring else 0, overlap * rows.shape[-1])
    return CompressorCache(jnp.zeros(inputs, jnp.float32), jnp.zeros(inputs, jnp.float32), rows)


def _layer(config: Config, ratio: int, capacity: int, sequences: int, slack: int, ring: bool) -> LayerCache:
    window = jnp.zeros((sequences, (config.window + slack) if ring else 0, config.head_dim), jnp.float32)
    if ratio == 0:
        return LayerCache(window)
    count = -(-capacity // ratio) + slack
    rows = _compressor(empty_rows(config, sequences, count), ratio, slack, ring)
    keys = _compressor(empty_keys(config, sequences, count), ratio, slack, ring) if ratio == OVERLAP_RATIO else None
    return LayerCache(window, rows, keys)


def empty(config: Config, capacity: int, *, sequences: int = 1, slack: int = 1, ring: bool = True) -> Cache:
    """An empty cache for sequences of at most `capacity` rows each.

    Args:
        sequences: B, the number of sequences.
        slack: maximum rows of one sequence in a decode step. Rings are this much longer than their windows, so that a rejected
            row never overwrites one that is still needed.
        ring: False makes rings of no rows, for a single call from position 0.
    """
    layers = tuple(_layer(config, ratio, capacity, sequences, slack, ring) for ratio in config.layer_ratios)
    return Cache(layers, jnp.zeros(sequences, jnp.int32))


def empty_mtp(config: Config, capacity: int, *, sequences: int = 1, slack: int = 1, ring: bool = True) -> LayerCache:
    """An empty cache of the MTP block; arguments as for `empty`."""
    return _layer(config, config.mtp_ratio, capacity, sequences, slack, ring)


def empty_rings(config: Config, count: int, *, sequences: int = 1, slack: int = 1) -> tuple[LayerCache, ...]:
    """Empty caches of `count` layers that see the window alone; other arguments as for `empty`."""
    return tuple(_layer(config, 0, 0, sequences, slack, True) for _ in range(count))


def with_ring(ring_BRW: jax.Array, new_TW: jax.Array) -> jax.Array:
    """Ring rows, then the call's own rows: [B·ring + T, W]."""
    return jnp.concatenate([ring_BRW.reshape(-1, ring_BRW.shape[-1]), new_TW])


def own(held: Held, rows: Rows) -> Held:
    """State [B, S, W] of the rows' sequences: [S, W] if all rows are of one sequence, else [T, S, W]."""

    def take(x: jax.Array) -> jax.Array:
        if not rows.single:
            return x[rows.sequence]
        # No dynamic slice for a cache of one sequence.
        return x[0] if x.shape[0] == 1 else jax.lax.dynamic_index_in_dim(x, rows.sequence[0], keepdims=False)

    taken: Held = jax.tree.map(take, held)
    return taken


def ring_and_rows(ring_BRW: jax.Array, new_TW: jax.Array, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """Rows that a query may see in a call that is longer than its ring: the ring before the call, then the call's rows.

    Returns:
        rows as from `own`, [ring + T, W] or [T, ring + T, W] with zeros for other sequences, and their positions int32
        [N, ring + T] for the N of `Rows.readers`; -1 marks a row that the query may not see.
    """
    past, new = own(ring_BRW, rows), new_TW
    mine = rows.live[None, :]
    if not rows.single:
        same = rows.sequence[:, None] == rows.sequence[None, :]
        new, mine = jnp.where(same[..., None], new_TW, 0), mine & same
    position = ring_positions(ring_BRW.shape[1], rows.start[rows.readers])
    return jnp.concatenate([past, new], axis=-2), jnp.concatenate([position, jnp.where(mine, rows.position, -1)], axis=-1)


def write_ring(ring_BRW: jax.Array, new_TW: jax.Array, rows: Rows) -> jax.Array:
    """The ring with the call's live rows; a call longer than the ring stores only its last rows."""
    size = ring_BRW.shape[1]
    if size == 0:
        return ring_BRW
    kept = rows.live & (rows.position >= rows.end[rows.sequence] - size)
    slot = jnp.where(kept, rows.position % size, size)
    return ring_BRW.at[rows.sequence, slot].set(new_TW, mode="drop")

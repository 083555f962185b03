"""The plan of a grouped product: pairs of a row and a chosen expert, sorted by expert and padded to full tiles.

The plan uses integer counts, one sort and table lookups, so equal choices give equal plans on any device.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

# Rows of a unit in which Hopper's copies address shared memory.
ALIGNMENT = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Slots in tiles. All slots of a tile belong to one expert, and the tiles of an expert are consecutive.

    Pair t·K + k is row t with its k-th choice, so results stored by pair are in the order of the rows.

    Attributes:
        pair: int32 [tiles · rows], the pair of each slot, −1 for an empty slot.
        expert: int32 [tiles], the expert of each tile, −1 for an unused tile.
        first_tile: int32 [E + 1], the first tile of each expert, then the number of used tiles.
    """

    pair: jax.Array
    expert: jax.Array
    first_tile: jax.Array

    @property
    def rows(self) -> int:
        """Slots of a tile."""
        return self.pair.shape[0] // self.expert.shape[0]


def max_tiles(pairs: int, experts: int, rows: int) -> int:
    """Maximum number of tiles of `rows` slots that `pairs` can need, for any distribution over `experts`."""
    return min(pairs, (pairs + experts * (rows - 1)) // rows)


def plan(chosen: jax.Array, experts: int, rows: int) -> Plan:
    """Group pairs of rows and experts into tiles.

    A row that chooses an expert twice has two pairs with it. Pairs of one expert stay in order.

    Args:
        chosen: int32 [T, K], expert numbers from 0 to E − 1.
        experts: static, E.
        rows: static, slots of a tile.

    Raises:
        ValueError: an expert's and a pair's number together need more than 31 bits.
    """
    pairs = chosen.size
    in_order, first = _sorted(chosen, experts)
    count = first[1:] - first[:-1]
    first_tile = _first_tile(count, rows)
    owner, used = _owners(first_tile, max_tiles(pairs, experts, rows))
    tile = jnp.arange(owner.shape[0], dtype=jnp.int32)
    rank = ((tile - first_tile[owner]) * rows)[:, None] + jnp.arange(rows, dtype=jnp.int32)
    real = used[:, None] & (rank < count[owner][:, None])
    place = jnp.minimum(first[owner][:, None] + rank, pairs - 1)
    return Plan(jnp.where(real, in_order[place], -1).reshape(-1), jnp.where(used, owner, -1), first_tile)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spans:
    """Tiles as spans of one list of pairs sorted by expert. The tiles of an expert have about as many pairs each.

    `placing` makes them by kernels.

    Every tile begins at a multiple of `ALIGNMENT`, so that an expert's pairs may be followed by some empty places.

    Attributes:
        pair: int32 [places], the pair of each place; 0 for an empty one. `rows` places can be read from any tile's first.
        table: int32 [3, tiles], expert, first place and number of pairs of each tile, the fullest first. Tiles without pairs are
            unused.
    """

    pair: jax.Array
    table: jax.Array

    @property
    def expert(self) -> jax.Array:
        """The expert of each tile, int32 [tiles]."""
        return self.table[0]

    @property
    def first(self) -> jax.Array:
        """The first place of each tile, int32 [tiles]."""
        return self.table[1]

    @property
    def count(self) -> jax.Array:
        """The number of pairs of each tile, int32 [tiles]."""
        return self.table[2]


def spans(chosen: jax.Array, experts: int, rows: int) -> Spans:
    """Group pairs of rows and experts into tiles of at most `rows` pairs, a multiple of `ALIGNMENT`.

    Arguments and errors as for `plan`.
    """
    in_order, start = _sorted(chosen, experts)
    count = start[1:] - start[:-1]
    first_tile = _first_tile(count, rows)
    owner, used = _owners(first_tile, max_tiles(chosen.size, experts, rows))
    tiles = jnp.maximum(first_tile[1:] - first_tile[:-1], 1)
    each = aligned(-(-count // tiles))
    done = (jnp.arange(owner.shape[0], dtype=jnp.int32) - first_tile[owner]) * each[owner]
    left = jnp.where(used, jnp.minimum(count[owner] - done, each[owner]), 0)

    first = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(aligned(count), dtype=jnp.int32)])
    place = jnp.arange(places(chosen.size, experts, rows), dtype=jnp.int32)
    whose, there = _owners(first, place.shape[0])
    rank = place - first[whose]
    pair = jnp.where(there & (rank < count[whose]), in_order[jnp.minimum(start[whose] + rank, chosen.size - 1)], 0)
    # A processor takes tiles in turn, and gets about as much work as another if full tiles come first.
    by_size = jnp.argsort(-left)
    return Spans(pair, jnp.stack([owner, jnp.where(used, first[owner] + done, 0), left])[:, by_size])


def places(pairs: int, experts: int, rows: int) -> int:
    """Places of `Spans`: the pairs, the empty places after those of each expert, and a tile's rows after all.

    A multiple of `ALIGNMENT`, since copies address whole units of rows.
    """
    return -(-(pairs + min(pairs, experts) * (ALIGNMENT - 1) + rows) // ALIGNMENT) * ALIGNMENT


def aligned(count: jax.Array) -> jax.Array:
    """Counts rounded up to multiples of `ALIGNMENT`."""
    return (count + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def _sorted(chosen: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
    """The pairs sorted by expert, int32 [pairs], and the place of each expert's first, int32 [E + 1]."""
    pairs = chosen.size
    bits = (pairs - 1).bit_length()
    if experts << bits > 1 << 31:
        raise ValueError(f"chosen is {list(chosen.shape)} among {experts} experts; their pairs cannot be numbered in 31 bits")
    pair = jnp.arange(pairs, dtype=jnp.int32)
    # Expert and pair are packed into one number, so one sort of distinct numbers groups them. A stable sort
    # would carry indices along.
    in_order = jax.lax.sort((chosen.reshape(-1) << bits) | pair, is_stable=False) & ((1 << bits) - 1)
    every = jnp.arange(experts + 1, dtype=jnp.int32)
    # The compiler fuses the comparison with the sum, so no array of this size is stored.
    return in_order, jnp.sum(chosen.reshape(1, -1) < every[:, None], axis=1, dtype=jnp.int32)


def _first_tile(count: jax.Array, rows: int) -> jax.Array:
    """The first tile of each expert, then the number of used tiles, int32 [E + 1]."""
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum((count + rows - 1) // rows, dtype=jnp.int32)])


def _owners(first_tile: jax.Array, tiles: int) -> tuple[jax.Array, jax.Array]:
    """The expert of each tile, int32 [tiles], and whether the tile is used; an unused tile has the last expert."""
    tile = jnp.arange(tiles, dtype=jnp.int32)
    owner = jnp.sum(first_tile[None, 1:] <= tile[:, None], axis=1, dtype=jnp.int32)
    experts = first_tile.shape[0] - 1
    return jnp.minimum(owner, experts - 1), owner < experts

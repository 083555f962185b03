"""The plan of a grouped product: pairs of a row and a chosen expert, sorted by expert and padded to full tiles.

The plan uses integer counts, one sort and table lookups, so equal choices give equal plans on any device.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


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
    bits = (pairs - 1).bit_length()
    if experts << bits > 1 << 31:
        raise ValueError(f"chosen is {list(chosen.shape)} among {experts} experts; their pairs cannot be numbered in 31 bits")
    pair = jnp.arange(pairs, dtype=jnp.int32)
    # Expert and pair are packed into one number, so one sort of distinct numbers groups them.
    in_order = jnp.sort((chosen.reshape(-1) << bits) | pair) & ((1 << bits) - 1)
    every = jnp.arange(experts + 1, dtype=jnp.int32)
    # The compiler fuses the comparison with the sum, so no array of this size is stored.
    first = jnp.sum(chosen.reshape(1, -1) < every[:, None], axis=1, dtype=jnp.int32)
    count = first[1:] - first[:-1]
    first_tile = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum((count + rows - 1) // rows, dtype=jnp.int32)])

    tile = jnp.arange(max_tiles(pairs, experts, rows), dtype=jnp.int32)
    owner = jnp.sum(first_tile[None, 1:] <= tile[:, None], axis=1, dtype=jnp.int32)
    used = owner < experts
    owner = jnp.minimum(owner, experts - 1)
    rank = ((tile - first_tile[owner]) * rows)[:, None] + jnp.arange(rows, dtype=jnp.int32)
    real = used[:, None] & (rank < count[owner][:, None])
    place = jnp.minimum(first[owner][:, None] + rank, pairs - 1)
    return Plan(jnp.where(real, in_order[place], -1).reshape(-1), jnp.where(used, owner, -1), first_tile)

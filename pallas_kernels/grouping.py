"""Pairs of a row and an expert that it chose, sorted by expert and cut into whole tiles: what a grouped product works through.

Everything is counted, sorted or looked up, nothing is added up in an order that a device may choose: same choices, same plan.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Slots in tiles of so many rows; a tile's slots all belong to one expert, and the tiles of an expert follow each other.

    Pair t·K + k is row t with its k-th choice, so that a result stored by pair needs no way back.

    Attributes:
        pair: int32 [tiles · rows], each slot's pair, −1 where it has none.
        expert: int32 [tiles], −1 past the last tile that is used.
        first_tile: int32 [E + 1], where the tiles of each expert begin, and where those of the last one end.
    """

    pair: jax.Array
    expert: jax.Array
    first_tile: jax.Array

    @property
    def rows(self) -> int:
        """Slots of a tile."""
        return self.pair.shape[0] // self.expert.shape[0]


def most_tiles(pairs: int, experts: int, rows: int) -> int:
    """The most tiles that so many pairs can take up, however they are spread over so many experts."""
    return min(pairs, (pairs + experts * (rows - 1)) // rows)


def plan(chosen: jax.Array, experts: int, rows: int) -> Plan:
    """Group the pairs of int32 [T, K] choices among `experts` into tiles of `rows` slots.

    An expert chosen twice by a row has two pairs. Within an expert, pairs stay in order.

    Raises:
        ValueError: more pairs and experts than 31 bits can number together.
    """
    pairs = chosen.size
    bits = (pairs - 1).bit_length()
    if experts << bits > 1 << 31:
        raise ValueError(f"chosen is {list(chosen.shape)} among {experts} experts; their pairs cannot be numbered in 31 bits")
    pair = jnp.arange(pairs, dtype=jnp.int32)
    # One number holds expert and pair, so that a single sort of distinct numbers groups them.
    in_order = jnp.sort((chosen.reshape(-1) << bits) | pair) & ((1 << bits) - 1)
    every = jnp.arange(experts + 1, dtype=jnp.int32)
    # A comparison that the compiler folds into its sum; nothing of this size is stored.
    first = jnp.sum(chosen.reshape(1, -1) < every[:, None], axis=1, dtype=jnp.int32)
    count = first[1:] - first[:-1]
    first_tile = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum((count + rows - 1) // rows, dtype=jnp.int32)])

    tile = jnp.arange(most_tiles(pairs, experts, rows), dtype=jnp.int32)
    owner = jnp.sum(first_tile[None, 1:] <= tile[:, None], axis=1, dtype=jnp.int32)
    used = owner < experts
    owner = jnp.minimum(owner, experts - 1)
    rank = ((tile - first_tile[owner]) * rows)[:, None] + jnp.arange(rows, dtype=jnp.int32)
    real = used[:, None] & (rank < count[owner][:, None])
    place = jnp.minimum(first[owner][:, None] + rank, pairs - 1)
    return Plan(jnp.where(real, in_order[place], -1).reshape(-1), jnp.where(used, owner, -1), first_tile)

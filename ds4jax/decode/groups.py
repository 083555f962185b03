"""Slots on groups of devices: each group has its part of every array over slots, and nothing crosses groups in a step.

A mesh of groups has two axes. Weights are cut over the devices of a group and equal in all groups; see `loading.placement`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

# The name of the mesh's axis of groups.
GROUPS = "groups"
# How an array is placed: whole on each device, or the slots of its first axis in equal parts, one for each group.
WHOLE, SLOTS = PartitionSpec(), PartitionSpec(GROUPS)

AnyMesh = Mesh | AbstractMesh | None
Arrays = TypeVar("Arrays")


def count(mesh: AnyMesh) -> int:
    """Number of groups; 1 for a mesh without that axis, and on one device."""
    return int(mesh.shape.get(GROUPS, 1)) if mesh else 1


def placed_shapes(shapes: Arrays, mesh: AnyMesh) -> Arrays:
    """Shapes of arrays over slots, with their place on groups; as they are without groups."""
    if mesh is None or count(mesh) == 1:
        return shapes

    def placed(shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # XLA does not cut arrays without elements, as those of drafts that there are none of.
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, SLOTS if shape.size else WHOLE))

    made: Arrays = jax.tree.map(placed, shapes)
    return made


def over_groups(program: Callable[..., Any], mesh: AnyMesh, ins: Any, outs: Any) -> Callable[..., Any]:
    """A program that each device runs with its part of the arguments; `program` itself without groups.

    Args:
        ins, outs: WHOLE or SLOTS for each argument and result, or trees of them.
    """
    if count(mesh) == 1:
        return program
    made: Callable[..., Any] = jax.shard_map(program, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)
    return made


def local(slot: jax.Array, size: int, mesh: AnyMesh) -> jax.Array:
    """Index of a slot, int32 [], among this group's `size` slots; `size`, past the last, in the other groups."""
    if count(mesh) == 1:
        return slot
    index = slot - jax.lax.axis_index(GROUPS) * size
    return jnp.where((index >= 0) & (index < size), index, size).astype(jnp.int32)


def from_owner(arrays: Arrays, slot: jax.Array, size: int, mesh: AnyMesh) -> Arrays:
    """Arrays of the group that has the slot, in all groups. They are moved, never added."""
    if count(mesh) == 1:
        return arrays
    moved: Arrays = jax.tree.map(lambda array: jax.lax.all_gather(array, GROUPS)[slot // size], arrays)
    return moved


def repeated(arrays: Arrays, mesh: AnyMesh) -> Arrays:
    """Arrays over the slots of a group in the shape of those of all groups: the group's own first, then copies of them."""
    whole: Arrays = jax.tree.map(functools.partial(_repeated, times=count(mesh)), arrays)
    return whole


def _repeated(array_S: jax.Array, times: int) -> jax.Array:
    return jnp.concatenate([array_S] * times)

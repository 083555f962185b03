"""Loads and choices of programs that are one warp, in which a lane owns the same part of every array."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

from pallas_kernels.arithmetic import LANES

Found = TypeVar("Found")


def value(i: int) -> jax.Array:
    """A Python integer as a traced value: a slice that starts at a constant may not reach past the end, even when masked."""
    return jax.lax.full((), i, jnp.int32)


def numbers() -> jax.Array:
    """Each lane's own number, int32 [32]."""
    return jax.lax.broadcasted_iota(jnp.int32, (LANES,), 0)


def all_of(*conditions: jax.Array | None) -> jax.Array | None:
    """Whether every condition holds, over the lanes; None stands for one that always does."""
    there = [jnp.broadcast_to(condition, (LANES,)) for condition in conditions if condition is not None]
    return functools.reduce(jnp.logical_and, there) if there else None


def load(ref: Any, *index: Any, real: jax.Array | None, width: int = 1, **how: Any) -> jax.Array:
    """Load one value a lane, or `width` values a lane where the last index is a slice of so many; 0 where not `real`."""
    # Interpret mode takes no Python integers beside dynamic slices.
    index = tuple(value(i) if isinstance(i, int) else i for i in index)
    if real is None:
        return plt.load(ref.at[index], **how)
    mask = jnp.broadcast_to(real[:, None], (LANES, width)) if width > 1 else real
    return plt.load(ref.at[index], mask=mask, other=0, **how)


def of_mine(matrices: Sequence[Any], load_from: Callable[[Any], Found]) -> Found:
    """What `load_from` finds in the matrix whose `mine` is true.

    The compiler makes of the branches one load from a chosen address.
    """
    if len(matrices) == 1:
        return load_from(matrices[0])
    rest = functools.partial(of_mine, matrices[1:], load_from)
    found: Found = jax.lax.cond(matrices[0].mine, functools.partial(load_from, matrices[0]), rest)
    return found

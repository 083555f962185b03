"""Loads and masks of one-warp programs. A lane owns the same part of every array."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

from pallas_kernels.core.arithmetic import LANES

Loaded = TypeVar("Loaded")


def value(i: int) -> jax.Array:
    """A Python integer as a traced value. A slice with a constant start must not reach past the end, even if masked."""
    return jax.lax.full((), i, jnp.int32)


def numbers() -> jax.Array:
    """Each lane's own number, int32 [32]."""
    return jax.lax.broadcasted_iota(jnp.int32, (LANES,), 0)


def all_of(*conditions: jax.Array | None) -> jax.Array | None:
    """Whether every condition holds, bool [32]; None stands for a condition that is always true."""
    present = [jnp.broadcast_to(condition, (LANES,)) for condition in conditions if condition is not None]
    return functools.reduce(jnp.logical_and, present) if present else None


def load(ref: Any, *index: Any, real: jax.Array | None, width: int = 1, once: bool = False) -> jax.Array:
    """Load one value per lane, or `width` values if the last index is a slice of `width`. Lanes that are not `real` get 0.

    Args:
        once: no program loads the value again, so the caches can evict it first.
    """
    policy = "evict_first" if once else None
    # Interpret mode does not accept Python integers together with dynamic slices.
    index = tuple(value(i) if isinstance(i, int) else i for i in index)
    if real is None:
        return plt.load(ref.at[index], eviction_policy=policy)
    mask = jnp.broadcast_to(real[:, None], (LANES, width)) if width > 1 else real
    return plt.load(ref.at[index], mask=mask, other=0, eviction_policy=policy)


def load_selected(matrices: Sequence[Any], load_from: Callable[[Any], Loaded]) -> Loaded:
    """Load from the selected matrix. Triton turns the branches into one load.

    Args:
        matrices: objects with a `selected` flag; exactly one is true.
        load_from: loads from one of them.
    """
    if len(matrices) == 1:
        return load_from(matrices[0])
    rest = functools.partial(load_selected, matrices[1:], load_from)
    loaded: Loaded = jax.lax.cond(matrices[0].selected, functools.partial(load_from, matrices[0]), rest)
    return loaded

"""The shape of an engine: what its programs are compiled for, and the state that it allocates."""

from __future__ import annotations

import dataclasses
import functools

import jax

from ds4jax import bounds
from ds4jax.cache.capacity import BUCKETS, PREFILL, capacity_for
from ds4jax.decode import loop
from ds4jax.decode.drafter import Drafter
from ds4jax.decode.loop import DecodeState
from ds4jax.engine import beginning
from ds4jax.engine.loaded import Loaded
from ds4jax.engine.options import Options, require_drafter
from ds4jax.engine.prefill import nbytes
from ds4jax.errors import InputError

CONTEXT = 8192
SLOTS = 8

# Rows of a prefill call, by platform. A prompt's rows have the bits of this width, so it must not depend on anything else.
GRID = {"cpu": PREFILL[1]}


def default_chunk(platform: str) -> int:
    """Rows of each prefill call on a platform."""
    return GRID.get(platform, PREFILL[-1])


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the programs of the slots are compiled for, besides the model.

    Attributes:
        slots: S.
        capacity: rows of each slot's cache.
        chunk: rows of each prefill call, padding included.
        strict: float32 products without Pallas kernels.
        drafter: None at max_draft 0.
    """

    slots: int
    capacity: int
    chunk: int
    strict: bool
    drafter: Drafter | None

    @classmethod
    def of(
        cls,
        model: Loaded,
        *,
        slots: int = SLOTS,
        context: int | None = None,
        strict: bool = False,
        chunk: int | None = None,
        drafter: Drafter | None = None,
    ) -> tuple[Shape, int]:
        """The shape of an engine, and its context, from the options of `ds4jax.Engine`.

        Raises:
            InputError: an option is outside its range, or the model has no drafter.
        """
        options = Options(strict=strict, drafter=drafter, chunk=chunk)
        require_drafter(model, options)
        most = model.config.max_context
        context = min(CONTEXT, most) if context is None else bounds.CONTEXT.checked("context", context)
        if context > most:
            raise InputError(f"context is {context}; the model's context is {most}")
        rows = options.chunk or min(default_chunk(jax.devices()[0].platform), most)
        if rows < BUCKETS[0]:
            raise InputError(f"chunk is {rows}; an engine's chunk is at least {BUCKETS[0]}")
        count = bounds.SLOTS.checked("slots", slots)
        return cls(count, capacity_for(context, most), rows, options.strict, model.drafter(drafter)), context


def fresh(model: Loaded, shape: Shape) -> DecodeState:
    """The state of free slots."""
    last_S = [0] * shape.slots
    state = beginning.state(model.config, shape.capacity, last_S, drafter=shape.drafter, max_draft=model.max_draft)
    return model.placed(state)


def shapes(model: Loaded, shape: Shape) -> DecodeState:
    """Shapes and types of the state of the slots, without allocating it."""
    last_S = [0] * shape.slots
    empty = functools.partial(loop.start, model.config, shape.capacity, last_S, drafter=shape.drafter, max_draft=model.max_draft)
    found: DecodeState = jax.eval_shape(empty)
    return found


def state_bytes(model: Loaded, shape: Shape) -> int:
    """Bytes of the state of the slots."""
    return nbytes(shapes(model, shape))

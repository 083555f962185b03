"""The shape of an engine: what its programs are compiled for, and the state that it allocates."""

from __future__ import annotations

import dataclasses
import functools

import jax

from ds4jax import bounds
from ds4jax.cache.capacity import PREFILL, capacity_for, needed, widths
from ds4jax.decode import groups, loop
from ds4jax.decode.drafter import Drafter
from ds4jax.decode.loop import DecodeState
from ds4jax.engine import beginning
from ds4jax.engine.loaded import Loaded
from ds4jax.engine.options import Options, require_drafter
from ds4jax.engine.prefill import buckets_here, chunk_here, nbytes
from ds4jax.errors import InputError

CONTEXT = 8192
SLOTS = 8

# Rows of a prefill call on a CPU, where a narrower one would save little and is one more program.
CPU_CHUNK = PREFILL[1]
# A state of the prefix cache has all ring buffers, whatever the call's width. So those of calls narrower than this share of the
# chunk are not kept.
KEPT = 8


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the programs of the slots are compiled for, besides the model.

    Attributes:
        slots: S.
        capacity: rows of each slot's cache.
        widths: rows of a prefill call, padding included, ascending. How a prompt is cut depends on them and its length alone.
        strict: float32 products without Pallas kernels.
        drafter: None at max_draft 0.
        groups: groups of devices that the slots lie on, in equal parts and in order.
    """

    slots: int
    capacity: int
    widths: tuple[int, ...]
    strict: bool
    drafter: Drafter | None
    groups: int = 1

    @property
    def chunk(self) -> int:
        """Rows of the widest prefill call."""
        return self.widths[-1]

    @property
    def kept(self) -> tuple[int, ...]:
        """Widths of the calls whose states a prefix cache keeps, ascending."""
        return tuple(width for width in self.widths if width * KEPT >= self.chunk)

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
            InputError: an option is outside its range, the model has no drafter, or its groups do not divide the slots.
        """
        options = Options(strict=strict, drafter=drafter, chunk=chunk)
        require_drafter(model, options)
        most = model.config.max_context
        context = min(CONTEXT, most) if context is None else bounds.CONTEXT.checked("context", context)
        if context > most:
            raise InputError(f"context is {context}; the model's context is {most}")
        if options.chunk is not None and options.chunk < PREFILL[0]:
            raise InputError(f"chunk is {options.chunk}; an engine's chunk is at least {PREFILL[0]}")
        count = bounds.SLOTS.checked("slots", slots)
        parts = groups.count(model.graph.mesh)
        if count % parts:
            raise InputError(f"slots is {count}; {parts} groups of devices must divide it, so give a multiple of {parts}")
        free = cls(count, capacity_for(context, most), (), options.strict, model.drafter(drafter), parts)
        return with_widths(model, free, context, options.chunk), context


def fresh(model: Loaded, shape: Shape) -> DecodeState:
    """The state of free slots."""
    mesh = model.graph.mesh if shape.groups > 1 else None
    last_S, depth = [0] * shape.slots, model.max_draft
    state = beginning.state(model.config, shape.capacity, last_S, drafter=shape.drafter, max_draft=depth, mesh=mesh)
    return state if mesh else model.placed(state)


def shapes(model: Loaded, shape: Shape) -> DecodeState:
    """Shapes and types of the state of the slots, without allocating it."""
    last_S = [0] * shape.slots
    empty = functools.partial(loop.start, model.config, shape.capacity, last_S, drafter=shape.drafter, max_draft=model.max_draft)
    return groups.placed_shapes(jax.eval_shape(empty), model.graph.mesh)


def state_bytes(model: Loaded, shape: Shape) -> int:
    """Bytes of the state of the slots on the devices that have the most: those of a group's slots, all without groups."""
    return nbytes(shapes(model, shape)) // shape.groups


def with_widths(model: Loaded, shape: Shape, context: int, chunk: int | None) -> Shape:
    """The shape with the widths of prefill calls, which the device's kind, the model and the options determine.

    Args:
        shape: its widths are not read.
        context: maximum tokens of a request; widths that no prompt of this length needs are left out.
        chunk: the maximum width; None for the widest call that the device's memory allows beside the weights.
    """
    if jax.devices()[0].platform == "cpu":
        return dataclasses.replace(shape, widths=(min(chunk or CPU_CHUNK, model.config.max_context),))
    # Without the slots' state: the same prompt has the same calls, and so the same bits, at any number of slots.
    allowed = widths(chunk or chunk_here(model.config, shape.capacity, model.nbytes), buckets_here())
    return dataclasses.replace(shape, widths=needed(allowed, context))

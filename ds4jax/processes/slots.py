"""Slots of a model that several processes hold: process 0 orders each call, and the others repeat it.

All of an engine's decisions are made in process 0. Every call of `Slots` that changes something or computes on the devices is
passed on with its arguments, in order, so every process launches the same programs on the same values.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, NoReturn

import jax
import numpy as np

from ds4jax.decode.sampling import Sampling
from ds4jax.engine.chunk_state import ChunkState
from ds4jax.engine.loaded import Loaded
from ds4jax.engine.shape import Shape
from ds4jax.engine.slots import News, Slots
from ds4jax.processes.job import Job


class LedSlots(Slots):
    """The slots of process 0. Methods are those of `Slots`."""

    def __init__(self, model: Loaded, shape: Shape, job: Job):
        self._job = job
        super().__init__(model, shape)

    def warm(self) -> None:
        self.compiled()
        self._job.meet()
        super().warm()

    def append(self, slot: int, ids_C: np.ndarray, following_C: np.ndarray, count: int, *, wait: bool = True) -> None:
        self._job.order("append", [ids_C, following_C], slot=slot, count=count)
        super().append(slot, ids_C, following_C, count, wait=wait)

    def taken(self, slot: int, start: int, width: int) -> ChunkState:
        self._job.order("taken", slot=slot, start=start, width=width)
        return super().taken(slot, start, width)

    def put_rows(self, slot: int, start: int, state: ChunkState) -> None:
        self._job.order("put_rows", jax.tree.leaves(state.rows), slot=slot, start=start)
        super().put_rows(slot, start, state)

    def put_rings(self, slot: int, length: int, state: ChunkState) -> None:
        self._job.order("put_rings", jax.tree.leaves(state.rings), slot=slot, length=length)
        super().put_rings(slot, length, state)

    def insert(
        self,
        slot: int,
        last: int,
        *,
        max_new_tokens: int,
        sampling: Sampling,
        depth: int,
        stop_ids: tuple[int, ...],
        scored: bool = False,
    ) -> None:
        numbers: dict[str, Any] = {"max_new_tokens": max_new_tokens, "depth": depth, "stop_ids": stop_ids, "scored": scored}
        self._job.order("insert", slot=slot, last=last, sampling=dataclasses.asdict(sampling), **numbers)
        super().insert(slot, last, sampling=sampling, **numbers)

    def mask(self, slot: int, words_M: np.ndarray | None) -> None:
        if words_M is not None or slot in self._masked:
            self._job.order("mask", [] if words_M is None else [words_M], slot=slot)
        super().mask(slot, words_M)

    def step(self, steps: int) -> tuple[int, list[News]]:
        self._job.order("step", steps=steps)
        return super().step(steps)

    def free(self, slot: int) -> None:
        self._job.order("free", slot=slot)
        super().free(slot)

    def rebuild(self) -> NoReturn:
        """A call of process 0 has failed, and another may have failed elsewhere or wait for this one: the job ends."""
        self._job.end(f"process 0: a call failed: {' '.join(str(sys.exception()).splitlines())}", 1)

    def release(self) -> None:
        super().release()
        self._job.close()


def follow(slots: Slots, job: Job) -> None:
    """Repeat in another process what process 0 does with its slots, until the job ends."""
    like = slots.chunk_shapes(slots.shape.chunk)
    slots.compiled()
    job.meet()
    for message in job.orders():
        fields = dict(message.fields)
        _repeat(slots, fields.pop("do"), fields, message.arrays, like)
    slots.release()


def _repeat(slots: Slots, do: str, fields: dict[str, Any], arrays: list[np.ndarray], like: ChunkState) -> None:
    match do:
        case "append":
            slots.append(fields["slot"], arrays[0], arrays[1], fields["count"])
        case "put_rows":
            slots.put_rows(**fields, state=ChunkState(jax.tree.unflatten(jax.tree.structure(like.rows), arrays), None))
        case "put_rings":
            slots.put_rings(**fields, state=ChunkState((), jax.tree.unflatten(jax.tree.structure(like.rings), arrays)))
        case "insert":
            fields |= {"sampling": Sampling(**fields["sampling"]), "stop_ids": tuple(fields["stop_ids"])}
            slots.insert(**fields)
        case "mask":
            slots.mask(fields["slot"], arrays[0] if arrays else None)
        case "taken" | "step" | "free":
            getattr(slots, do)(**fields)
        case _:
            raise ValueError(f"process 0 orders {do}, which is no call of this version")

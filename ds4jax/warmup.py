"""The large programs of ordinary use, compiled into the persistent cache before anybody waits for them; no weight is read."""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp

from ds4jax import decode
from ds4jax.buckets import BUCKETS, LEAST_REAL, capacities, widths
from ds4jax.decode import DecodeState, Limits
from ds4jax.depth import Policy
from ds4jax.drafter import MTPDrafter
from ds4jax.errors import InputError
from ds4jax.generation import nbytes
from ds4jax.language_model import LanguageModel
from ds4jax.loading import Checkpoint
from ds4jax.model.parameters import build
from ds4jax.prefill_plan import chunk_here
from ds4jax.sampling import Sampling

HIT = "/jax/compilation_cache/cache_hits"
# Compilers at work at once: each has threads of its own for parts of its work, and takes gigabytes of the host's memory.
MOST_COMPILERS = 4


@dataclasses.dataclass(frozen=True)
class Program:
    """One program, and how to trace and lower it."""

    name: str
    lower: Callable[[], jax.stages.Lowered]


@dataclasses.dataclass(frozen=True)
class Warm:
    """A program that is in the cache now.

    Attributes:
        lower_seconds: to trace and lower it, which every process does that uses it.
        compile_seconds: to compile it, or to read it where an earlier run had compiled it, which `kept` says.
    """

    name: str
    lower_seconds: float
    compile_seconds: float
    kept: bool


def without_weights(checkpoint: Checkpoint, *, max_draft: int | None = None) -> LanguageModel:
    """An opened model with `jax.ShapeDtypeStruct` for weights: its programs can be compiled, and nothing is read or allocated.

    Raises:
        InputError: `max_draft` is outside 0 to 4.
    """
    model = build(checkpoint.config, ((tensor.name, tensor.abstract) for tensor in checkpoint.tensors))
    return LanguageModel(model, checkpoint.tokenizer, checkpoint.path, max_draft=max_draft, no_mtp=checkpoint.no_mtp)


def programs(model: LanguageModel, context: int, *, strict: bool, chunk: int | None = None) -> list[Program]:
    """What `generate` and `chat` run for texts of up to `context` tokens: for each size of cache every prefill call and the loop.

    Args:
        model: as `without_weights` makes it; its own MTP block drafts.
        chunk: as for `generate`.

    Raises:
        InputError: a context that the model does not have.
    """
    most = model.config.max_context
    if not 1 <= context <= most:
        raise InputError(f"{model.path or 'the model'}: context is {context}; it must be 1 to {most}")
    drafter, depth = MTPDrafter() if model.max_draft else None, model.max_draft
    limits = Limits(jnp.int32(0), jnp.int32(0), jnp.zeros(1, jnp.int32))
    loop = (limits, Sampling().arrays(), Policy(jnp.int32(0), jnp.ones(1 + depth, jnp.float32)))
    made = []
    for capacity in capacities(context, most):
        start = functools.partial(decode.start, model.config, capacity, 0, drafter=drafter, max_draft=depth)
        state: DecodeState = jax.eval_shape(start)
        arguments = (model.graph, model.weights, state)
        for width in widths(chunk or chunk_here(model.config, capacity, nbytes((model.weights, state)))):
            # Longer calls than this are not made for a prompt that fits.
            if width == BUCKETS[0] or width < LEAST_REAL * capacity:
                lower = functools.partial(decode.lower_prefill, *arguments, width, drafter=drafter, strict=strict)
                made.append(Program(f"prefill of {width} rows, cache of {capacity}", lower))
        run = functools.partial(decode.lower_run, *arguments, *loop, drafter=drafter, max_draft=depth, strict=strict)
        made.append(Program(f"decode, cache of {capacity}", run))
    return made


def warm(programs: Sequence[Program], note: Callable[[str], None]) -> Iterator[Warm]:
    """Compile programs, several at once while others are traced; yields each when it and those before it are done.

    Args:
        note: told the name of what is traced next.
    """
    _listen()
    with ThreadPoolExecutor(min(MOST_COMPILERS, os.cpu_count() or 1)) as pool:
        pending = []
        for program in programs:
            note(program.name)
            began = time.perf_counter()
            lowered = program.lower()
            seconds = time.perf_counter() - began
            pending.append(pool.submit(_compiled, program.name, lowered, seconds))
            while pending and pending[0].done():
                yield pending.pop(0).result()
        for future in pending:
            yield future.result()


def _compiled(name: str, lowered: jax.stages.Lowered, lower_seconds: float) -> Warm:
    began, _found.programs = time.perf_counter(), 0
    lowered.compile()
    return Warm(name, lower_seconds, time.perf_counter() - began, _found.programs > 0)


class _Found(threading.local):
    """Programs that the thread which asks has found in the cache: jax tells of one in the thread that compiles."""

    programs = 0


_found = _Found()


@functools.cache
def _listen() -> None:
    jax.monitoring.register_event_listener(_heard)


def _heard(event: str, **_: str | int) -> None:
    if event == HIT:
        _found.programs += 1

"""Compiles the large programs of ordinary use into the persistent cache, without reading weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from ds4jax.cache.capacity import capacities, needed, widths
from ds4jax.decode import loop as decode
from ds4jax.decode.depth import Policy
from ds4jax.decode.loop import Limits
from ds4jax.decode.sampling import Filters, Sampling
from ds4jax.engine import compile
from ds4jax.engine.loaded import Loaded
from ds4jax.engine.prefill import buckets_here, chunk_here, nbytes
from ds4jax.errors import InputError
from ds4jax.loading.checkpoint import Checkpoint
from ds4jax.loading.placement import Devices, abstract, chosen
from ds4jax.model.parameters import build


@dataclasses.dataclass(frozen=True)
class Program(compile.Program):
    """A program with a name for people."""

    name: str = ""


@dataclasses.dataclass(frozen=True)
class Warm:
    """A program that is in the persistent cache now.

    Attributes:
        lower_seconds, compile_seconds, kept: see `ds4jax.engine.compile.Compiled`.
    """

    name: str
    lower_seconds: float
    compile_seconds: float
    kept: bool


def without_weights(checkpoint: Checkpoint, *, max_draft: int | None = None, devices: Devices = None) -> Loaded:
    """An opened model with `jax.ShapeDtypeStruct` as weights. Its programs can be compiled; nothing is read or allocated.

    Raises:
        InputError: `max_draft` is outside 0 to 4, or `devices` cannot be used, as for `ds4jax.load`.
    """
    model = build(checkpoint.config, abstract(checkpoint, chosen(devices)))
    about: dict[str, Any] = {"no_mtp": checkpoint.no_mtp, "drafter": checkpoint.opened_with}
    return Loaded(model, checkpoint.tokenizer, checkpoint.path, max_draft=max_draft, **about)


def programs(model: Loaded, context: int, *, strict: bool, chunk: int | None = None) -> list[Program]:
    """The programs of `generate` and `chat` for texts of up to `context` tokens: for each cache size the prefills and the loop.

    Args:
        model: the result of `without_weights`; its MTP block is the drafter.
        chunk: as for `generate`.

    Raises:
        InputError: `context` is outside 1 to the model's context.
    """
    maximum = model.config.max_context
    if not 1 <= context <= maximum:
        raise InputError(f"{model.path or 'the model'}: context is {context}; it must be 1 to {maximum}")
    drafter, depth = model.drafter(None), model.max_draft
    limits, policy = Limits.of([0], [0], [[0]]), Policy(jnp.zeros(1, jnp.int32), jnp.ones(1 + depth, jnp.float32))
    loop = (limits, Filters.of([Sampling()]), policy)
    made = []
    for capacity in capacities(context, maximum):
        state, key = model.state_shapes(capacity, drafter), model.program_key(capacity, drafter, strict=strict)
        arguments = (model.graph, model.arrays, state)
        most = chunk or chunk_here(model.config, capacity, model.nbytes + nbytes(state))
        # A prompt that fits this cache needs no wider call.
        for width in needed(widths(most, buckets_here()), capacity):
            lower = functools.partial(decode.lower_prefill, *arguments, width, drafter=drafter, strict=strict)
            made.append(Program(lower, (*key, width), f"prefill of {width} rows, cache of {capacity}"))
        run = functools.partial(decode.lower_run, *arguments, *loop, drafter=drafter, max_draft=depth, strict=strict)
        made.append(Program(run, key, f"decode, cache of {capacity}"))
    return made


def warm(programs: Sequence[Program], note: Callable[[str], None]) -> Iterator[Warm]:
    """Compile programs, several at a time, while others are traced.

    Args:
        note: called with the name of each program before it is found or traced.

    Yields:
        The programs in this order, each as soon as it and all earlier ones are compiled.
    """

    def noted() -> Iterator[Program]:
        for program in programs:
            note(program.name)
            yield program

    for program, one in zip(programs, compile.compile_all(noted()), strict=True):
        yield Warm(program.name, one.lower_seconds, one.compile_seconds, one.kept)

"""Loads or compiles programs in threads. Lowering happens in the calling thread, because Python runs one thread at a time."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from ds4jax.engine import kept
from ds4jax.engine.first_call import FirstCall
from ds4jax.timing import WAITED

HIT = "/jax/compilation_cache/cache_hits"
# Maximum compilations at a time. Each uses several threads and gigabytes of host memory.
MAX_COMPILERS = 4

Lower = Callable[[], jax.stages.Lowered]


@dataclasses.dataclass(frozen=True)
class Program:
    """A program to compile.

    Attributes:
        lower: traces and lowers it.
        key: what it depends on, as for `begin`; None for a program that is not kept by facts.
    """

    lower: Lower
    key: Hashable = None


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program.

    Attributes:
        executable: call it with the program's arguments except the static ones.
        lower_seconds: time of tracing and lowering; 0 for a program that was found by facts.
        compile_seconds: time of compiling it, or of reading it from a file.
        kept: whether it was read from a file.
    """

    executable: Any
    lower_seconds: float
    compile_seconds: float
    kept: bool


def compile_all(programs: Iterable[Program], compilers: int | None = None) -> Iterator[Compiled]:
    """Lower programs one after the other, and compile them in threads.

    Args:
        compilers: number of threads; by default the number of cores, at most 4.

    Yields:
        The programs in this order, each as soon as it and all earlier ones are compiled.
    """
    _listen()
    with ThreadPoolExecutor(compilers or min(MAX_COMPILERS, os.cpu_count() or 1)) as pool:
        pending: list[Future[Compiled]] = []
        for program in programs:
            pending.append(_started(pool, program))
            while pending and pending[0].done():
                yield pending.pop(0).result()
        for future in pending:
            yield future.result()


def _started(pool: ThreadPoolExecutor, program: Program) -> Future[Compiled]:
    """Find a program by facts, or lower it here and let the pool compile it."""
    began, name = time.perf_counter(), kept.name_of(program.key) if program.key else None
    executable = kept.load(name)
    if executable is not None:
        found: Future[Compiled] = Future()
        found.set_result(Compiled(executable, 0.0, time.perf_counter() - began, True))
        return found
    lowered = program.lower()
    return pool.submit(_compiled, name, lowered, time.perf_counter() - began)


def _compiled(name: str | None, lowered: jax.stages.Lowered, lower_seconds: float) -> Compiled:
    began, _found.programs = time.perf_counter(), 0
    executable, loaded = kept.compiled(name, lowered)
    return Compiled(executable, lower_seconds, time.perf_counter() - began, loaded or _found.programs > 0)


_programs: dict[Hashable, Future[Any]] = {}


def begin(key: Hashable, lower: Lower) -> Future[Any]:
    """The executable of a key. The first call, and the first one after a failure, starts a thread that loads or compiles it.

    Exiting early still waits for the compilation.

    Args:
        key: everything that the program depends on, besides the process; see `ds4jax.engine.program_key.by_facts`.
        lower: traces and lowers it, unless an earlier process has kept it under this key.
    """
    future = _programs.get(key)
    if future is None or (future.done() and future.exception()):
        pool = ThreadPoolExecutor(1)
        future = _programs[key] = pool.submit(_made, key, lower)
        pool.shutdown(wait=False)
    return future


def _made(key: Hashable, lower: Lower) -> Any:
    name = kept.name_of(key)
    executable, loaded = kept.load(name), True
    if executable is None:
        executable, loaded = kept.compiled(name, lower())
    if name is None or not loaded:
        return executable
    return FirstCall(executable, functools.partial(kept.refuse, name), lambda: kept.compiled(name, lower())[0])


def programs() -> tuple[Hashable, ...]:
    """The keys of all programs that were requested in this process."""
    return tuple(_programs)


def forget() -> None:
    """Release all programs of this process, like `jax.clear_caches` for JAX's own."""
    _programs.clear()


def wait(compiling: Sequence[Future[Any]]) -> list[Any]:
    """Wait for executables and return them. The time counts as waiting for compilations, see `ds4jax.timing`."""
    if not all(future.done() for future in compiling):
        began = time.perf_counter()
        concurrent.futures.wait(compiling)
        jax.monitoring.record_event_duration_secs(WAITED, time.perf_counter() - began)
    return [future.result() for future in compiling]


class _Found(threading.local):
    """Programs that this thread found in the persistent cache. JAX reports them in the compiling thread."""

    programs = 0


_found = _Found()


@functools.cache
def _listen() -> None:
    jax.monitoring.register_event_listener(_heard)


def _heard(event: str, **_: str | int) -> None:
    if event == HIT:
        _found.programs += 1

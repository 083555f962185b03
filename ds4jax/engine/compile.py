"""Compiles programs in threads. Lowering happens in the calling thread, because Python runs one thread at a time."""

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

from ds4jax.timing import WAITED

HIT = "/jax/compilation_cache/cache_hits"
# Maximum compilations at a time. Each uses several threads and gigabytes of host memory.
MAX_COMPILERS = 4

Lower = Callable[[], jax.stages.Lowered]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program.

    Attributes:
        executable: call it with the program's arguments except the static ones.
        lower_seconds: time of tracing and lowering; every process that uses the program does this.
        compile_seconds: time of compiling it, or of reading it from the persistent cache.
        kept: whether it was read from the persistent cache.
    """

    executable: Any
    lower_seconds: float
    compile_seconds: float
    kept: bool


def compile_all(lowers: Iterable[Lower], compilers: int | None = None) -> Iterator[Compiled]:
    """Lower programs one after the other, and compile them in threads.

    Args:
        lowers: functions that lower a program.
        compilers: number of threads; by default the number of cores, at most 4.

    Yields:
        The programs in this order, each as soon as it and all earlier ones are compiled.
    """
    _listen()
    with ThreadPoolExecutor(compilers or min(MAX_COMPILERS, os.cpu_count() or 1)) as pool:
        pending: list[Future[Compiled]] = []
        for lower in lowers:
            began = time.perf_counter()
            lowered = lower()
            pending.append(pool.submit(_compiled, lowered, time.perf_counter() - began))
            while pending and pending[0].done():
                yield pending.pop(0).result()
        for future in pending:
            yield future.result()


def _compiled(lowered: jax.stages.Lowered, lower_seconds: float) -> Compiled:
    began, _found.programs = time.perf_counter(), 0
    executable = lowered.compile()
    return Compiled(executable, lower_seconds, time.perf_counter() - began, _found.programs > 0)


_programs: dict[Hashable, Future[Any]] = {}


def begin(key: Hashable, lower: Lower) -> Future[Any]:
    """The executable of a key. The first call, and the first one after a failure, starts a thread that compiles it.

    Exiting early still waits for the compilation.
    """
    future = _programs.get(key)
    if future is None or (future.done() and future.exception()):
        pool = ThreadPoolExecutor(1)
        future = _programs[key] = pool.submit(lambda: lower().compile())
        pool.shutdown(wait=False)
    return future


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

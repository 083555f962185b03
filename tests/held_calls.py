"""An engine whose calls wait for a test, so that no test comes too late for what it wants to meet."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from ds4jax.engine.engine import Engine

# Of a call: few, so that replies last for many calls.
STEPS = 4


class Calls:
    """Permissions for an engine's calls."""

    def __init__(self) -> None:
        self.waiting, self.free = threading.Event(), threading.Event()
        self._permissions = threading.Semaphore(0)

    def release(self, count: int) -> None:
        """Let the engine make so many calls more."""
        self._permissions.release(count)

    def until(self, reached: Callable[[], bool], seconds: float = 60) -> None:
        """Let the engine make one call after the other until something is so."""
        end = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < end
            if self.waiting.wait(0.002):
                self.waiting.clear()
                self.release(1)

    def take(self) -> None:
        """Wait for a permission; at the end there is one for everybody."""
        if not self._permissions.acquire(blocking=False):
            self.waiting.set()
            while not self.free.is_set() and not self._permissions.acquire(timeout=0.05):
                pass
            self.waiting.clear()


@contextlib.contextmanager
def held(engine: Engine) -> Iterator[Calls]:
    """While open, each call of the loop waits for a permission and makes at most `STEPS` steps."""
    slots, calls = engine._scheduler._slots, Calls()
    step = slots.step

    def held_step(steps: int) -> Any:
        if steps:
            calls.take()
        return step(min(steps, STEPS))

    slots.step = held_step  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        slots.step = step  # type: ignore[method-assign]
        calls.free.set()

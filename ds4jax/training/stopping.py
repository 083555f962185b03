"""When a run is to end before its last step: at a signal, or after a time."""

from __future__ import annotations

import signal
import time
from types import TracebackType
from typing import Any


class Stopping:
    """A context in which SIGINT and SIGTERM ask the run to end. A second signal ends it immediately.

    Args:
        started: `time.monotonic()` at the start of the run.
        limit: seconds after which the run is to end; None for no limit.
    """

    def __init__(self, started: float, limit: float | None):
        self._started, self._limit = started, limit
        self._signalled = False
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether the run is to end after the current call."""
        return self._signalled or (self._limit is not None and time.monotonic() - self._started > self._limit)

    def __enter__(self) -> Stopping:
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in self._before:
            signal.signal(number, self._stop)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: Any) -> None:
        self._signalled = True
        signal.signal(number, self._before[number])

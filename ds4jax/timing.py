"""The time from the start of the process to its first token, in parts that add up."""

from __future__ import annotations

import functools
import os
import threading
import time
from pathlib import Path

PARTS = ("import", "plan", "load", "compile", "prefill", "decode", "other")
# In place of the start of the process on systems that do not report it.
_IMPORTED = time.monotonic()
# Index of the start time in /proc/self/stat, after the command's name.
_START_FIELD = 19
# Events of JAX for tracing, lowering and compiling, and our own for waiting on a compilation in another thread.
WAITED = "/ds4jax/compile/waited"
COMPILE_EVENTS = ("/jax/core/compile/", WAITED)


def process_began(stat: Path = Path("/proc/self/stat")) -> float:
    """Start of this process on the clock of `time.monotonic`; the import of ds4jax where the system does not report it.

    Source: Linux documentation, proc(5), starttime.
    """
    try:
        # The command's name is in parentheses and may hold any character.
        ticks = int(stat.read_text(errors="replace").rsplit(")", 1)[1].split()[_START_FIELD])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return _IMPORTED
    return min(time.monotonic() - age, _IMPORTED)


class Startup:
    """Times of one start: consecutive parts in one thread, and the time of compiling within them."""

    def __init__(self, began: float | None = None):
        """Begin with the part "import" at `began` on the clock of `time.monotonic`; by default the start of the process."""
        self._began = process_began() if began is None else began
        self._marks = [("import", self._began)]
        self._compiling: list[tuple[float, float]] = []
        self._thread = threading.get_ident()

    def begin(self, part: str) -> None:
        """Start timing `part`, one of `PARTS`."""
        self._marks.append((part, time.monotonic()))

    def compiled(self, seconds: float) -> None:
        """Count the last `seconds` as tracing, lowering, compiling, or reading a compiled program.

        Compilations in other threads are not counted; this thread's wait for them is.
        """
        if threading.get_ident() != self._thread:
            return
        end = time.monotonic()
        begin = end - seconds
        # Traces nest: an event may contain events that were reported before it.
        while self._compiling and self._compiling[-1][1] > begin:
            begin = min(begin, self._compiling.pop()[0])
        self._compiling.append((begin, end))

    def seconds(self) -> dict[str, float]:
        """Seconds of each of `PARTS` until now, and their sum as "total"."""
        found = dict.fromkeys(PARTS, 0.0)
        now = time.monotonic()
        ends = [*(begin for _, begin in self._marks[1:]), now]
        for (part, begin), end in zip(self._marks, ends, strict=True):
            inside = sum(max(min(end, last) - max(begin, first), 0.0) for first, last in self._compiling)
            found[part] += end - begin - inside
            found["compile"] += inside
        return found | {"total": now - self._began}


_current = Startup()


def current() -> Startup:
    """The current start."""
    return _current


def watch() -> None:
    """Begin a new start at the start of the process; commands call it before large imports."""
    global _current
    _current = Startup()


def begin(part: str) -> None:
    """`Startup.begin` of the current start; from then on it counts JAX's compilations."""
    _listen()
    _current.begin(part)


@functools.cache
def _listen() -> None:
    import jax

    jax.monitoring.register_event_duration_secs_listener(_heard)


def _heard(event: str, duration_secs: float, **_: str | int) -> None:
    if event.startswith(COMPILE_EVENTS):
        _current.compiled(duration_secs)

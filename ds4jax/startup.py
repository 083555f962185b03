"""Where the time from the process's start to its first token goes, in parts that add up."""

from __future__ import annotations

import functools
import os
import threading
import time
from pathlib import Path

PARTS = ("import", "plan", "load", "compile", "prefill", "decode", "other")
# For systems that do not say when a process began.
_IMPORTED = time.monotonic()
# Of /proc/self/stat, counted from what follows the command's name.
_START_FIELD = 19
# Durations that jax tells of tracing, lowering and compiling, and ours of waiting until another thread has compiled.
WAITED = "/ds4jax/compile/waited"
COMPILE_EVENTS = ("/jax/core/compile/", WAITED)


def process_began(stat: Path = Path("/proc/self/stat")) -> float:
    """When this process began, on the clock of `time.monotonic`; where the system does not say, when ds4jax was imported.

    Source: Linux documentation, proc(5), starttime.
    """
    try:
        # The command's name may hold anything, and is in parentheses.
        ticks = int(stat.read_text().rsplit(")", 1)[1].split()[_START_FIELD])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return _IMPORTED
    return min(time.monotonic() - age, _IMPORTED)


class Startup:
    """One start: parts that follow each other in the thread that made it, and what in each of them was compiling."""

    def __init__(self, began: float | None = None):
        """Args: `began`, on the clock of `time.monotonic`; the process's own start by default. The first part is "import"."""
        self._began = process_began() if began is None else began
        self._marks = [("import", self._began)]
        self._compiling: list[tuple[float, float]] = []
        self._thread = threading.get_ident()

    def begin(self, part: str) -> None:
        """What comes from here on belongs to another of `PARTS`, until the next call."""
        self._marks.append((part, time.monotonic()))

    def compiled(self, seconds: float) -> None:
        """So many seconds until now went into tracing, lowering, compiling, or reading a compiled program.

        Those of other threads are nobody's: they cost what the first thread waits for them.
        """
        if threading.get_ident() != self._thread:
            return
        end = time.monotonic()
        begin = end - seconds
        # A function is traced within another: what is told last may hold what was told before.
        while self._compiling and self._compiling[-1][1] > begin:
            begin = min(begin, self._compiling.pop()[0])
        self._compiling.append((begin, end))

    def seconds(self) -> dict[str, float]:
        """Each of `PARTS` until now, and "total", which is their sum."""
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
    """The start that is going on."""
    return _current


def watch() -> None:
    """Begin anew to divide the time since the process began; commands call it before they import anything large."""
    global _current
    _current = Startup()


def begin(part: str) -> None:
    """`Startup.begin` of the start that is going on, which from then on hears from jax what is compiled."""
    _listen()
    _current.begin(part)


@functools.cache
def _listen() -> None:
    import jax

    jax.monitoring.register_event_duration_secs_listener(_heard)


def _heard(event: str, duration_secs: float, **_: str | int) -> None:
    if event.startswith(COMPILE_EVENTS):
        _current.compiled(duration_secs)

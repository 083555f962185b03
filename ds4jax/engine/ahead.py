"""Calls of the decode loop, on a GPU ahead of their reader.

A call of the loop costs the host some milliseconds in addition to its steps: it checks 2,100 arrays of weights and reads the
report. A loop that ends on a condition keeps the host waiting for the device, so the device waits for the host between two
calls. A call of a fixed number of steps returns at once. So the host prepares the next call while the device runs this one.
"""

from __future__ import annotations

import collections
from collections.abc import Callable

import jax

from ds4jax.decode.loop import DecodeState
from ds4jax.engine.host_copy import HostCopy

# Steps of a call on a GPU: they take a few times as long as the host's work for a call.
STEPS = 4
# Maximum calls that are not read yet. After a stop token the device makes at most STEPS * CALLS - 1 steps in vain.
CALLS = 2

# Function of the budget of tokens: makes a call and returns its report.
Call = Callable[[int], jax.Array]


def fixed_steps() -> int | None:
    """Steps of every call; None where a call ends with its budget: only a GPU runs while the host goes on."""
    return STEPS if jax.default_backend() == "gpu" else None


class Calls:
    """The calls of one continuation, and the reports that are not read yet."""

    def __init__(self, host: HostCopy, maximum: int, steps: int | None) -> None:
        """No call yet.

        Args:
            host: the tokens that were read.
            maximum: tokens that are never exceeded.
            steps: of each call, see `fixed_steps`.
        """
        self._host, self._maximum, self._steps = host, maximum, steps
        self._unread: collections.deque[jax.Array] = collections.deque()

    @property
    def waiting(self) -> bool:
        """Whether a call is not read yet."""
        return bool(self._unread)

    def run(self, call: Call, state: Callable[[], DecodeState], budget: int) -> None:
        """Read at least `budget` more tokens, or all that there are until the end. `state` returns that of the latest call."""
        goal = min(self._host.count + budget, self._maximum)
        while self._host.count < goal and not self._host.stopped:
            while self._wanted():
                left = (goal if self._steps is None else self._maximum) - self._host.count
                self._unread.append(call(left))
            # A Ctrl-C here loses a report. The next one counts its tokens too.
            self._host.read(state(), self._unread.popleft())

    def _wanted(self) -> bool:
        """Whether to make another call before the oldest is read. One that would have nothing to do is not made."""
        unread = len(self._unread)
        if self._steps is None:
            return not unread
        return unread < CALLS and self._host.count + unread * self._steps < self._maximum

"""The host's copy of the decode loop's tokens and counts. Each reading transfers only what is new."""

from __future__ import annotations

import functools

import jax
import numpy as np

from ds4jax.decode import loop as decode
from ds4jax.decode.exchange import checked
from ds4jax.decode.loop import DecodeState

# Numbers of latest tokens for an additional reading; the first sufficient one is used. Each size is a small program.
SIZES = tuple(256 << shift for shift in range(0, 30, 2))


class HostCopy:
    """Host copy of the loop's tokens and counts. The device buffers are donated, so they cannot be read during a step.

    Attributes:
        count: tokens generated so far, the stop token included.
        stopped: whether the last one is a stop token.
        tokens: these tokens.
        steps: steps of the loop.
        tried, stood: int32 [K], counts of drafts, see `ds4jax.decode.depth.Acceptance`.
    """

    def __init__(self, max_draft: int) -> None:
        """The copy before the first step of a loop with at most `max_draft` drafts."""
        self.count, self.stopped, self.steps = 0, False, 0
        self.tokens: list[int] = []
        self.tried = self.stood = np.zeros(max_draft, np.int32)
        self._fingerprints: list[np.ndarray] = []

    @property
    def fingerprints(self) -> np.ndarray:
        """Fingerprints of the logits of each token, uint32 [count, 2]."""
        return np.concatenate([np.zeros((0, 2), np.uint32), *self._fingerprints])

    def read(self, state: DecodeState, report: jax.Array | None = None) -> None:
        """Read what is new; waits for the device.

        Args:
            state: of one sequence, read where the report does not reach back to the tokens that the host has.
            report: what the loop's call returned, see `ds4jax.decode.loop.report`; None takes one of the state. It is deleted.

        Raises:
            ExchangeError: devices lost what they sent each other.
        """
        news = _values(_report(state) if report is None else report)
        new = int(news[0]) - len(self.tokens)
        if new > self._size(news):
            capacity = state.tokens.shape[1]
            news = _values(_report(state, min(next(size for size in SIZES if size >= new), capacity)))
        drafts = len(self.tried)
        self.count, self.stopped, self.steps = int(news[0]), bool(news[1]), int(news[2])
        self.tried, self.stood = news[3 : 3 + drafts].copy(), news[3 + drafts : 3 + 2 * drafts].copy()
        rows = news[3 + 2 * drafts :].reshape(-1, 3)
        rows = rows[: self.count][-new:].copy() if new else rows[:0]
        self.tokens += rows[:, 0].tolist()
        self._fingerprints.append(np.ascontiguousarray(rows[:, 1:]).view(np.uint32))

    def _size(self, news: np.ndarray) -> int:
        """Number of tokens in a report."""
        return (len(news) - 3 - 2 * len(self.tried)) // 3


def _values(report: jax.Array) -> np.ndarray:
    """The report of one sequence on the host. Its device buffer is freed.

    The next call then finds every buffer at the same address, and CUDA graphs need no update: 3 ms of a call on an H200.
    """
    (values,) = checked(np.array(report))
    report.delete()
    return values


_report = functools.partial(jax.jit, static_argnames="size")(decode.report)

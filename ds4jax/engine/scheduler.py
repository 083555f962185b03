"""The engine's thread: takes in one prompt at a time, chunk by chunk, and lets all inserted requests go on in between."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from ds4jax.engine.intake import Intake
from ds4jax.engine.pace import Pace
from ds4jax.engine.prefix import PrefixCache
from ds4jax.engine.request import Request
from ds4jax.engine.slots import News, Slots
from ds4jax.errors import ExchangeError

# Calls without steps that measure a call's own cost.
EMPTY_CALLS = 3


class QueueFull(RuntimeError):
    """The queue has no place for another request."""


class Closed(RuntimeError):
    """The engine takes no more requests."""


class Scheduler:
    """Runs requests in a thread of its own, which alone uses the device.

    Requests are taken in first come, first served. Between two calls of the loop at most one chunk of one prompt is computed. A
    request that fails takes no other along: what others lost with the device's state is computed again, with the same bits.
    """

    def __init__(self, slots: Slots, prefix: PrefixCache, waiting: int):
        """Args: `waiting`, maximum number of requests in the queue."""
        self._slots, self._prefix, self._waiting = slots, prefix, waiting
        self._condition = threading.Condition()
        self._queue: deque[Request] = deque()
        self._running: dict[int, Request] = {}
        self._intake: Intake | None = None
        self._closing = False
        self._error: BaseException | None = None
        self._pace, self._called = Pace(), 0.0
        # int64 [S, 2]: drafts and those that stood, of each slot since the start, and of the request that it has.
        self._drafts = np.zeros((slots.shape.slots, 2), np.int64)
        self._latest = np.zeros_like(self._drafts)
        self._thread = threading.Thread(target=self._run, name="ds4jax engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Number of requests that have a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Number of requests in the queue."""
        return len(self._queue)

    @property
    def drafts(self) -> np.ndarray:
        """int64 [S, 2]: the numbers of drafts, and of those that stood, of each slot since the start."""
        return self._drafts.copy()

    @property
    def prefix_bytes(self) -> int:
        """Bytes of the prefix cache in memory."""
        return self._prefix.nbytes

    @property
    def alive(self) -> bool:
        """Whether the thread takes requests."""
        return self._thread.is_alive() and not self._closing

    @property
    def error(self) -> BaseException | None:
        """What ended the thread by itself."""
        return self._error

    def submit(self, request: Request) -> None:
        """Append a request to the queue.

        Raises:
            QueueFull: the queue has no place.
            Closed: the engine was closed, or its thread has ended.
        """
        with self._condition:
            if not self.alive:
                raise Closed("the engine is closed") from self._error
            if len(self._queue) >= self._waiting:
                raise QueueFull(f"the queue is full: {self._waiting} requests wait; try again later")
            self._queue.append(request)
            self._condition.notify()

    def wake(self) -> None:
        """Let the thread look at cancellations."""
        with self._condition:
            self._condition.notify()

    def close(self, *, cancel: bool) -> None:
        """Take no more requests, and wait until all have ended. `cancel` ends them between two calls."""
        with self._condition:
            self._closing = True
            if cancel:
                for request in (*self._queue, *list(self._running.values())):
                    request.cancel()
            self._condition.notify()
        # The engine's last reference may be dropped by its own thread.
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._measure()
            while self._wait():
                self._turn()
        except BaseException as error:
            # Every request tells it.
            self._error = error
        finally:
            with self._condition:
                self._closing = True
                for request in (*self._running.values(), *self._queue):
                    request.fail(self._error or Closed("the engine is closed"))
                self._running.clear()
                self._queue.clear()
            self._slots.release()
            self._prefix.close()

    def _measure(self) -> None:
        self._slots.warm()
        times = []
        for _ in range(EMPTY_CALLS):
            began = time.perf_counter()
            self._slots.step(0)
            times.append(time.perf_counter() - began)
        self._pace = Pace(min(times))

    def _wait(self) -> bool:
        """Wait for work. Returns False at the end."""
        with self._condition:
            while not (self._running or self._queue):
                if self._closing:
                    return False
                self._called = 0.0
                self._condition.wait()
            return True

    def _turn(self) -> None:
        self._guarded(self._drop_cancelled, None)
        self._admit()
        if self._intake:
            intake = self._intake
            self._guarded(self._take_in, intake.request)
        if self._slots.busy:
            self._guarded(self._decode, None)
        if not self._intake:
            # After the first step of a prompt, whose reader would have waited for the copy.
            self._guarded(self._prefix.go_on if self._running else self._prefix.settle, None)

    def _drop_cancelled(self) -> None:
        with self._condition:
            dropped = [request for request in self._queue if request.cancelled]
            for request in dropped:
                self._queue.remove(request)
        for request in dropped:
            self._end(request, "cancelled")
        for slot, request in list(self._running.items()):
            if request.cancelled:
                self._free(slot)
                self._end(request, "cancelled")

    def _end(self, request: Request, reason: str) -> None:
        try:
            request.end(reason)
        except Exception as error:
            request.fail(error)

    def _free(self, slot: int) -> None:
        self._slots.free(slot)
        self._latest[slot] = 0
        del self._running[slot]
        if self._intake and self._intake.slot == slot:
            self._intake = None

    def _admit(self) -> None:
        with self._condition:
            if self._intake or not self._queue:
                return
            slot = self._free_slot()
            if slot is None:
                return
            request = self._running[slot] = self._queue.popleft()
        request.start()
        self._intake = Intake(self._slots, self._prefix, slot, request)

    def _free_slot(self) -> int | None:
        """The first free slot of the group of devices with the fewest requests; None if there is none."""
        shape = self._slots.shape
        size = shape.slots // shape.groups
        held = [sum(slot // size == group for slot in self._running) for group in range(shape.groups)]
        free = (slot for slot in range(shape.slots) if slot not in self._running)
        return min(free, key=lambda slot: (held[slot // size], slot), default=None)

    def _take_in(self) -> None:
        if self._intake and self._intake.turn():
            self._intake = None
        self._called = 0.0

    def _decode(self) -> None:
        self._restrict()
        if not self._slots.busy:
            return
        began = time.perf_counter()
        if self._called:
            self._pace.between(began - self._called)
        # After a prompt's call, which may not have ended, the time says nothing about a step.
        alone = self._called > 0
        steps, news = self._slots.step(self._pace.steps())
        self._called = time.perf_counter()
        if alone:
            self._pace.called(self._called - began, steps)
        for one in news:
            self._pass_on(one)

    def _restrict(self) -> None:
        """Give the next masks to the slots whose requests have a constraint."""
        for slot, request in list(self._running.items()):
            if request.wish.constraint is None or (self._intake and self._intake.slot == slot):
                continue
            try:
                self._slots.mask(slot, request.mask())
            except Exception as error:
                self._free(slot)
                request.fail(error)

    def _pass_on(self, news: News) -> None:
        """Give a request its new tokens. Where it ends, its slot is free before anyone hears of it."""
        request = self._running[news.slot]
        counts = np.array([news.tried.sum(), news.stood.sum()])
        self._drafts[news.slot] += counts - self._latest[news.slot]
        self._latest[news.slot] = counts
        try:
            reason = request.receive(news)
        except Exception as error:
            self._free(news.slot)
            request.fail(error)
            return
        if reason:
            self._free(news.slot)
            self._end(request, reason)

    def _guarded(self, work: Callable[[], None], culprit: Request | None) -> None:
        try:
            work()
        except ExchangeError:
            # The devices stay as they are, so that no call can succeed.
            raise
        except Exception as error:
            self._recover(error, culprit)

    def _recover(self, error: Exception, culprit: Request | None) -> None:
        """A call has failed, and the state of all slots is lost. Start the others again.

        Without a culprit, requests that have been started again once before fail.
        """
        again = [request for _, request in sorted(self._running.items()) if request is not culprit]
        if culprit:
            culprit.fail(error)
        self._running.clear()
        self._intake = None
        self._slots.rebuild()
        self._latest[:] = 0
        if not culprit:
            for request in again:
                request.attempts += 1
            for request in [request for request in again if request.attempts > 1]:
                request.fail(error)
                again.remove(request)
        for request in again:
            request.restart()
        with self._condition:
            self._queue.extendleft(reversed(again))

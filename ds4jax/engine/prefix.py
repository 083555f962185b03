"""The prefix cache: states of prompts' full calls, found by the tokens before and in them.

A hit gives the state that computing the prompt would give, bit for bit: keys are chained digests over the widths and tokens of
full calls, and a state is that of the same calls.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import jax
import numpy as np

from ds4jax.engine.chunk_state import ChunkState


class Store(Protocol):
    """A second place for states, such as a folder. It never raises."""

    def get(self, key: str) -> ChunkState | None:
        """The state of a key; None if it is not there."""

    def put(self, key: str, state: ChunkState) -> None:
        """Keep a state."""

    def close(self) -> None:
        """Finish what was begun."""


class PrefixCache:
    """States of full calls in host memory, the least recently used ones dropped; behind it perhaps a folder.

    The last state given may still be on the device. `go_on` lets a thread copy it, so that nobody waits for the copy: the host's
    memory for 4,096 rows alone takes 50 ms where its pages are new. `settle` waits.

    Attributes:
        nbytes: bytes of the states in memory.
    """

    def __init__(self, *, ahead: int, maximum: int, store: Store | None = None):
        """Start empty.

        Args:
            ahead: tokens after a call that its state depends on: 1 with a drafter, which reads the token after each row.
            maximum: bytes of the states in memory.
            store: asked for what is not in memory, and given all that is new.
        """
        self._ahead, self._maximum, self._store = ahead, maximum, store
        self._states: OrderedDict[str, ChunkState] = OrderedDict()
        self._coming: tuple[str, ChunkState] | None = None
        self._copy: Future[ChunkState] | None = None
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="ds4jax prefix")
        self.nbytes = 0

    def keys(self, ids_T: np.ndarray, calls: Sequence[tuple[int, int]]) -> list[str]:
        """The key of each full call of a prompt's rows, up to the first that has padding.

        Args:
            calls: width and number of real rows of each call.
        """
        ids = ids_T.astype("<i4")
        digest, keys, end = hashlib.sha256(), [], 0
        for width, count in calls:
            if count < width:
                break
            digest.update(width.to_bytes(4, "little") + ids[end : end + width].tobytes())
            end += width
            own = digest.copy()
            own.update(ids[end : end + self._ahead].tobytes())
            keys.append(own.hexdigest())
        return keys

    def get(self, key: str) -> ChunkState | None:
        """The state of a key, or None."""
        if self._coming and self._coming[0] == key:
            self.settle()
        state = self._states.get(key)
        if state is not None:
            self._states.move_to_end(key)
        elif self._store is not None and (state := self._store.get(key)) is not None:
            self._keep(key, state)
        return state

    def used(self, keys: list[str]) -> None:
        """A prompt used these states, in their order. Its beginning, which serves more prompts than its end, stays longer."""
        for key in reversed(keys):
            if key in self._states:
                self._states.move_to_end(key)

    def wants(self, key: str) -> bool:
        """Whether the state of a key would be kept, and is not."""
        coming = self._coming is not None and self._coming[0] == key
        return not coming and key not in self._states and (self._maximum > 0 or self._store is not None)

    def put(self, key: str, state: ChunkState) -> None:
        """Keep a state of this key, whose arrays are on the device. The one before has arrived by now, or is waited for."""
        self.settle()
        self._coming = key, state
        self._keep(key, state)

    def go_on(self) -> None:
        """Begin to copy the state that is on the device, or keep it where it has arrived. Does not wait."""
        if self._copy is not None and self._copy.done():
            self.settle()
        else:
            self._begin()

    def _begin(self) -> None:
        if self._coming is not None and self._copy is None:
            self._copy = self._copier.submit(jax.device_get, self._coming[1])

    def settle(self) -> None:
        """Wait for the state that is on its way, and let go of the device's arrays."""
        self._begin()
        if self._coming is None or self._copy is None:
            return
        (key, _), copy, self._coming, self._copy = self._coming, self._copy, None, None
        state = copy.result()
        if key in self._states:
            self._states[key] = state
        if self._store is not None:
            self._store.put(key, state)

    def _keep(self, key: str, state: ChunkState) -> None:
        if key in self._states or state.nbytes > self._maximum:
            return
        self._states[key] = state
        self.nbytes += state.nbytes
        while self.nbytes > self._maximum:
            _, dropped = self._states.popitem(last=False)
            self.nbytes -= dropped.nbytes

    def close(self) -> None:
        """Finish writing."""
        self.settle()
        self._copier.shutdown()
        if self._store is not None:
            self._store.close()

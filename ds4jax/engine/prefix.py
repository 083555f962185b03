"""The prefix cache: states of prompts' chunks, found by the tokens before and in them.

A hit gives the state that computing the prompt would give, bit for bit: keys are chained digests over the tokens of whole chunks,
and a state is that of the same calls.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Protocol

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
    """States of chunks in host memory, the least recently used ones dropped; behind it perhaps a folder.

    Attributes:
        nbytes: bytes of the states in memory.
    """

    def __init__(self, *, chunk: int, ahead: int, maximum: int, store: Store | None = None):
        """Start empty.

        Args:
            chunk: tokens of a chunk.
            ahead: tokens after a chunk that its state depends on: 1 with a drafter, which reads the token after each row.
            maximum: bytes of the states in memory.
            store: asked for what is not in memory, and given all that is new.
        """
        self._chunk, self._ahead, self._maximum, self._store = chunk, ahead, maximum, store
        self._states: OrderedDict[str, ChunkState] = OrderedDict()
        self.nbytes = 0

    def keys(self, ids_T: np.ndarray) -> list[str]:
        """The key of each whole chunk of a prompt's rows, which are all its tokens except the last."""
        ids = ids_T.astype("<i4")
        digest, keys = hashlib.sha256(), []
        for end in range(self._chunk, len(ids), self._chunk):
            digest.update(ids[end - self._chunk : end].tobytes())
            own = digest.copy()
            own.update(ids[end : end + self._ahead].tobytes())
            keys.append(own.hexdigest())
        return keys

    def get(self, key: str) -> ChunkState | None:
        """The state of a key, or None."""
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
        return key not in self._states and (self._maximum > 0 or self._store is not None)

    def put(self, key: str, state: ChunkState) -> None:
        """Keep a state of this key."""
        if self._store is not None:
            self._store.put(key, state)
        self._keep(key, state)

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
        if self._store is not None:
            self._store.close()

"""A prompt on its way into a slot: first the chunks that the prefix cache has, then the others."""

from __future__ import annotations

import time

from ds4jax.decode.depth import AUTO
from ds4jax.engine.chunk_state import ChunkState
from ds4jax.engine.pace import PIECE_SECONDS
from ds4jax.engine.prefix import PrefixCache
from ds4jax.engine.request import Request
from ds4jax.engine.slots import Slots


class Intake:
    """One request's prompt.

    Attributes:
        slot, request: where it goes, and whose it is.
    """

    def __init__(self, slots: Slots, prefix: PrefixCache, slot: int, request: Request):
        """Nothing is computed before the first turn."""
        self.slot, self.request = slot, request
        self._slots, self._prefix = slots, prefix
        self._keys = prefix.keys(request.prompt_ids)
        self._rows, self._chunk = 0, slots.shape.chunk
        self._looking = True
        self._latest: ChunkState | None = None

    def turn(self) -> bool:
        """Append the next chunk. Returns whether the prompt was complete, and then lets the request take part."""
        found = self._looking and self._look()
        if self._missing and not found:
            self._compute()
        if self._looking or self._missing:
            return False
        self._insert()
        return True

    @property
    def _missing(self) -> int:
        """Rows that are not in the slot. The first step appends the last token."""
        return len(self.request.prompt_ids) - 1 - self._rows

    def _look(self) -> bool:
        """Write chunks that are known, for as long as a piece may take. Returns whether there were any."""
        until, begun = time.perf_counter() + PIECE_SECONDS, self._rows
        while self._looking and time.perf_counter() < until:
            index = self._rows // self._chunk
            state = self._prefix.get(self._keys[index]) if index < len(self._keys) else None
            self._looking = state is not None
            if state:
                self._slots.put_rows(self.slot, self._rows, state)
                self._rows, self._latest = self._rows + self._chunk, state
        if self._latest and not self._looking:
            self._slots.put_rings(self.slot, self._rows, self._latest)
            self._prefix.used(self._keys[: self._rows // self._chunk])
            self.request.reused, self._latest = self._rows, None
        return self._rows > begun

    def _compute(self) -> None:
        start = self._rows
        self._rows = self._slots.prefill(self.slot, self.request.prompt_ids, start)
        index = start // self._chunk
        if index < len(self._keys) and self._prefix.wants(self._keys[index]):
            self._prefix.put(self._keys[index], self._slots.taken(self.slot, start))

    def _insert(self) -> None:
        wish, most = self.request.wish, self._slots.model.max_draft
        depth = AUTO if wish.draft == "auto" else most if wish.draft is None else int(wish.draft)
        self._slots.insert(
            self.slot,
            int(self.request.prompt_ids[-1]),
            max_new_tokens=wish.max_new_tokens,
            sampling=wish.sampling,
            depth=depth,
            stop_ids=wish.stop_ids,
            scored=wish.logprobs is not None,
        )
        self.request.inserted()

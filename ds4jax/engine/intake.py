"""A prompt on its way into a slot: first the calls whose states the prefix cache has, then the others."""

from __future__ import annotations

import time

from ds4jax.cache.capacity import cut
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
        self._calls = list(cut(len(request.prompt_ids) - 1, slots.shape.widths))
        self._keys = prefix.keys(request.prompt_ids, self._calls)
        self._rows, self._done = 0, 0
        self._looking = True
        self._latest: ChunkState | None = None

    def turn(self) -> bool:
        """Append the next call's rows. Returns whether the prompt was complete, and then lets the request take part."""
        found = self._looking and self._look()
        if self._missing and not found:
            self._compute()
        if self._looking or self._missing:
            return False
        self._insert()
        return True

    @property
    def _missing(self) -> bool:
        """Whether rows are not in the slot yet. The first step appends the last token."""
        return self._done < len(self._calls)

    def _look(self) -> bool:
        """Write rows of calls that are known, for as long as a piece may take. Returns whether there were any."""
        until, begun = time.perf_counter() + PIECE_SECONDS, self._done
        while self._looking and time.perf_counter() < until:
            state = self._prefix.get(self._keys[self._done]) if self._done < len(self._keys) else None
            self._looking = state is not None
            if state:
                self._slots.put_rows(self.slot, self._rows, state)
                self._latest = state
                self._advance()
        if self._latest and not self._looking:
            self._slots.put_rings(self.slot, self._rows, self._latest)
            self._prefix.used(self._keys[: self._done])
            self.request.reused, self._latest = self._rows, None
        return self._done > begun

    def _advance(self) -> None:
        self._rows += self._calls[self._done][1]
        self._done += 1

    def _compute(self) -> None:
        start, (width, count) = self._rows, self._calls[self._done]
        # The state of the call before goes to the host beside this one.
        self._prefix.go_on()
        # The first step follows the last call, and is prepared while the device runs it.
        last = self._done + 1 == len(self._calls)
        self._slots.prefill(self.slot, self.request.prompt_ids, start, width, count, wait=not last)
        key = self._keys[self._done] if self._done < len(self._keys) else None
        if key and width in self._slots.shape.kept and self._prefix.wants(key):
            self._prefix.put(key, self._slots.taken(self.slot, start, width))
        self._advance()

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

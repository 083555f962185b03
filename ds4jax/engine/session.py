"""Continuations that share a cache, so only the new part of each prompt is computed.

In a conversation each prompt starts with the last prompt and its reply. The cache is addressed by position, so it is rewound by
setting its length. But its ring buffers hold little more than the latest window. So a prompt can continue from two positions: the
end of the last continuation, or the end of the last prompt, whose ring buffers are copied (megabytes, for any length). The second
one is used if a part of the reply is dropped, such as its reasoning. In all other cases the complete prompt is computed.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.decode.depth import Acceptance
from ds4jax.decode.loop import DecodeState
from ds4jax.decode.width import ROOM
from ds4jax.engine import session_state
from ds4jax.engine.costs import costs_of
from ds4jax.engine.generation import Generation, Holder
from ds4jax.engine.loaded import Loaded
from ds4jax.engine.options import Options, Snapshot, require_drafter
from ds4jax.engine.prefill import Progress
from ds4jax.engine.rewind import RewindPoint
from ds4jax.errors import InputError
from ds4jax.text.prompt import Prompt


class Session:
    """A growing text that is continued several times with the same options.

    Attributes:
        model: the model.
        reused: rows of the latest prompt that were already in the cache.
        unshown: the end of the text of `ids` that the caller has not shown, such as the rest of a token after a stop text. It is
            saved with the session; a new prompt clears it.
    """

    def __init__(self, model: Loaded, **options: Any):
        """Args: `options`, fields of `ds4jax.engine.options.Options`.

        Raises:
            InputError: an option is outside its range, or the model was not opened for these drafts.
        """
        self.model, self._options = model, Options(**options)
        require_drafter(model, self._options)
        self._latest: Generation | Snapshot | None = None
        self._mark: RewindPoint | None = None
        self.reused = 0
        self.unshown = ""

    @classmethod
    def of(cls, model: Loaded, options: Options, latest: Snapshot, mark: RewindPoint, unshown: str = "") -> Session:
        """A session that continues from a snapshot. It takes over the arrays."""
        session = cls(model, **{field.name: getattr(options, field.name) for field in dataclasses.fields(options)})
        session._latest, session._mark, session.unshown = latest, mark, unshown
        return session

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The latest prompt's tokens."""
        return tuple(self._latest.prompt_ids.tolist()) if self._latest else ()

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens after the latest prompt that were returned to the caller.

        Raises:
            InputError: the cache was lost.
        """
        if not self._latest:
            return ()
        latest, _ = self._current()
        return tuple(np.array(latest.state.tokens)[0, : latest.given].tolist())

    def stream(self, prompt: Prompt, *, progress: Progress | None = None) -> Generation:
        """Like `LanguageModel.stream`. The previous continuation can no longer be advanced.

        If a Ctrl-C lost the cache, the complete prompt is computed.

        Raises:
            InputError: as for `LanguageModel.generate`; the cache does not change.
        """
        generation = self._continue(self.model.encode(prompt), self._held, progress=progress)
        generation.prefill()
        self._hand_over(generation)
        self._mark, self.unshown = RewindPoint.of(generation.state), ""
        return generation

    def resume(self) -> Generation:
        """Continue the latest continuation after the last returned token, by at most `max_new_tokens`.

        `ids` and the result contain all tokens since the prompt. At temperature 0, or if the continuation was not at its limit,
        tokens and fingerprints are the same as without a pause. If the cache is too small, it is copied to a larger one, which
        needs another program.

        Raises:
            InputError: there is no continuation, or its cache was lost.
        """
        latest, _ = self._current()
        generation = self._continue(latest.prompt_ids, self._paused, resumed=latest)
        self.reused = int(latest.state.cache.length[0])
        self._hand_over(generation)
        return generation

    def _continue(self, ids_T: np.ndarray, hold: Holder, **how: Any) -> Generation:
        model, options = self.model, self._options
        return Generation(model, ids_T, options, costs=costs_of(model, options), spell=model.spell, hold=hold, **how)

    def _hand_over(self, generation: Generation) -> None:
        """Give the cache to a continuation. The previous one can no longer be advanced."""
        if isinstance(self._latest, Generation):
            self._latest.overtake()
        self._latest = generation

    def fork(self) -> Session:
        """An independent copy of the session.

        Copies the complete cache on the device, because a step donates its buffers, so two sessions cannot share them.

        Raises:
            InputError: the session is empty, or its cache was lost.
        """
        latest, mark = self._current()
        state, rings, drafting = jax.tree.map(jnp.copy, (latest.state, mark.rings, mark.drafting))
        copied, point = dataclasses.replace(latest, state=state), RewindPoint(mark.length, rings, drafting)
        branch = Session.of(self.model, self._options, copied, point, self.unshown)
        branch.reused = self.reused
        return branch

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the session to a safetensors file. `ds4jax.restore` continues from it with the same bits.

        Only the filled rows of the cache are written, one array after another. The file is replaced atomically when it is
        complete.

        Raises:
            InputError: the session is empty, its cache was lost, or `path` is a folder.
            OSError: the file cannot be written, or the disk is full. An existing file is unchanged.
        """
        latest, mark = self._current()
        session_state.save(Path(path), self.model, self._options, latest, mark, self.unshown)

    def _current(self) -> tuple[Snapshot, RewindPoint]:
        latest, mark = self._latest, self._mark
        if latest is None or mark is None:
            raise InputError("the session is empty; stream a prompt first")
        snapshot = latest.snapshot if isinstance(latest, Generation) else latest
        if _deleted((snapshot.state, mark.rings, mark.drafting)):
            raise InputError("the session's cache is gone, lost to a Ctrl-C; stream its prompt again")
        return snapshot, self._fitted(mark, snapshot.state)

    def _paused(self, ids_T: np.ndarray, capacity: int) -> DecodeState:
        state = self._current()[0].state
        if capacity > state.tokens.shape[1]:
            state = self._grown(state, capacity)
        return dataclasses.replace(state, stopped=jnp.zeros(1, bool)) if self._options.ignore_eos else state

    def _held(self, ids_T: np.ndarray, capacity: int) -> DecodeState | None:
        state = self._rewound(ids_T)
        self.reused = int(state.cache.length[0]) if state else 0
        if state is None:
            return None
        if capacity > state.tokens.shape[1]:
            state = self._grown(state, capacity)
        return dataclasses.replace(
            state,
            tokens=jnp.zeros_like(state.tokens),
            fingerprints=jnp.zeros_like(state.fingerprints),
            count=jnp.zeros(1, jnp.int32),
            stopped=jnp.zeros(1, bool),
            acceptance=Acceptance.none(self.model.max_draft),
        )

    def _rewound(self, ids_T: np.ndarray) -> DecodeState | None:
        """The latest state, rewound to the common prefix of the prompt and its tokens; None if that is impossible.

        The drafter's state of a row depends on the token after it, so a row can be reused only if that token is the same, too.
        From the end of a continuation at most one row can be undone, because rejected drafts may have used all spare rows of the
        ring buffers. The drafter's streams are those of the last row, so another row must follow an undone one.
        """
        try:
            latest, mark = self._current()
        except InputError:
            return None
        state = latest.state
        held_T = np.concatenate([latest.prompt_ids, np.asarray(state.tokens)[0, : int(state.count[0])]])
        drafter, needed = self.model.drafter(self._options.drafter), len(ids_T) - 1
        usable = min(_common_prefix(held_T, ids_T) - bool(drafter), needed)

        def reached(length: int) -> int:
            undone = usable == length - 1 and (usable < needed or not drafter)
            return length if usable >= length else max(usable, 0) if undone else 0

        length = reached(int(state.cache.length[0]))
        if not length:
            state, length = mark.restored(state), reached(mark.length)
        if not length:
            return None
        cache = dataclasses.replace(state.cache, length=jnp.full(1, length, jnp.int32))
        return dataclasses.replace(state, cache=cache)

    def _fitted(self, mark: RewindPoint, state: DecodeState) -> RewindPoint:
        """The mark with the drafter's state in the shapes of `state`, which may have grown since."""
        shapes = [[leaf.shape for leaf in jax.tree.leaves(drafting)] for drafting in (mark.drafting, state.drafting)]
        drafter = self.model.drafter(self._options.drafter)
        if drafter is None or shapes[0] == shapes[1]:
            return mark
        larger = drafter.init(self.model.config, state.tokens.shape[1], ROOM, 1)
        return dataclasses.replace(mark, drafting=jax.tree.map(_copied_into, larger, mark.drafting))

    def _grown(self, state: DecodeState, capacity: int) -> DecodeState:
        """A copy with a larger capacity. For a moment both are in memory."""
        larger = self.model.state(capacity, 0, self.model.drafter(self._options.drafter))
        return jax.tree.map(_copied_into, larger, state)


def _copied_into(larger: jax.Array, array: jax.Array) -> jax.Array:
    if larger.shape == array.shape:
        return array
    return larger.at[tuple(map(slice, array.shape))].set(array)


def _deleted(tree: Any) -> bool:
    return any(leaf.is_deleted() for leaf in jax.tree.leaves(tree))


def _common_prefix(left_T: np.ndarray, right_T: np.ndarray) -> int:
    """Length of the common prefix of two sequences."""
    size = min(len(left_T), len(right_T))
    differ = np.flatnonzero(left_T[:size] != right_T[:size])
    return int(differ[0]) if len(differ) else size

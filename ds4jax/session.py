"""Continuations that share a cache: of each prompt only what is new is computed.

A conversation's next prompt begins with the last one and its reply. The cache is addressed by position, so going back to where
the two part is setting its length; but its rings hold little more than the latest window. So a prompt is continued from one of
two places: the end of the last continuation, or the end of the last prompt, whose rings are kept beside the cache (megabytes,
whatever the length). The second one serves replies of which something is dropped, such as their reasoning. Anything further back
is computed anew.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax import decode
from ds4jax.cache import CompressorCache, LayerCache
from ds4jax.decode import DecodeState
from ds4jax.depth import Acceptance
from ds4jax.drafter import MTPDrafter
from ds4jax.errors import InputError
from ds4jax.generation import Generation, Options, Progress, Prompt, Snapshot

if TYPE_CHECKING:
    from ds4jax.language_model import LanguageModel

Pair = tuple[jax.Array, jax.Array]
# A layer's window, and values and gates of its compressor and its indexer.
Rings = tuple[jax.Array, Pair | None, Pair | None]


@dataclasses.dataclass(frozen=True)
class Mark:
    """What later steps overwrite of a state: its rings, and whatever its drafter keeps."""

    length: int
    rings: tuple[Rings, ...]
    drafting: Any

    @classmethod
    def of(cls, state: DecodeState) -> Mark:
        """A copy: the state itself is given away with the next step."""
        rings, drafting = jax.tree.map(jnp.copy, (tuple(map(rings_of, state.cache.layers)), state.drafting))
        return cls(int(state.cache.length[0]), rings, drafting)

    def restored(self, state: DecodeState) -> DecodeState:
        """A later state taken back; finished rows need no copy, since they are written once."""
        layers = tuple(_with_rings(layer, rings) for layer, rings in zip(state.cache.layers, self.rings, strict=True))
        return dataclasses.replace(state, cache=dataclasses.replace(state.cache, layers=layers), drafting=self.drafting)


class Session:
    """One growing text, continued again and again with the same options.

    Attributes:
        model: what it was made with.
        reused: rows of the latest prompt that were in the cache already.
    """

    def __init__(self, model: LanguageModel, **options: Any):
        """Args: `options`, fields of `ds4jax.generation.Options`.

        Raises:
            InputError: an option outside its range.
        """
        self.model, self._options = model, Options(**options)
        self._latest: Generation | Snapshot | None = None
        self._mark: Mark | None = None
        self.reused = 0

    @classmethod
    def of(cls, model: LanguageModel, options: Options, latest: Snapshot, mark: Mark) -> Session:
        """A session that goes on from there; what it is made of is its own from then on."""
        session = cls(model)
        session._options, session._latest, session._mark = options, latest, mark
        return session

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The latest prompt's tokens."""
        return tuple(self._latest.prompt_ids.tolist()) if self._latest else ()

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens after it that their reader has.

        Raises:
            InputError: the cache is gone.
        """
        if not self._latest:
            return ()
        latest, _ = self._there()
        return tuple(np.array(latest.state.tokens)[: latest.given].tolist())

    def stream(self, prompt: Prompt, *, progress: Progress | None = None) -> Generation:
        """Like `LanguageModel.stream`; the continuation before it can no longer be advanced.

        After a Ctrl-C that lost the cache the prompt is computed anew.

        Raises:
            InputError: as for `LanguageModel.generate`; the cache stays as it was.
        """
        generation = Generation(self.model, prompt, self._options, self._held, progress)
        self._latest, self._mark = generation, Mark.of(generation.state)
        return generation

    def resume(self) -> Generation:
        """Go on with the latest continuation where its reader stopped, by at most `max_new_tokens`.

        It is the same continuation: its `ids` and its result tell of all tokens since the prompt, and tokens and fingerprints
        are those that it would have had without a pause, at temperature 0 or where it was not at its limit. One that outgrows
        its cache goes on in a larger one, which is another program.

        Raises:
            InputError: there is none, or its cache is gone.
        """
        latest, _ = self._there()
        generation = Generation(self.model, latest.prompt_ids, self._options, self._paused, resumed=latest)
        self.reused = int(generation.state.cache.length[0])
        self._latest = generation
        return generation

    def fork(self) -> Session:
        """A second session at the same place; what becomes of one does not touch the other.

        All of the cache is copied on the device, whatever part of it is filled: a step's buffers are given away, so that two
        sessions cannot share any.

        Raises:
            InputError: nothing to copy, or the cache is gone.
        """
        latest, mark = self._there()
        state, rings, drafting = jax.tree.map(jnp.copy, (latest.state, mark.rings, mark.drafting))
        branch = Session.of(
            self.model, self._options, dataclasses.replace(latest, state=state), Mark(mark.length, rings, drafting)
        )
        branch.reused = self.reused
        return branch

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the session to a safetensors file, from which `ds4jax.restore` goes on to the last bit.

        Of the cache only the rows that are filled are written, one array after the other. The file appears at once when it is
        complete.

        Raises:
            InputError: nothing to save, the cache is gone, or `path` is a folder.
            OSError: the file cannot be written, or the disk is full; one that was there before still is.
        """
        from ds4jax.saving import save

        latest, mark = self._there()
        save(Path(path), self.model, self._options, latest, mark)

    def _there(self) -> tuple[Snapshot, Mark]:
        latest, mark = self._latest, self._mark
        if latest is None or mark is None:
            raise InputError("the session is empty; stream a prompt first")
        snapshot = latest.snapshot if isinstance(latest, Generation) else latest
        if _gone((snapshot.state, mark.rings, mark.drafting)):
            raise InputError("the session's cache is gone, lost to a Ctrl-C; stream its prompt again")
        return snapshot, mark

    def _paused(self, ids_T: np.ndarray, capacity: int) -> DecodeState:
        state = self._there()[0].state
        if capacity > len(state.tokens):
            state = self._grown(state, capacity)
        return dataclasses.replace(state, stopped=jnp.array(False)) if self._options.ignore_eos else state

    def _held(self, ids_T: np.ndarray, capacity: int) -> DecodeState | None:
        state = self._reached(ids_T)
        self.reused = int(state.cache.length[0]) if state else 0
        if state is None:
            return None
        if capacity > len(state.tokens):
            state = self._grown(state, capacity)
        return dataclasses.replace(
            state,
            tokens=jnp.zeros_like(state.tokens),
            fingerprints=jnp.zeros_like(state.fingerprints),
            count=jnp.int32(0),
            stopped=jnp.array(False),
            acceptance=Acceptance.none(self.model.max_draft),
        )

    def _reached(self, ids_T: np.ndarray) -> DecodeState | None:
        """The latest state taken back to where the prompt leaves its tokens, None where that cannot be done.

        One row of what both have is always computed again: the drafter learns a row together with the token after it. From the
        end of a continuation no more than that one can be undone: rejected drafts may have taken all the slack that rings have.
        """
        try:
            latest, mark = self._there()
        except InputError:
            return None
        state = latest.state
        held_T = np.concatenate([latest.prompt_ids, np.asarray(state.tokens)[: int(state.count)]])
        wanted = min(_common(held_T, ids_T), len(ids_T) - 1) - 1
        length = int(state.cache.length[0])
        if wanted < length - 1:
            state, length = mark.restored(state), mark.length
        if wanted < max(length - 1, 1):
            return None
        cache = dataclasses.replace(state.cache, length=jnp.full(1, min(wanted, length), jnp.int32))
        return dataclasses.replace(state, cache=cache)

    def _grown(self, state: DecodeState, capacity: int) -> DecodeState:
        """A copy with room for more rows; both are there for a moment."""
        model = self.model
        drafter = (self._options.drafter or MTPDrafter()) if model.max_draft else None
        larger = decode.start(model.config, capacity, 0, drafter=drafter, max_draft=model.max_draft)
        return jax.tree.map(_copied_into, larger, state)


def _copied_into(larger: jax.Array, array: jax.Array) -> jax.Array:
    if larger.shape == array.shape:
        return array
    return larger.at[tuple(map(slice, array.shape))].set(array)


def rings_of(layer: LayerCache) -> Rings:
    """What a layer's later steps overwrite."""

    def part(cache: CompressorCache | None) -> Pair | None:
        return (cache.values, cache.gates) if cache else None

    return layer.window, part(layer.compressor), part(layer.indexer)


def _with_rings(layer: LayerCache, rings: Rings) -> LayerCache:
    def part(cache: CompressorCache | None, ring: Pair | None) -> CompressorCache | None:
        return dataclasses.replace(cache, values=ring[0], gates=ring[1]) if cache and ring else None

    window, compressor, indexer = rings
    return LayerCache(window, part(layer.compressor, compressor), part(layer.indexer, indexer))


def _gone(tree: Any) -> bool:
    return any(leaf.is_deleted() for leaf in jax.tree.leaves(tree))


def _common(left_T: np.ndarray, right_T: np.ndarray) -> int:
    """How many tokens two sequences begin with alike."""
    size = min(len(left_T), len(right_T))
    differ = np.flatnonzero(left_T[:size] != right_T[:size])
    return int(differ[0]) if len(differ) else size

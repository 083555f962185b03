"""Slots on the device: `prefill` a prompt into one, `insert` it among the others, `step` them all, `free` it. Ids in, ids out.

One thread at a time may use them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ds4jax.bounds import NO_STOP
from ds4jax.cache.capacity import padded
from ds4jax.decode import loop, slots
from ds4jax.decode.exchange import checked
from ds4jax.decode.groups import SLOTS
from ds4jax.decode.loop import DecodeState
from ds4jax.decode.masks import Mask
from ds4jax.decode.sampling import Sampling
from ds4jax.decode.slots import STOP_IDS, Asked
from ds4jax.engine import chunk_state
from ds4jax.engine.chunk_state import ChunkState
from ds4jax.engine.compile import begin, wait
from ds4jax.engine.costs import engine_costs
from ds4jax.engine.loaded import Loaded
from ds4jax.engine.shape import Shape, fresh, shapes

# The name of the loop's call among the programs; a prefill's is its width.
CALL = "call"
# Runs of a program after which it is as fast as it gets on a GPU.
RUNS_TO_GRAPH = 3

Arrays = TypeVar("Arrays")


class News(NamedTuple):
    """What a call of the loop added to a slot.

    Attributes:
        slot: its index.
        tokens: the new tokens, the stop token included.
        fingerprints: uint32 [n, 2], of the logits of each.
        stopped: whether the last token is a stop token.
        steps, tried, stood: counts since the request was inserted, see `ds4jax.decode.depth.Acceptance`.
        scores: log probabilities of the n tokens: [n] of each, [n, m] and ids [n, m] of the most likely ones; None if the request
            does not want them.
    """

    slot: int
    tokens: list[int]
    fingerprints: np.ndarray
    stopped: bool
    steps: int
    tried: np.ndarray
    stood: np.ndarray
    scores: tuple[np.ndarray, np.ndarray, np.ndarray] | None


class Slots:
    """The state of S slots on the device, and the programs over it."""

    def __init__(self, model: Loaded, shape: Shape):
        """Start compiling. Nothing is allocated before the first use."""
        self.model, self.shape = model, shape
        # The mesh of the small programs; those that hold weights know it by the graph.
        self._mesh = model.graph.mesh if shape.groups > 1 else None
        self._numbers: dict[int, jax.Array] = {}
        self._empty()
        self._programs = {name: begin((*self._key(), name), lower) for name, lower in self._lowers().items()}

    def rebuild(self) -> None:
        """Start again with free slots, after a failed call, which lost the state."""
        self._empty()

    def _empty(self) -> None:
        costs = engine_costs(self.model, strict=self.shape.strict, drafter=self.shape.drafter)
        self._state: DecodeState | None = None
        self._asked = self._placed(Asked.none(self.shape.slots, costs), slots.ASKED)
        self._counts, self._steps = [0] * self.shape.slots, [0] * self.shape.slots
        self._active: set[int] = set()
        self._scored: set[int] = set()
        self._masked: dict[int, np.ndarray] = {}
        self._remask()

    def _placed(self, arrays: Arrays, specs: Any = SLOTS) -> Arrays:
        """Arrays over slots on the devices that keep them; as they are without groups."""
        if not isinstance(self._mesh, Mesh):
            return arrays
        shardings = jax.tree.map(functools.partial(NamedSharding, self._mesh), specs)
        placed: Arrays = jax.device_put(arrays, shardings)
        return placed

    def release(self) -> None:
        """Give the state's memory back."""
        self._state = None

    def _key(self) -> tuple[Any, ...]:
        """The key of the programs. Models of equal shapes share them."""
        return self.model.graph, self.model.config, self.model.max_draft, self.shape

    def _lowers(self) -> dict[int | str, Callable[[], jax.stages.Lowered]]:
        """What lowers each program: the prefill of each width, and the loop's call."""
        model, shape = self.model, self.shape
        prefill = slots.prefill if shape.groups > 1 else loop.prefill
        arguments, drafter, strict = (model.graph, model.arrays, self.shapes()), shape.drafter, shape.strict
        return {
            # What takes the longest to compile is lowered first.
            CALL: lambda: slots.lower_call(
                *arguments, self._asked, self._mask, drafter=drafter, max_draft=model.max_draft, strict=strict
            ),
            **{
                width: functools.partial(loop.lower_prefill, *arguments, width, drafter=drafter, strict=strict, program=prefill)
                for width in reversed(shape.widths)
            },
        }

    def shapes(self) -> DecodeState:
        """Shapes and types of the state, without allocating it."""
        return shapes(self.model, self.shape)

    @property
    def state(self) -> DecodeState:
        """The state of all slots. The next call of another method donates its buffers."""
        if self._state is None:
            self._state = fresh(self.model, self.shape)
        return self._state

    @property
    def busy(self) -> bool:
        """Whether any request goes on in the next step."""
        return bool(self._active)

    def warm(self) -> None:
        """Compile all programs, so that no request waits for those of another, and run the large ones. Changes nothing.

        A GPU's program runs as fast as it can from its third run on, when its CUDA graph is made: on an H200 a call of 4,096 rows
        takes 470, 361 and 320 ms. A CPU has no such graphs.
        """
        for width in self.shape.kept:
            state: ChunkState = jax.device_get(self.taken(0, 0, width))
            self.put_rows(0, 0, state)
            self.put_rings(0, 0, state)
        self.insert(0, 0, max_new_tokens=1, sampling=Sampling(), depth=0, stop_ids=())
        self.free(0)
        # Late: the small programs compile here while the large ones compile in their threads.
        self.compiled()
        if jax.default_backend() == "gpu":
            self._run_all()

    def _run_all(self) -> None:
        """Run the program of each width and the loop's so often that their CUDA graphs are made."""
        for width in self.shape.widths:
            for _ in range(RUNS_TO_GRAPH):
                self.prefill(0, np.zeros(width, np.int32), 0, width, width)
                self.free(0)
        self.insert(0, 0, max_new_tokens=RUNS_TO_GRAPH, sampling=Sampling(), depth=0, stop_ids=())
        for _ in range(RUNS_TO_GRAPH):
            self.step(1)
        self.free(0)

    def prefill(self, slot: int, ids_T: np.ndarray, start: int, width: int, count: int, *, wait: bool = True) -> None:
        """Append `count` rows of a prompt from row `start` on to a slot that does not take part yet.

        All tokens except the last are appended; the first step appends the last one.

        Args:
            width: of the call, at least `count`.
            wait: as for `append`.
        """
        self.append(slot, padded(ids_T, start, width), padded(ids_T, start + 1, width), count, wait=wait)

    def append(self, slot: int, ids_C: np.ndarray, following_C: np.ndarray, count: int, *, wait: bool = True) -> None:
        """Append the rows of one call, int32 [C], to a slot.

        Args:
            following_C: int32 [C], the token after each.
            count: rows that are no padding.
            wait: until the device has done it. Without, the host prepares the next call meanwhile; not for several devices, whose
                programs would wait for each other.
        """
        program = self.compiled()[len(ids_C)]
        index = (np.int32(slot),) if self.shape.slots > 1 else ()
        state = self.state
        with self.model.exchange.alone:
            cache, drafting = program(self.model.arrays, state.cache, state.drafting, ids_C, following_C, np.int32(count), *index)
        self._state = dataclasses.replace(state, cache=cache, drafting=drafting)
        if wait or isinstance(self.model.graph.mesh, Mesh):
            jax.block_until_ready(cache.length)

    def taken(self, slot: int, start: int, width: int) -> ChunkState:
        """A copy on the device of the state of the `width` rows from row `start` on, which have just been appended."""
        state, options = self.state, {"config": self.model.config, "chunk": width}
        found: ChunkState = chunk_state.taken(
            state.cache, state.drafting, np.int32(slot), np.int32(start), **options, mesh=self._mesh
        )
        return found

    def chunk_shapes(self, width: int) -> ChunkState:
        """Shapes and types of `taken`."""
        state, number = self.shapes(), jax.ShapeDtypeStruct((), np.int32)
        options = {"config": self.model.config, "chunk": width, "mesh": self._mesh}
        shapes: ChunkState = jax.eval_shape(
            functools.partial(chunk_state.taken, **options), state.cache, state.drafting, number, number
        )
        return shapes

    def put_rows(self, slot: int, start: int, state: ChunkState) -> None:
        """Write the rows of the chunk from row `start` on into a slot that does not take part yet."""
        self._put(chunk_state.put_rows, slot, start, state.rows)

    def put_rings(self, slot: int, length: int, state: ChunkState) -> None:
        """Let the slot go on after row `length`, the end of the state's chunk. All rows before must be written."""
        self._put(chunk_state.put_rings, slot, length, state.rings)

    def _put(self, program: Callable[..., tuple[Any, Any]], slot: int, row: int, part: Any) -> None:
        state = self.state
        numbers = np.int32(slot), np.int32(row)
        cache, drafting = program(state.cache, state.drafting, *numbers, part, config=self.model.config, mesh=self._mesh)
        self._state = dataclasses.replace(state, cache=cache, drafting=drafting)

    def insert(
        self,
        slot: int,
        last: int,
        *,
        max_new_tokens: int,
        sampling: Sampling,
        depth: int,
        stop_ids: tuple[int, ...],
        scored: bool = False,
    ) -> None:
        """Let a slot take part from the next step on. Its prompt except the last token must be in the cache.

        Args:
            last: the last token of the prompt.
            depth: drafts per step, or `ds4jax.decode.depth.AUTO`.
            stop_ids: at most `STOP_IDS`.
            scored: whether its news have scores.
        """
        stops = np.array((*stop_ids, *(NO_STOP,) * (STOP_IDS - len(stop_ids))), np.int32)
        numbers = np.int32(slot), np.int32(last), np.int32(max_new_tokens), stops
        how = sampling.arrays(), np.int32(depth), np.bool_(scored)
        self._asked, last_S = slots.insert(self._asked, self.state.last, *numbers, *how, mesh=self._mesh)
        self._state = dataclasses.replace(self.state, last=last_S)
        self._active.add(slot)
        if scored:
            self._scored.add(slot)

    def mask(self, slot: int, words_M: np.ndarray | None) -> None:
        """The tokens that a slot may take next, uint32 [ceil(V/32)], see `Mask`; None allows all. Holds until the next mask."""
        if words_M is None and slot not in self._masked:
            return
        self._masked.pop(slot, None)
        if words_M is not None:
            self._masked[slot] = words_M
        self._remask()

    def _remask(self) -> None:
        mask = Mask.none(self.shape.slots, self.model.config.vocab_size)
        all_words, masked = np.array(mask.words), np.array(mask.masked)
        for masked_slot, own in self._masked.items():
            all_words[masked_slot], masked[masked_slot] = own, True
        self._mask = self._placed(Mask(jax.device_put(all_words), jax.device_put(masked)))

    def step(self, steps: int) -> tuple[int, list[News]]:
        """Run at most `steps` steps of all slots that take part, and wait for them. Ends early when a request ends.

        Returns:
            The number of steps, and what is new in each of these slots.

        Raises:
            ExchangeError: devices lost what they sent each other.
        """
        program = self.compiled()[CALL]
        arguments = self.model.arrays, self.state, self._asked, self._mask, self._number(steps)
        with self.model.exchange.alone:
            self._state, report, scores = program(*arguments)
        numbers_SN = checked(np.array(report))
        tables = jax.tree.map(np.asarray, (scores.chosen, scores.top, scores.top_ids)) if self._scored else None
        # The next call then finds every buffer at the same address, and CUDA graphs need no update.
        report.delete()
        before = list(self._steps)
        news = [self._news(slot, numbers_SN[slot], tables) for slot in sorted(self._active)]
        return max((one.steps - before[one.slot] for one in news), default=0), news

    def _news(self, slot: int, numbers: np.ndarray, tables: tuple[np.ndarray, np.ndarray, np.ndarray] | None) -> News:
        depth = self.model.max_draft
        count, stopped, steps = numbers[:3].tolist()
        tried, stood = numbers[3 : 3 + depth], numbers[3 + depth : 3 + 2 * depth]
        new, self._counts[slot], self._steps[slot] = count - self._counts[slot], count, steps
        rows = numbers[3 + 2 * depth :].reshape(-1, 3)[:count]
        rows = rows[len(rows) - new :]
        fingerprints = np.ascontiguousarray(rows[:, 1:]).view(np.uint32)
        scores = None
        if tables and slot in self._scored:
            chosen, top, top_ids = (table[slot, :new] for table in tables)
            scores = chosen, top, top_ids
        return News(slot, rows[:, 0].tolist(), fingerprints, bool(stopped), steps, tried, stood, scores)

    def free(self, slot: int) -> None:
        """Empty a slot, whatever it did. Its state is that of a new one to the last bit."""
        model, shape = self.model, self.shape
        self._state, self._asked = slots.clear(
            self.state, self._asked, np.int32(slot),
            config=model.config, capacity=shape.capacity, drafter=shape.drafter, max_draft=model.max_draft, mesh=self._mesh,
        )  # fmt: skip
        self._counts[slot] = self._steps[slot] = 0
        self._active.discard(slot)
        self._scored.discard(slot)
        if self._masked.pop(slot, None) is not None:
            self._remask()

    def _number(self, number: int) -> jax.Array:
        """The number as int32 [], in the same device buffer every time."""
        if number not in self._numbers:
            self._numbers[number] = jax.device_put(np.int32(number))
        return self._numbers[number]

    def compiled(self) -> dict[int | str, Any]:
        """The executables, a prefill's by its width. Waits for those that are not compiled yet."""
        futures: list[Future[Any]] = list(self._programs.values())
        return dict(zip(self._programs, wait(futures), strict=True))

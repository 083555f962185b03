"""One continuation: prefill chunk by chunk, then any number of calls of the compiled loop. Ids in, ids out."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

from ds4jax import bounds
from ds4jax.bounds import NO_STOP
from ds4jax.cache.capacity import PREFILL, capacity_for, chunks, padded
from ds4jax.decode import loop as decode
from ds4jax.decode.depth import AUTO, Policy
from ds4jax.decode.drafters.named import name_of
from ds4jax.decode.loop import DecodeState, Limits
from ds4jax.decode.sampling import Filters, Sampling
from ds4jax.engine import beginning
from ds4jax.engine.compile import begin, wait
from ds4jax.engine.host_copy import HostCopy
from ds4jax.engine.loaded import Loaded
from ds4jax.engine.options import Options, Result, Snapshot, require_drafter
from ds4jax.engine.pace import piece
from ds4jax.engine.prefill import Progress, buckets_here, chunk_here, nbytes
from ds4jax.errors import InputError

FIRST_BUDGET = 1

# Function of prompt ids int32 [T] and the needed capacity: a state whose cache has a prefix of the prompt, or None.
Holder = Callable[[np.ndarray, int], DecodeState | None]
# Function of the capacity: the time (ms) of a decode step at each depth from 0.
Costs = Callable[[int], tuple[float, ...]]


class Generation:
    """One continuation in progress. Iterating yields lists of new token ids until it ends.

    Attributes:
        prompt_ids: int32 [T].
        ids: the tokens after the prompt so far, without the stop token.
        finish_reason: "stop" or "length" after the end, "interrupted" before.
    """

    def __init__(
        self,
        model: Loaded,
        ids: Sequence[int] | np.ndarray,
        options: Options,
        *,
        costs: Costs,
        spell: Callable[[Sequence[int]], str] | None = None,
        hold: Holder | None = None,
        progress: Progress | None = None,
        resumed: Snapshot | None = None,
    ):
        """Check the arguments. Nothing is allocated or computed before `prefill_step`, `prefill`, `advance` or iteration.

        Args:
            ids: the prompt, T token ids.
            costs: called if `options.draft` is "auto".
            spell: converts the result's ids to text.
            hold: returns the state of an earlier continuation with a prefix of the prompt; called after all other checks.
            progress: called after each chunk of the prompt with the computed rows and the total. With it, the host waits for
                the device after each chunk.
            resumed: a continuation of this prompt that is continued by `max_new_tokens` tokens; `hold` then returns its state.

        Raises:
            InputError: as for `LanguageModel.generate`.
        """
        self._model, self._options, self._costs, self._spell, self._progress = model, options, costs, spell, progress
        require_drafter(model, options)
        self._drafter = model.drafter(options.drafter)
        self.prompt_ids = model.checked(ids)
        room = model.config.max_context - len(self.prompt_ids)
        if room < 1:
            raise InputError(
                f"prompt has {len(self.prompt_ids)} tokens, all that the model's context of {model.config.max_context} holds"
            )
        given = resumed.given if resumed else 0
        self._max_count = min(given + options.max_new_tokens, room)
        capacity = capacity_for(len(self.prompt_ids) + self._max_count, model.config.max_context)
        self._state = hold(self.prompt_ids, capacity) if hold else None
        self._capacity = self._state.tokens.shape[1] if self._state else capacity
        self.finish_reason, self._overtaken = "interrupted", False
        self._began, self._seconds = time.perf_counter(), resumed.seconds if resumed else 0.0
        self._ready_to_run, self._token_seconds = False, 0.0
        self._host = HostCopy(model.max_draft)
        if resumed and self._state:
            self._host.read(self._state)
        computed = self._host.tokens[: min(self._host.count - self._host.stopped, self._max_count)]
        self.ids, self._ready = computed[:given], computed[given:]
        there = int(self._state.cache.length[0]) if self._state else 0
        self._rows = max(len(self.prompt_ids) - 1 - there, 0)
        self._plan_calls(there)

    def _plan_calls(self, there: int) -> None:
        """Plan the calls that append the prompt: start, width and real rows of each. The cache has the first `there` rows.

        All tokens except the last are appended; the first decode step appends the last one.
        """
        model, missing = self._model, self._rows
        held = model.nbytes + nbytes(model.state_shapes(self._capacity, self._drafter)) if missing else 0
        chunk = self._options.chunk or (chunk_here(model.config, self._capacity, held) if missing else 1)
        planned = chunks(missing, missing, chunk, buckets_here() if missing else PREFILL)
        self._calls = [(there + offset, width, count) for offset, width, count in planned]
        self._done = 0

    @property
    def state(self) -> DecodeState:
        """State of the loop. The next call of `advance` or `prefill_step` donates its buffers."""
        return self._prepared()

    @property
    def snapshot(self) -> Snapshot:
        """Snapshot of the continuation. The next call of `advance` donates its buffers."""
        return Snapshot(self.prompt_ids, self.state, len(self.ids), self._seconds)

    def overtake(self) -> None:
        """Another continuation takes over the cache. This one can no longer be advanced."""
        self._overtaken = True

    def prefill(self) -> None:
        """Append the complete prompt to the cache."""
        while self.prefill_step()[1]:
            pass

    def prefill_step(self) -> tuple[int, int]:
        """Append the prompt's next chunk to the cache. A caller may do other work between chunks, or stop.

        Returns:
            Appended rows and remaining rows of the prompt.

        Raises:
            InputError: a later continuation of the session has the cache, or the cache was lost.
        """
        self._require_cache()
        state = self._prepared()
        if self._calls:
            start, width, count = self._calls[0]
            (program,) = wait([self._prefill_program(width)])
            ids, following = padded(self.prompt_ids, start, width), padded(self.prompt_ids, start + 1, width)
            with self._model.exchange.alone:
                cache, drafting = program(self._model.arrays, state.cache, state.drafting, ids, following, np.int32(count))
            self._state = dataclasses.replace(state, cache=cache, drafting=drafting)
            self._done += count
            del self._calls[0]
            if self._progress:
                jax.block_until_ready(cache.length)
                self._progress(self._done, self._rows)
        return self._done, self._rows - self._done

    def _prepared(self) -> DecodeState:
        """Allocate the state and the loop's arguments, compile the prompt's programs, and start compiling the loop."""
        if self._ready_to_run and self._state:
            return self._state
        model, options, last, most = self._model, self._options, int(self.prompt_ids[-1]), self._max_count
        depth: int = AUTO if options.draft == "auto" else model.max_draft if options.draft is None else int(options.draft)
        costs = self._costs(self._capacity) if depth == AUTO else (1.0,) * (1 + model.max_draft)
        stop_id = NO_STOP if options.ignore_eos else model.config.eos_id
        # Copy to the device once, because each call of the loop reads them.
        numbers = _int32([depth]), np.array(costs, np.float32), _int32([most]), _int32([[stop_id]])
        depths, costs_on_device, maximum, stop_ids = jax.device_put(numbers)
        self._policy, self._limits = Policy(depths, costs_on_device), Limits(maximum, maximum, stop_ids)
        self._filters = _filters(options.sampling)
        if self._state is None:
            self._state = model.state(self._capacity, last, self._drafter)
        elif self._host.count == 0:
            self._state = dataclasses.replace(self._state, last=jax.device_put(_int32([last])))
        self._compile_all()
        self._ready_to_run = True
        return self._state

    def _key(self) -> tuple[Any, ...]:
        return self._model.program_key(self._capacity, self._drafter, strict=self._options.strict)

    def _compile_all(self) -> None:
        """Compile the prompt's programs, and start compiling the loop at the same time.

        Python runs one thread at a time, so the prompt's programs, which are needed first, are lowered first.
        """
        prompt = [self._prefill_program(width) for width in sorted({width for _, width, _ in self._calls})]
        self._loop = begin(self._key(), self._lower_loop)
        wait(prompt)

    def _prefill_program(self, width: int) -> Future[Any]:
        return begin((*self._key(), width), functools.partial(self._lower_prefill, width))

    def _lower_prefill(self, width: int) -> jax.stages.Lowered:
        model, drafter = self._model, self._drafter
        state = model.state_shapes(self._capacity, drafter)
        return decode.lower_prefill(model.graph, model.arrays, state, width, drafter=drafter, strict=self._options.strict)

    def _lower_loop(self) -> jax.stages.Lowered:
        model, drafter = self._model, self._drafter
        state = model.state_shapes(self._capacity, drafter)
        return decode.lower_run(
            model.graph, model.arrays, state, self._limits, self._filters, self._policy,
            drafter=drafter, max_draft=model.max_draft, strict=self._options.strict,
        )  # fmt: skip

    def _require_cache(self) -> None:
        """Raises: InputError: another continuation has the cache, or it was lost."""
        if self._overtaken:
            raise InputError("this continuation was overtaken by a later one of its session; advance that one")
        if self._state and self._state.cache.length.is_deleted():
            raise InputError("this continuation's cache is gone, lost to a Ctrl-C; stream its prompt again")

    def advance(self, budget: int) -> list[int]:
        """Generate at most `budget` more tokens and return them. An empty list means that the continuation has ended.

        A step may commit more tokens than requested. The next call returns these first, so the tokens do not depend on the
        budgets.

        Raises:
            InputError: a later continuation of the session has the cache, or the cache was lost.
            ExchangeError: devices lost what they sent each other.
        """
        budget = bounds.BUDGET.checked("budget", budget)
        if self.finish_reason != "interrupted" or budget < 1:
            return []
        self._require_cache()
        if len(self._ready) < budget:
            self._run(budget - len(self._ready))
        new, self._ready = self._ready[:budget], self._ready[budget:]
        self.ids += new
        if not self._ready:
            if self._host.stopped and len(self.ids) == self._host.count - 1:
                self.finish_reason = "stop"
            elif self._host.count >= self._max_count:
                self.finish_reason = "length"
        return new

    def unread(self, count: int) -> None:
        """Put the last `count` tokens back. The next calls return them again."""
        if count:
            self.ids, self._ready = self.ids[:-count], self.ids[-count:] + self._ready
            self.finish_reason = "interrupted"

    def _run(self, budget: int) -> None:
        """Bring `_ready` up by `budget` tokens, or by what there is until the end."""
        host = self._host
        if host.count >= self._max_count or host.stopped:
            return
        self.prefill()
        # Neither the prompt nor a program that is still compiled is time of the loop.
        jax.block_until_ready(self._prepared().cache.length)
        (program,) = wait([self._loop])
        began, counted = time.perf_counter(), host.count
        limits = dataclasses.replace(self._limits, budget=_on_device(min(budget, self._max_count - counted)))
        # Kept before it is read: a Ctrl-C while the device works must not lose the cache.
        with self._model.exchange.alone:
            self._state, report = program(self._model.arrays, self._state, limits, self._filters, self._policy)
        host.read(self._state, report)
        self._ready += host.tokens[counted : host.count - host.stopped]
        took = time.perf_counter() - began
        self._seconds += took
        # The first call of a process readies the program's memory.
        self._token_seconds = took / max(host.count - counted, 1) if counted else 0.0

    def __iter__(self) -> Iterator[list[int]]:
        # The first token is returned as soon as possible, the others in groups.
        budget = FIRST_BUDGET
        while self.finish_reason == "interrupted":
            new = self.advance(budget)
            budget = piece(self._token_seconds)
            if new:
                yield new

    def result(self) -> Result:
        """The result so far."""
        host = self._host
        return Result(
            prompt_ids=tuple(self.prompt_ids.tolist()),
            ids=tuple(self.ids),
            text=self._spell(self.ids) if self._spell else "",
            finish_reason=self.finish_reason,
            seconds=time.perf_counter() - self._began,
            tokens_per_second=host.count / self._seconds if self._seconds else 0.0,
            draft=self._model.max_draft if self._options.draft is None else self._options.draft,
            drafter=name_of(self._drafter),
            strict=self._options.strict,
            steps=host.steps,
            tokens_per_step=host.count / host.steps if host.steps else 0.0,
            tried=tuple(host.tried.tolist()),
            stood=tuple(host.stood.tolist()),
            decode_seconds=self._seconds,
            fingerprints=host.fingerprints[: len(self.ids) + (self.finish_reason == "stop")],
        )


@functools.lru_cache(256)
def _filters(sampling: Sampling) -> Filters:
    """The filters on the device, in the same buffers every time."""
    return beginning.filters([sampling])


@functools.lru_cache(256)
def _on_device(number: int) -> jax.Array:
    """The number as int32 [1], in the same device buffer every time."""
    return jax.device_put(_int32([number]))


def _int32(numbers: Sequence[Any]) -> np.ndarray:
    return np.array(numbers, np.int32)

"""One continuation: prefill, then the compiled loop in as many calls as its reader likes."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax import decode
from ds4jax.buckets import capacity_for, chunks, padded
from ds4jax.decode import DecodeState, Limits
from ds4jax.depth import AUTO, Policy
from ds4jax.drafter import Drafter, MTPDrafter
from ds4jax.errors import InputError
from ds4jax.prefill_plan import chunk_here
from ds4jax.sampling import Sampling
from ds4jax.startup import WAITED

if TYPE_CHECKING:
    from ds4jax.language_model import LanguageModel

STREAM_BUDGET = 8
FIRST_BUDGET = 1
NO_STOP = -1
MOST_DRAFTS = 4

Prompt = str | Sequence[int] | np.ndarray
# Prompt ids int32 [T] and the capacity they need, to a state whose cache holds the first of them; None for an empty cache.
Holder = Callable[[np.ndarray, int], DecodeState | None]
# Called with the prompt's rows that are computed and those that have to be.
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Result:
    """What `generate` returns.

    Attributes:
        prompt_ids, ids: the prompt's tokens and the new ones, without the stop token.
        text: the new tokens as text.
        finish_reason: "stop" (the model ended its text), "length" (the budget or the context ended it) or "interrupted".
        seconds: from the first prefill to the last token, compilation included.
        tokens_per_second: of the new tokens, over the decode loop alone.
        draft: drafts a step, or "auto".
        strict: whether products were float32 and free of Pallas kernels.
        steps: steps of the decode loop.
        tokens_per_step: committed tokens, the stop token included, for each step.
        acceptance: for each depth that was tried, how often the draft stood when those before it had.
        decode_seconds: in the decode loop, compilation included.
        fingerprints: uint32 [n, 2] for the new tokens and the stop token if there is one: sum and exclusive or over the bits of
            the logits that each was chosen from.
    """

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    finish_reason: str
    seconds: float
    tokens_per_second: float
    draft: int | str
    strict: bool
    steps: int
    tokens_per_step: float
    acceptance: tuple[float, ...]
    decode_seconds: float
    fingerprints: np.ndarray = dataclasses.field(repr=False, compare=False)

    @property
    def ms_per_step(self) -> float:
        """Milliseconds of the decode loop for each step."""
        return 1e3 * self.decode_seconds / self.steps if self.steps else 0.0


@dataclasses.dataclass(frozen=True)
class Options:
    """How to continue a prompt.

    Attributes:
        max_new_tokens: the most tokens to add.
        sampling: how tokens are chosen.
        ignore_eos: go on after the model has ended its text.
        strict: float32 products without Pallas kernels.
        draft: drafts a step, at most the model's `max_draft`; "auto" takes the depth that pays best; None takes the most.
        drafter: who drafts; the model's MTP block by default.
        chunk: tokens of the prompt that one call takes in at most; None plans it by the device's memory. Chunks of other sizes
            may differ in the last bits of what they compute.

    Raises:
        InputError: a number outside its range; the message names it.
    """

    max_new_tokens: int = 128
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    ignore_eos: bool = False
    strict: bool = False
    draft: int | str | None = None
    drafter: Drafter | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max-new-tokens is {self.max_new_tokens}; it must be at least 1")
        require_chunk(self.chunk)
        known = self.draft in (None, "auto") or (isinstance(self.draft, int) and 0 <= self.draft <= MOST_DRAFTS)
        if not known:
            raise InputError(f"draft is {self.draft!r}; it must be 0 to {MOST_DRAFTS} or auto")


def require_chunk(chunk: int | None) -> None:
    """Raises: InputError: no number of tokens for a call."""
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk is {chunk}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class _Told:
    """What the host knows of the loop's state, which is donated: gone while the loop runs, and after a Ctrl-C there."""

    count: int
    stopped: bool
    tokens: np.ndarray
    fingerprints: np.ndarray
    steps: int
    tried: np.ndarray
    stood: np.ndarray


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, or of what stands for them."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _wait(compiling: Sequence[concurrent.futures.Future]) -> None:
    """Two compile no faster than one. What went wrong there goes wrong again when the program is called."""
    began = time.perf_counter()
    concurrent.futures.wait(compiling)
    jax.monitoring.record_event_duration_secs(WAITED, time.perf_counter() - began)


def _read(state: DecodeState) -> _Told:
    """Copies: on a CPU an array without one is a view of the buffer that is given away."""
    acceptance = state.acceptance
    return _Told(
        int(state.count),
        bool(state.stopped),
        np.array(state.tokens),
        np.array(state.fingerprints),
        int(acceptance.steps),
        np.array(acceptance.tried),
        np.array(acceptance.stood),
    )


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Where a continuation is.

    Attributes:
        prompt_ids: int32 [T].
        state: the loop's; its tokens are those after the prompt.
        given: how many of these tokens their reader has.
        seconds: spent in the decode loop so far.
    """

    prompt_ids: np.ndarray
    state: DecodeState
    given: int
    seconds: float


class Generation:
    """One continuation in progress; iterating yields lists of new token ids until it ends.

    Attributes:
        prompt_ids: int32 [T].
        ids: the tokens after the prompt so far, without the stop token.
        finish_reason: "stop" or "length" once it has ended, "interrupted" before.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: Prompt,
        options: Options,
        hold: Holder | None = None,
        progress: Progress | None = None,
        resumed: Snapshot | None = None,
    ):
        """Take the prompt in.

        Args:
            hold: finds what an earlier continuation left of the prompt; it is asked once everything else is checked.
            progress: called when the device has done a chunk of the prompt, with the rows done and those to do; for this the
                host waits after each chunk, which it does not do otherwise.
            resumed: a continuation of this prompt that goes on, by `max_new_tokens` from where its reader is; `hold` then
                returns its state.

        Raises:
            InputError: as for `LanguageModel.generate`.
        """
        self._model, self._options, self._progress = model, options, progress
        self._check_draft()
        self._drafter = (options.drafter or MTPDrafter()) if model.max_draft else None
        self.prompt_ids = model.encode(prompt)
        room = model.config.max_context - len(self.prompt_ids)
        if room < 1:
            raise InputError(
                f"prompt has {len(self.prompt_ids)} tokens, all that the model's context of {model.config.max_context} holds"
            )
        given = resumed.given if resumed else 0
        self._most = min(given + options.max_new_tokens, room)
        capacity = capacity_for(len(self.prompt_ids) + self._most, model.config.max_context)
        held = hold(self.prompt_ids, capacity) if hold else None
        self._capacity = len(held.tokens) if held else capacity
        self._policy = self._choose_policy()
        self._filters = options.sampling.arrays()
        self._stop_ids = jnp.array([NO_STOP if options.ignore_eos else model.config.eos_id], jnp.int32)
        self.finish_reason = "interrupted"
        self._seconds = resumed.seconds if resumed else 0.0
        self._compiling: concurrent.futures.Future | None = None
        self._began = time.perf_counter()
        self._state = self._prefill(held)
        self._told = told = _read(self._state)
        computed = told.tokens[: min(told.count - told.stopped, self._most)].tolist()
        self.ids, self._ready = computed[:given], computed[given:]

    def _check_draft(self) -> None:
        model, draft = self._model, self._options.draft
        wanted = model.max_draft if draft is None else 1 if draft == "auto" else int(draft)
        name = model.path or "the model"
        # A loop that can draft learns from every token, at depth 0 too.
        if (wanted or model.max_draft) and not model.config.n_mtp and not self._options.drafter:
            raise InputError(f"{name}: mtp: {model.no_mtp}; drafting needs that block, so use draft 0 and max_draft 0")
        if wanted > model.max_draft:
            raise InputError(f"draft is {draft}, but {name} was opened with max_draft {model.max_draft}")

    def _choose_policy(self) -> Policy:
        model, options = self._model, self._options
        if options.draft == "auto":
            costs = model.step_costs(self._capacity, strict=options.strict, drafter=options.drafter)
            return Policy(jnp.int32(AUTO), jnp.asarray(costs, jnp.float32))
        depth = model.max_draft if options.draft is None else int(options.draft)
        return Policy(jnp.int32(depth), jnp.ones(1 + model.max_draft, jnp.float32))

    @property
    def state(self) -> DecodeState:
        """Where the loop is; the next call of `advance` gives its buffers away."""
        return self._state

    @property
    def snapshot(self) -> Snapshot:
        """Where the continuation is; the next call of `advance` gives its buffers away."""
        return Snapshot(self.prompt_ids, self._state, len(self.ids), self._seconds)

    def _prefill(self, held: DecodeState | None) -> DecodeState:
        """Everything but the prompt's last token goes into the cache, as far as it is not there; that one is the first step's."""
        model, last = self._model, int(self.prompt_ids[-1])
        state = held or decode.start(model.config, self._capacity, last, drafter=self._drafter, max_draft=model.max_draft)
        cache, drafting = state.cache, state.drafting
        there = int(cache.length[0])
        missing = len(self.prompt_ids) - 1 - there
        if missing < 0:
            return state
        chunk = self._options.chunk or chunk_here(model.config, self._capacity, nbytes((model.weights, state)))
        calls = list(chunks(missing, missing, chunk))
        self._compile_all(state, (width for _, width, _ in calls))
        for offset, width, count in calls:
            start = there + offset
            cache, drafting = decode.prefill(
                model.graph,
                model.weights,
                cache,
                drafting,
                padded(self.prompt_ids, start, width),
                padded(self.prompt_ids, start + 1, width),
                jnp.int32(count),
                drafter=self._drafter,
                strict=self._options.strict,
            )
            if self._progress:
                jax.block_until_ready(cache.length)
                self._progress(offset + count, missing)
        return dataclasses.replace(state, cache=cache, drafting=drafting, last=jnp.int32(last))

    def _compile_all(self, state: DecodeState, widths: Iterable[int]) -> None:
        """Compile the prompt's programs, and begin to compile the loop beside them.

        Python runs one thread at a time: the prompt's programs are lowered first, since they are needed first.
        """
        model, key = self._model, (self._capacity, self._options.strict, self._drafter)
        prompt = [model.ahead((*key, width), functools.partial(self._compile_prefill, state, width)) for width in set(widths)]
        if prompt:
            self._compiling = model.ahead(key, self._compile)
        _wait(prompt)

    def _compile_prefill(self, state: DecodeState, width: int) -> None:
        model, options = self._model, self._options
        decode.lower_prefill(model.graph, model.weights, state, width, drafter=self._drafter, strict=options.strict).compile()

    def _compile(self) -> None:
        """Compile the loop; nothing of its size is made."""
        model, drafter, deepest = self._model, self._drafter, self._model.max_draft
        start = functools.partial(decode.start, model.config, self._capacity, 0, drafter=drafter, max_draft=deepest)
        decode.lower_run(
            model.graph,
            model.weights,
            jax.eval_shape(start),
            Limits(jnp.int32(0), jnp.int32(0), self._stop_ids),
            self._filters,
            self._policy,
            drafter=drafter,
            max_draft=deepest,
            strict=self._options.strict,
        ).compile()

    def advance(self, budget: int) -> list[int]:
        """Generate at most `budget` more tokens and return them; an empty list means that the continuation has ended.

        A step may commit more than was asked for; what is left over is returned first the next time, so that the tokens do not
        depend on how they were asked for.
        """
        if self.finish_reason != "interrupted" or budget < 1:
            return []
        if len(self._ready) < budget:
            self._run(budget - len(self._ready))
        new, self._ready = self._ready[:budget], self._ready[budget:]
        self.ids += new
        if not self._ready:
            if self._told.stopped and len(self.ids) == self._told.count - 1:
                self.finish_reason = "stop"
            elif self._told.count >= self._most:
                self.finish_reason = "length"
        return new

    def unread(self, count: int) -> None:
        """Take the last `count` tokens back: the next ones are these again."""
        if count:
            self.ids, self._ready = self.ids[:-count], self.ids[-count:] + self._ready
            self.finish_reason = "interrupted"

    def _run(self, budget: int) -> None:
        """Bring `_ready` up by `budget` tokens, or by what there is until the end."""
        began = time.perf_counter()
        counted = self._told.count
        if counted >= self._most or self._told.stopped:
            return
        model, options = self._model, self._options
        if self._compiling is not None:
            _wait([self._compiling])
        limits = Limits(jnp.int32(min(counted + budget, self._most)), jnp.int32(self._most), self._stop_ids)
        # Kept before it is read: a Ctrl-C while the device works must not lose the cache.
        self._state = decode.run(
            model.graph,
            model.weights,
            self._state,
            limits,
            self._filters,
            self._policy,
            drafter=self._drafter,
            max_draft=model.max_draft,
            strict=options.strict,
        )
        self._told = told = _read(self._state)
        self._ready += told.tokens[counted : told.count - told.stopped].tolist()
        self._seconds += time.perf_counter() - began

    def __iter__(self) -> Iterator[list[int]]:
        # A reader waits for the first token alone; the others come several at a time.
        budget = FIRST_BUDGET
        while self.finish_reason == "interrupted":
            new = self.advance(budget)
            budget = STREAM_BUDGET
            if new:
                yield new

    def result(self) -> Result:
        """What has been generated so far."""
        tokenizer, told = self._model.tokenizer, self._told
        return Result(
            prompt_ids=tuple(self.prompt_ids.tolist()),
            ids=tuple(self.ids),
            text=tokenizer.decode(self.ids) if tokenizer else "",
            finish_reason=self.finish_reason,
            seconds=time.perf_counter() - self._began,
            tokens_per_second=told.count / self._seconds if self._seconds else 0.0,
            draft=self._model.max_draft if self._options.draft is None else self._options.draft,
            strict=self._options.strict,
            steps=told.steps,
            tokens_per_step=told.count / told.steps if told.steps else 0.0,
            acceptance=tuple(float(s / t) for s, t in zip(told.stood, told.tried, strict=True) if t),
            decode_seconds=self._seconds,
            fingerprints=told.fingerprints[: len(self.ids) + (self.finish_reason == "stop")],
        )

"""One continuation: prefill, then the compiled loop in as many calls as its reader likes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from ds4jax import cache as caches
from ds4jax.buckets import capacity_for, chunks, padded
from ds4jax.decode import DecodeState, extend, run
from ds4jax.errors import InputError
from ds4jax.sampling import Sampling

if TYPE_CHECKING:
    from ds4jax.language_model import LanguageModel

STREAM_BUDGET = 8
NO_STOP = -1

Prompt = str | Sequence[int] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Result:
    """What `generate` returns.

    Attributes:
        prompt_ids, ids: the prompt's tokens and the new ones, without the stop token.
        text: the new tokens as text.
        finish_reason: "stop" (the model ended its text), "length" (the budget or the context ended it) or "interrupted".
        seconds: from the first prefill to the last token, compilation included.
        tokens_per_second: of the new tokens, over the decode loop alone.
    """

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    finish_reason: str
    seconds: float
    tokens_per_second: float


class Generation:
    """One continuation in progress; iterating yields lists of new token ids until it ends.

    Attributes:
        prompt_ids: int32 [T].
        ids: the new tokens so far, without the stop token.
        finish_reason: "stop" or "length" once it has ended, "interrupted" before.
    """

    def __init__(
        self, model: LanguageModel, prompt: Prompt, max_new_tokens: int, sampling: Sampling, ignore_eos: bool, strict: bool
    ):
        if max_new_tokens < 1:
            raise InputError(f"max-new-tokens is {max_new_tokens}; it must be at least 1")
        self._model = model
        self._strict = strict
        self.prompt_ids = model.encode(prompt)
        room = model.config.max_context - len(self.prompt_ids)
        if room < 1:
            raise InputError(
                f"prompt has {len(self.prompt_ids)} tokens, all that the model's context of {model.config.max_context} holds"
            )
        self._goal = min(max_new_tokens, room)
        self._filters = sampling.arrays()
        self._stop_ids = jnp.array([NO_STOP if ignore_eos else model.config.eos_id], jnp.int32)
        self.ids: list[int] = []
        self.finish_reason = "interrupted"
        self._counted = 0
        self._seconds = 0.0
        self._began = time.perf_counter()
        self._state = self._prefill()

    def _prefill(self) -> DecodeState:
        """Everything but the prompt's last token goes into the cache; the loop's first step takes that one."""
        config, known = self._model.config, len(self.prompt_ids) - 1
        capacity = capacity_for(len(self.prompt_ids) + self._goal, config.max_context)
        cache = caches.empty(config, capacity)
        for start, width, count in chunks(known, known):
            cache, _, _ = extend(
                self._model.graph,
                self._model.weights,
                cache,
                padded(self.prompt_ids, start, width),
                padded(self.prompt_ids, start + 1, width),
                jnp.int32(count),
                jnp.int32(count),
                strict=self._strict,
                want_logits=False,
                want_mtp=False,
            )
        last = jnp.int32(self.prompt_ids[-1])
        return DecodeState(cache, last, jnp.zeros(capacity, jnp.int32), jnp.int32(0), jnp.array(False))

    def advance(self, budget: int) -> list[int]:
        """Generate at most `budget` more tokens and return them; an empty list means that the continuation has ended."""
        budget = min(budget, self._goal - self._counted)
        if self.finish_reason != "interrupted" or budget < 1:
            return []
        began = time.perf_counter()
        model = self._model
        self._state = run(
            model.graph, model.weights, self._state, jnp.int32(budget), self._stop_ids, self._filters, strict=self._strict
        )
        count, stopped = int(self._state.count), bool(self._state.stopped)
        new = np.asarray(self._state.tokens)[self._counted : count - stopped].tolist()
        self._seconds += time.perf_counter() - began
        self._counted = count
        self.ids += new
        if stopped:
            self.finish_reason = "stop"
        elif count == self._goal:
            self.finish_reason = "length"
        return new

    def __iter__(self) -> Iterator[list[int]]:
        while self.finish_reason == "interrupted":
            new = self.advance(STREAM_BUDGET)
            if new:
                yield new

    def result(self) -> Result:
        """What has been generated so far."""
        tokenizer = self._model.tokenizer
        return Result(
            prompt_ids=tuple(self.prompt_ids.tolist()),
            ids=tuple(self.ids),
            text=tokenizer.decode(self.ids) if tokenizer else "",
            finish_reason=self.finish_reason,
            seconds=time.perf_counter() - self._began,
            tokens_per_second=self._counted / self._seconds if self._seconds else 0.0,
        )

"""One request of an engine: what it asks for, and what came of it so far. The engine's thread writes, any other thread reads."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ds4jax.decode.masks import words
from ds4jax.engine.options import Result
from ds4jax.engine.slots import News
from ds4jax.engine.wish import Wish
from ds4jax.errors import InputError
from ds4jax.evaluation.logprobs import Scored
from ds4jax.text.stops import StopMatcher

if TYPE_CHECKING:
    from ds4jax.engine.loaded import Loaded


class Piece(NamedTuple):
    """What one call of the loop added to a reply.

    Attributes:
        ids: new tokens, without the stop token.
        text: the text that they complete; may be empty.
        logprobs: of these tokens, if the request asked for them.
    """

    ids: tuple[int, ...]
    text: str
    logprobs: tuple[Scored, ...] = ()


@dataclasses.dataclass(frozen=True)
class RequestResult(Result):
    """Result of a request, see `ds4jax.Result`; `finish_reason` may also be "cancelled".

    Attributes:
        seed: the seed of the drawn tokens; None at temperature 0.
        stop: the stop text that ended the reply, which `text` does not contain; None without one. `ids` contains its tokens.
        logprobs: log probabilities of the tokens at temperature 1, without filters and constraint, and of the most likely ones;
            None if the request did not ask for them.
        reused: rows of the prompt that came from the prefix cache.
        waited: seconds in the queue.
    """

    seed: int | None
    stop: str | None
    logprobs: tuple[Scored, ...] | None
    reused: int
    waited: float


class Request:
    """A submitted request. Iterating yields pieces as they come, until the reply ends.

    Attributes:
        prompt_ids: int32 [T].
        wish: what it asks for.
        reused: rows of the prompt that came from the prefix cache.
        attempts: how often it was started again because a call failed.
    """

    def __init__(
        self, model: Loaded, prompt_ids: np.ndarray, wish: Wish, *, drafter: str, strict: bool, wake: Callable[[], None]
    ):
        """Args: `drafter` and `strict` are the engine's, the first by name; `wake` is called after a cancellation."""
        self.prompt_ids, self.wish = prompt_ids, wish
        self.attempts = 0
        self._model, self._drafter, self._strict, self._wake = model, drafter, strict, wake
        self._pieces: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        self._hear: Callable[[], None] | None = None
        self._ended, self._cancelled = threading.Event(), False
        self._error: BaseException | None = None
        self._submitted = self._started = self._inserted = time.perf_counter()
        self._result: RequestResult | None = None
        # Tokens and characters that were passed on.
        self._given = 0, 0
        self.restart()

    def restart(self) -> None:
        """Forget the reply, to make it again. Pieces that were passed on are not repeated."""
        self.reused = 0
        self._ids: list[int] = []
        self._marks: list[np.ndarray] = []
        self._scores: list[Scored] = []
        self._text = ""
        self._spelled = self._model.tokenizer.stream() if self._model.tokenizer else None
        self._stops = StopMatcher(self.wish.stop_texts)
        self._steps, self._tried, self._stood = 0, np.zeros(0, np.int32), np.zeros(0, np.int32)

    def __iter__(self) -> Iterator[Piece]:
        while (piece := self._pieces.get()) is not None:
            yield piece
        # For the next iteration.
        self._pieces.put(None)
        if self._error:
            raise self._error

    def listen(self, hear: Callable[[], None]) -> None:
        """Let the engine's thread call `hear` whenever there are new pieces and at the end; it is called once here, too.

        It must neither wait nor raise.
        """
        self._hear = hear
        hear()

    def come(self) -> list[Piece]:
        """The pieces that have come since the last reading, without waiting for more."""
        found: list[Piece] = []
        with contextlib.suppress(queue.Empty):
            while (piece := self._pieces.get_nowait()) is not None:
                found.append(piece)
            self._pieces.put(None)
        return found

    def result(self, timeout: float | None = None) -> RequestResult:
        """Wait for the end of the reply.

        Args:
            timeout: maximum seconds to wait; None waits for any time.

        Raises:
            TimeoutError: the reply has not ended.
            Exception: what made the request fail.
        """
        self.wait(timeout)
        if self._error or self._result is None:
            raise self._error or RuntimeError("the request has no result")
        return self._result

    def cancel(self) -> None:
        """End the request between two calls of the device. The result holds what came before; `finish_reason` is "cancelled"."""
        self._cancelled = True
        self._wake()

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the end of the reply, at most `timeout` seconds.

        Raises:
            TimeoutError: the reply has not ended.
        """
        if not self._ended.wait(timeout):
            raise TimeoutError(f"the reply has not ended after {timeout} s")

    @property
    def made(self) -> int:
        """Number of new tokens so far."""
        return len(self._ids)

    @property
    def cancelled(self) -> bool:
        """Whether the request was cancelled."""
        return self._cancelled

    @property
    def done(self) -> bool:
        """Whether the reply has ended."""
        return self._ended.is_set()

    # What follows is called by the engine's thread alone.

    def start(self) -> None:
        """The request leaves the queue."""
        self._started = self._inserted = time.perf_counter()

    def inserted(self) -> None:
        """Its prompt is in the cache."""
        self._inserted = time.perf_counter()

    def receive(self, news: News) -> str:
        """Take in new tokens and pass them on. Returns the reason of the end, or "" before it; `end` ends the reply."""
        self._steps, self._tried, self._stood = news.steps, news.tried, news.stood
        reason = self._read(news)
        if not reason:
            self._pass_on()
        return reason

    def _pass_on(self) -> None:
        ids, text = tuple(self._ids[self._given[0] :]), self._text[self._given[1] :]
        if ids or text:
            self._pieces.put(Piece(ids, text, tuple(self._scores[self._given[0] :])))
            self._given = self._given[0] + len(ids), self._given[1] + len(text)
            if self._hear:
                self._hear()

    def _read(self, news: News) -> str:
        """Append tokens up to the end of the reply. Returns the reason of the end, or ""."""
        for i, token in enumerate(news.tokens):
            if news.stopped and i == len(news.tokens) - 1:
                self._marks.append(news.fingerprints[: i + 1])
                return "stop"
            self._ids.append(token)
            if news.scores and self.wish.logprobs is not None:
                self._scores.append(_scored(token, i, news.scores, self.wish.logprobs))
            self._text += self._stops.push(self._spelled.push([token]) if self._spelled else "")
            if self._stops.found is not None:
                self._marks.append(news.fingerprints[: i + 1])
                return "stop"
        self._marks.append(news.fingerprints)
        return "length" if len(self._ids) >= self.wish.max_new_tokens else ""

    def mask(self) -> np.ndarray | None:
        """The tokens that may follow, uint32 [ceil(V/32)]; None if all may.

        Raises:
            InputError: the constraint returned something else, or allows no token.
        """
        if self.wish.constraint is None:
            return None
        allowed = self.wish.constraint(tuple(self._ids))
        if allowed is None:
            return None
        vocabulary = self._model.config.vocab_size
        if getattr(allowed, "dtype", None) != np.uint32 or allowed.shape != (words(vocabulary),):
            raise InputError(f"constraint: it must return uint32 [{words(vocabulary)}] or None")
        if not np.unpackbits(np.ascontiguousarray(allowed).view(np.uint8), bitorder="little")[:vocabulary].any():
            raise InputError("constraint: it allows no token")
        return allowed

    def fail(self, error: BaseException) -> None:
        """The request cannot be completed."""
        self._error = error
        self._finish()

    def end(self, reason: str) -> None:
        """Pass on what is left, and complete the result: "stop", "length" or "cancelled"."""
        if self._stops.found is None:
            self._text += self._stops.push(self._spelled.flush() if self._spelled else "") + self._stops.flush()
        self._pass_on()
        now, wish = time.perf_counter(), self.wish
        decoding, count = now - self._inserted, len(self._ids)
        self._result = RequestResult(
            prompt_ids=tuple(self.prompt_ids.tolist()),
            ids=tuple(self._ids),
            text=self._text,
            finish_reason=reason,
            seconds=now - self._submitted,
            tokens_per_second=count / decoding if decoding and count else 0.0,
            draft=self._model.max_draft if wish.draft is None else wish.draft,
            drafter=self._drafter,
            strict=self._strict,
            steps=self._steps,
            tokens_per_step=count / self._steps if self._steps else 0.0,
            tried=tuple(self._tried.tolist()),
            stood=tuple(self._stood.tolist()),
            decode_seconds=decoding,
            fingerprints=np.concatenate([np.zeros((0, 2), np.uint32), *self._marks]),
            seed=wish.sampling.seed if wish.sampling.temperature > 0 else None,
            stop=self._stops.found,
            logprobs=None if wish.logprobs is None else tuple(self._scores),
            reused=self.reused,
            waited=self._started - self._submitted,
        )
        self._finish()

    def _finish(self) -> None:
        self._ended.set()
        self._pieces.put(None)
        if self._hear:
            self._hear()


def _scored(token: int, i: int, scores: tuple[np.ndarray, np.ndarray, np.ndarray], count: int) -> Scored:
    chosen, top, top_ids = (table[i] for table in scores)
    return Scored(token, float(chosen), tuple(zip(top_ids[:count].tolist(), top[:count].tolist(), strict=True)))

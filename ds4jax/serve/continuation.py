"""A text that goes on as it comes, for `/v1/completions`: perhaps with its prompt and the prompt's probabilities."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Sequence

import numpy as np

from ds4jax.decode.masks import BITS, words
from ds4jax.engine.options import digest
from ds4jax.engine.request import Piece, RequestResult
from ds4jax.evaluation.logprobs import Scored
from ds4jax.serve.errors import ApiError
from ds4jax.serve.merging import drained
from ds4jax.serve.runner import Job
from ds4jax.text.stops import StopMatcher
from ds4jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of a text, for its probabilities.

    Attributes:
        id: the token.
        offset: characters of the text before it.
        scored: its probability; None for the first token of a prompt.
    """

    id: int
    offset: int
    scored: Scored | None


@dataclasses.dataclass(frozen=True)
class TextPart:
    """What a text grew by."""

    text: str
    tokens: tuple[Token, ...] = ()


@dataclasses.dataclass(frozen=True)
class TextEnded:
    """A text that has ended.

    Attributes:
        text: with the prompt, if it is echoed.
        tokens: with the prompt's, if they are scored.
        finish: "stop" or "length".
        count: number of new tokens.
        fingerprint: a digest of the logits of all new tokens.
        result: the engine's; None if nothing was computed.
    """

    text: str
    tokens: tuple[Token, ...]
    finish: str
    count: int
    fingerprint: str
    result: RequestResult | None


def forcing(ids: Sequence[int], vocabulary: int) -> object:
    """A constraint that lets a reply to the first token say the others. So each gets the probability that it had."""

    def allowed(so_far: Sequence[int]) -> np.ndarray | None:
        if len(so_far) >= len(ids) - 1:
            return None
        found = np.zeros(words(vocabulary), np.uint32)
        token = ids[1 + len(so_far)]
        found[token // BITS] = np.uint32(1) << np.uint32(token % BITS)
        return found

    return allowed


class Continuation:
    """A text on its way. Read `parts` once; with the last one, which may be empty, `ended` is there.

    Attributes:
        job: the engine's request; None if nothing is computed.
        ids: the prompt.
        ended: None before the end.
    """

    def __init__(
        self, job: Job | None, ids: Sequence[int], tokenizer: Tokenizer | None, *, echo: str | None, scored: bool, limit: int,
        stop: Sequence[str], eos_id: int | None,
    ):  # fmt: skip
        """Start a text.

        Args:
            job: of all of `ids`, or, where the prompt is scored, of the first of them and forced to say the others.
            echo: the prompt's text; None to leave it out.
            scored: whether tokens are noted. With `echo` that includes the prompt's.
            limit: maximum number of new tokens.
            stop: texts that end it.
            eos_id: the token that ends it; None goes on behind it.
        """
        self.job, self.ids = job, ids
        self.ended: TextEnded | None = None
        self._echo, self._scored, self._limit, self._eos_id = echo, scored, limit, eos_id
        self._forced = len(ids) - 1 if echo is not None and scored else 0
        self._stream = tokenizer.stream() if tokenizer else None
        self._stops = StopMatcher(stop)
        self._text, self._seen, self._count = "", 0, 0
        self._tokens: list[Token] = []
        # A prompt that was given as text does not show its begin-of-sentence token.
        hidden = len(tokenizer.decode(ids)) - len(echo) if tokenizer and echo is not None else 0
        self._characters = -hidden

    async def parts(self) -> AsyncGenerator[TextPart, None]:
        """The parts of the text, until its end.

        Raises:
            Exception: what made the request fail.
        """
        if self._echo is not None:
            begun = (Token(int(self.ids[0]), 0, None),) if self._scored else ()
            if self._scored:
                self._spelled(int(self.ids[0]))
            yield self._grown(self._echo, begun)
        finish = ""
        if self.job is not None:
            async with contextlib.aclosing(self.job.pieces()) as pieces:
                async for piece in pieces:
                    part, finish = self._read(piece)
                    if part != TextPart(""):
                        yield part
                    if finish:
                        break
        result = await self.job.result() if self.job else None
        finish = self._reason(result, finish)
        rest = ""
        if self._stops.found is None:
            rest = self._stops.push(self._stream.flush() if self._stream else "") + self._stops.flush()
        last = self._grown(rest, ())
        self.ended = self._end(result, finish)
        yield last

    def _read(self, piece: Piece) -> tuple[TextPart, str]:
        """What a piece adds, and why the text ends with it, or ""."""
        texts: list[str] = []
        tokens: list[Token] = []
        finish = ""
        for i, token in enumerate(piece.ids):
            part, finish = self._pushed(token, piece.logprobs[i : i + 1])
            texts.append(part.text)
            tokens += part.tokens
            if finish:
                break
        return TextPart("".join(texts), tuple(tokens)), finish

    def _spelled(self, token: int) -> str:
        text = self._stream.push([token]) if self._stream else ""
        self._characters += len(text)
        return text

    def _pushed(self, token: int, scored: Sequence[Scored]) -> tuple[TextPart, str]:
        """What a token adds, and why the text ends with it, or ""."""
        self._seen += 1
        offset = max(self._characters, 0)
        if self._seen > self._forced and token == self._eos_id:
            return TextPart(""), "stop"
        text = self._spelled(token)
        tokens = (Token(token, offset, scored[0]),) if scored else ()
        if self._seen <= self._forced:
            # Its text was echoed.
            return self._grown("", tokens), "length" if self._seen == self._forced and not self._limit else ""
        self._count += 1
        part = self._grown(self._stops.push(text), tokens)
        if self._stops.found is not None:
            return part, "stop"
        return part, "length" if self._count >= self._limit else ""

    def _grown(self, text: str, tokens: tuple[Token, ...]) -> TextPart:
        self._text += text
        self._tokens.extend(tokens)
        return TextPart(text, tokens)

    def _reason(self, result: RequestResult | None, cut: str) -> str:
        if cut or result is None:
            return cut or "length"
        if result.finish_reason == "cancelled":
            raise ApiError(503, "the reply was ended by the server", kind="server_error", code="cancelled")
        return result.finish_reason

    def _end(self, result: RequestResult | None, finish: str) -> TextEnded:
        ended_itself = finish == "stop" and self._stops.found is None
        marks = result.fingerprints[: self._seen + ended_itself] if result else np.zeros((0, 2), np.uint32)
        marks = marks[self._forced :]
        return TextEnded(self._text, tuple(self._tokens), finish, self._count, digest(marks), result)

    async def whole(self) -> TextEnded:
        """Wait for the end of the text.

        Raises:
            Exception: what made the request fail.
        """
        await drained(self.parts())
        assert self.ended is not None
        return self.ended

"""A reply of a conversation as it comes: reasoning, content and calls, and what became of it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncGenerator
from typing import Literal

from ds4jax.engine.options import digest
from ds4jax.engine.request import Piece, RequestResult
from ds4jax.evaluation.logprobs import Scored
from ds4jax.serve.conversation import Conversation
from ds4jax.serve.errors import ApiError
from ds4jax.serve.merging import drained
from ds4jax.serve.runner import Job
from ds4jax.text.parsed import Delta, End, Finish, ToolCall
from ds4jax.text.reply_parser import ReplyParser
from ds4jax.text.tokenizer import Tokenizer

# What ended a reply before the model did: a stop text, or a second call where one is wanted.
Cut = Literal["", "stop", "call"]


@dataclasses.dataclass(frozen=True)
class Part:
    """What some tokens added to a reply.

    Attributes:
        scored: probabilities of the tokens, if asked for.
    """

    delta: Delta
    scored: tuple[Scored, ...] = ()


@dataclasses.dataclass(frozen=True)
class Ended:
    """A reply that has ended.

    Attributes:
        reasoning: None if the prompt did not ask for reasoning.
        calls: whole calls.
        finish: "stop", "tool_calls" or "length".
        stop: the stop text that ended it; None without one.
        tokens, reasoning_tokens: numbers of new tokens, and of those in the reasoning.
        fingerprint: a digest of the logits of all tokens.
        scored: probabilities of all tokens, if asked for.
        result: the engine's.
    """

    reasoning: str | None
    content: str
    calls: tuple[ToolCall, ...]
    finish: Finish
    stop: str | None
    tokens: int
    reasoning_tokens: int
    fingerprint: str
    scored: tuple[Scored, ...]
    result: RequestResult


class Reply:
    """A reply on its way. Read `parts` once; with the last one, which may be empty, `ended` is there.

    Attributes:
        job: the engine's request.
        seed: of the drawn tokens.
        ended: None before the end.
    """

    def __init__(self, job: Job, asked: Conversation, tokenizer: Tokenizer, seed: int):
        self.job, self.seed = job, seed
        self.ended: Ended | None = None
        self._asked = asked
        self._parser = ReplyParser(
            tokenizer, think=asked.thinks, tools=asked.tools, tool_choice=asked.tool_choice, stop=asked.stop
        )
        self._tokens = self._reasoning_tokens = 0
        self._scored: list[Scored] = []
        self._given = 0

    async def parts(self) -> AsyncGenerator[Part, None]:
        """The parts of the reply, until its end.

        Raises:
            Exception: what made the request fail.
        """
        cut: Cut = ""
        async with contextlib.aclosing(self.job.pieces()) as pieces:
            async for piece in pieces:
                deltas, cut = self._read(piece)
                for delta, scored in deltas:
                    yield self._part(delta, scored)
                if cut:
                    break
        result = await self.job.result()
        if result.finish_reason == "cancelled" and not cut:
            raise ApiError(503, "the reply was ended by the server", kind="server_error", code="cancelled")
        # Of a call that is not wanted, nothing is shown.
        end: End = "length" if cut == "call" or (not cut and result.finish_reason == "length") else "eos"
        delta = self._parser.finish(end)
        self.ended = self._end(result, cut)
        yield self._part(Delta() if cut == "call" else delta, len(self._scored))

    def _read(self, piece: Piece) -> tuple[list[tuple[Delta, int]], Cut]:
        """What a piece adds, in as few deltas as possible, each with the number of tokens that are scored up to it."""
        deltas: list[tuple[Delta, int]] = []
        cut: Cut = ""
        for i, token in enumerate(piece.ids):
            self._reasoning_tokens += self._parser.reasons
            self._tokens += 1
            self._scored += piece.logprobs[i : i + 1]
            delta, cut = self._pushed(token)
            if delta != Delta():
                joined = deltas[-1][0].joined(delta) if deltas else None
                if joined:
                    deltas.pop()
                deltas.append((joined or delta, len(self._scored)))
            if cut:
                break
        return deltas, cut

    def _pushed(self, token: int) -> tuple[Delta, Cut]:
        """What a token adds, and whether the reply ends with it: by a stop text, or by a second call where one is wanted."""
        delta = self._parser.push([token])
        if not self._asked.parallel and any(call.index > 0 for call in delta.tool_calls):
            first = tuple(call for call in delta.tool_calls if call.index == 0)
            return dataclasses.replace(delta, tool_calls=first), "call"
        return delta, "" if self._parser.stops.found is None else "stop"

    def _part(self, delta: Delta, scored: int) -> Part:
        """A part, with the tokens up to the one of this number."""
        before, self._given = self._given, scored
        return Part(delta, tuple(self._scored[before:scored]))

    def _end(self, result: RequestResult, cut: Cut) -> Ended:
        parsed = self._parser.result()
        calls = tuple(call for call in parsed.tool_calls if call.complete)
        if not self._asked.parallel:
            calls = calls[:1]
        marks = result.fingerprints[: self._tokens] if cut else result.fingerprints
        return Ended(
            reasoning=parsed.reasoning,
            content=parsed.content,
            calls=calls,
            finish="tool_calls" if cut == "call" else parsed.finish,
            stop=self._parser.stops.found,
            tokens=self._tokens,
            reasoning_tokens=self._reasoning_tokens,
            fingerprint=digest(marks),
            scored=tuple(self._scored),
            result=result,
        )

    def require_sound(self) -> None:
        """Refuse to go on with a stream that has sent a call which turned out to be none.

        Raises:
            ApiError: a call was malformed.
        """
        if self._parser.malformed:
            raise ApiError(502, "the model wrote a malformed call", kind="server_error", code="malformed_tool_call")

    async def whole(self) -> Ended:
        """Wait for the end of the reply.

        Raises:
            Exception: what made the request fail.
        """
        await drained(self.parts())
        assert self.ended is not None
        return self.ended

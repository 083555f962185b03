"""Reads a streamed continuation for a screen: text in pieces, reasoning apart from the answer, stop texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from ds4jax.text.parsed import Delta, End
from ds4jax.text.reply_parser import ReplyParser
from ds4jax.text.stops import StopMatcher
from ds4jax.text.tokenizer import END_THINK, Tokenizer


class Piece(NamedTuple):
    """A piece of a streamed reply. `text` is never empty."""

    kind: Literal["reasoning", "answer"]
    text: str


class Reading:
    """Reads a continuation token by token until a stop text.

    A stop text ends only an answer. In the reasoning it has no effect.

    Attributes:
        ids: the tokens read so far, including the tokens of a stop text.
        reasoning, answer: the texts shown so far.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), *, chat: bool = False, think: bool = False):
        """Raises InputError for `chat` if the vocabulary has no chat markers."""
        self.ids: list[int] = []
        self.reasoning = self.answer = ""
        self._think = think
        self._end_think = tokenizer.marker_id(END_THINK) if chat else None
        self._plain = _PlainText(tokenizer, stops)
        self._source = ReplyParser(tokenizer, think=think, stop=stops) if chat else self._plain

    @property
    def stopped(self) -> bool:
        """Whether a stop text ended the continuation."""
        return self._source.stops.found is not None

    @property
    def stop(self) -> str:
        """The stop text that ended the continuation; "" before that."""
        return self._source.stops.found or ""

    @property
    def rest(self) -> str:
        """The text after the stop text, from the same token."""
        return self._source.stops.rest

    @property
    def reasons(self) -> bool:
        """Whether the reasoning has not ended yet."""
        return self._source.reasons

    @property
    def answer_ids(self) -> list[int]:
        """The answer's tokens so far."""
        if not self._think:
            # The prompt ends in this marker already.
            return self.ids[1:] if self.ids[:1] == [self._end_think] else list(self.ids)
        return self.ids[self.ids.index(self._end_think) + 1 :] if self._end_think in self.ids else []

    @property
    def text(self) -> str:
        """Reasoning, marker and answer so far, as one text."""
        ended = self._think and not self.reasons
        return self.reasoning + (END_THINK if ended else "") + self.answer

    def push(self, ids: Iterable[int]) -> Iterator[Piece]:
        """Read tokens and yield the text that they complete. Tokens after a stop text are not read."""
        for i in ids:
            if self.stopped:
                return
            self.ids.append(i)
            yield from self._passed(self._source.push([i]))

    def skip(self, ids: Iterable[int], unshown: str = "") -> Iterator[Piece]:
        """Skip tokens of an earlier plain text. A character that begins in them and ends in a later token is still read.

        Args:
            unshown: the end of the earlier text that was not shown; it is yielded first.
        """
        yield from self._passed(self._plain.skip(ids, unshown))

    def flush(self) -> Iterator[Piece]:
        """Yield the remaining text at the end."""
        yield from self._passed(self._source.finish("eos"))

    def _passed(self, delta: Delta) -> Iterator[Piece]:
        self.reasoning += delta.reasoning
        self.answer += delta.content
        if delta.reasoning:
            yield Piece("reasoning", delta.reasoning)
        if delta.content:
            yield Piece("answer", delta.content)


class _PlainText:
    """Text outside a conversation, read as `ReplyParser` reads a reply; all of it is content."""

    reasons = False

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        self.stops = StopMatcher(stops)
        self._text = tokenizer.stream()

    def push(self, ids: Iterable[int]) -> Delta:
        return Delta(content=self.stops.push(self._text.push(ids)))

    def skip(self, ids: Iterable[int], unshown: str) -> Delta:
        self._text.push(ids)
        return Delta(content=self.stops.push(unshown))

    def finish(self, end: End) -> Delta:
        return Delta(content=self.stops.push(self._text.flush()) + self.stops.flush())

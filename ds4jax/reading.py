"""A continuation as its reader meets it: text that comes in pieces, reasoning apart from the answer, ended by stop texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ds4jax.chat import Piece, ReplyStream
from ds4jax.stops import StopMatcher
from ds4jax.tokenizer import END_THINK, TextStream, Tokenizer


class Reading:
    """A continuation read token by token until a stop text.

    Stop texts end the answer only, never the reasoning before it.

    Attributes:
        ids: the tokens that were read, those of a stop text included.
        answer_ids: those of the answer.
        reasoning, answer: what was shown so far.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), *, chat: bool = False, think: bool = False):
        """Raises: InputError, `chat` with a vocabulary that has no markers."""
        self.ids: list[int] = []
        self.reasoning = self.answer = ""
        self._stops = StopMatcher(stops)
        self._think = think
        self._reply: ReplyStream | _PlainStream = _PlainStream(tokenizer.stream())
        if chat:
            self._reply = ReplyStream(tokenizer, think=think)

    @property
    def stopped(self) -> bool:
        """Whether a stop text ended it."""
        return self._stops.found is not None

    @property
    def answer_ids(self) -> list[int]:
        """The tokens of the answer so far."""
        return self._reply.answer_ids

    @property
    def text(self) -> str:
        """All that was read, with the marker between reasoning and answer."""
        ended = self._think and self._reply.kind == "answer"
        return self.reasoning + (END_THINK if ended else "") + self.answer

    def push(self, ids: Iterable[int]) -> Iterator[Piece]:
        """The text that these tokens set free; none of those after a stop text is read."""
        for i in ids:
            if self.stopped:
                return
            self.ids.append(i)
            yield from self._passed(self._reply.push([i]))

    def skip(self, ids: Iterable[int]) -> None:
        """Take tokens as read before: they are not part of this reading, but the character that they end in may be."""
        self._reply.push(list(ids))

    def flush(self) -> Iterator[Piece]:
        """What was held back, at the end."""
        yield from self._passed(self._reply.flush())
        rest = self._stops.flush()
        self.answer += rest
        if rest:
            yield Piece("answer", rest)

    def _passed(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for kind, text in pieces:
            if kind == "reasoning":
                self.reasoning += text
                yield Piece(kind, text)
                continue
            shown = self._stops.push(text)
            self.answer += shown
            if shown:
                yield Piece(kind, shown)


class _PlainStream:
    """Text without a conversation, all of it an answer."""

    kind = "answer"

    def __init__(self, text: TextStream):
        self.answer_ids: list[int] = []
        self._text = text

    def push(self, ids: list[int]) -> list[Piece]:
        self.answer_ids += ids
        return [Piece("answer", self._text.push(ids))]

    def flush(self) -> list[Piece]:
        return [Piece("answer", self._text.flush())]

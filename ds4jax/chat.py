"""Conversations as V4 reads them, and its replies taken apart into reasoning and answer.

The format is that of the published model (the project's gguf.md, section 3):

    BOS [effort prefix] system texts <｜User｜> text <｜Assistant｜> <think> or </think>

Earlier replies stand as `</think>`, answer, EOS: their reasoning is dropped. Texts of a conversation are never parsed for markers
when they become token ids, so a user who types `<｜Assistant｜>` has typed those characters and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from ds4jax.errors import InputError
from ds4jax.tokenizer import ASSISTANT, BOS, END_THINK, EOS, THINK, USER

if TYPE_CHECKING:
    from ds4jax.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        role: "system", "user" or "assistant".
        content: the text, for an assistant the answer alone.
        reasoning: what an assistant thought before it answered, None where it did not think.
    """

    role: str
    content: str
    reasoning: str | None = None


class Piece(NamedTuple):
    """A piece of a reply as it comes; `text` is never empty."""

    kind: Literal["reasoning", "answer"]
    text: str


@dataclasses.dataclass(frozen=True)
class Reply:
    """A reply taken apart.

    Attributes:
        reasoning: None where the prompt did not ask for any.
        answer: "" where the reasoning never ended.
        answer_ids: the answer's token ids.
    """

    reasoning: str | None
    answer: str
    answer_ids: tuple[int, ...]


class _Part(NamedTuple):
    text: str
    is_marker: bool = False


def render(turns: Sequence[Turn], *, think: bool = False, effort_prefix: str = "") -> str:
    """The text of a conversation, ready for the model to reply; one that ends with an assistant's turn is closed by EOS.

    For people and tests: tokenise with `encode`, which keeps markers and texts apart.

    Args:
        turns: system turns first, then user and assistant turns.
        think: ask for reasoning. The reasoning of a last assistant turn is rendered only with it.
        effort_prefix: a text right after BOS that asks for more effort, with the blank line that should end it.

    Raises:
        InputError: no user turn, a role or an order of turns that the format does not have, reasoning of anyone but an
            assistant, or an effort prefix without `think`.

    Source: the project's gguf.md, section 3, without tools.
    """
    return "".join(part.text for part in _parts(turns, think, effort_prefix))


def encode(tokenizer: Tokenizer, turns: Sequence[Turn], *, think: bool = False, effort_prefix: str = "") -> list[int]:
    """Token ids of a conversation; arguments and result are those of `render`.

    Raises:
        InputError: as `render`, a vocabulary without the markers, or a text that is not valid Unicode.
    """
    return _ids(tokenizer, _parts(turns, think, effort_prefix))


def follow_up(tokenizer: Tokenizer, content: str, *, think: bool = False) -> list[int]:
    """Token ids from the end of an answer (its EOS) to the model's next reply, with a user's turn between.

    A conversation of which `prompt` (its `encode`d ids) has been answered by `answer_ids` goes on as
    `prompt[:-1] + [id of </think>] + answer_ids + follow_up(...)`. So a cache that holds `prompt[:-1]` serves again, and after a
    reply without reasoning one that also holds the answer.

    Raises:
        InputError: a vocabulary without the markers, or a text that is not valid Unicode.
    """
    return _ids(tokenizer, [_Part(EOS, True), *_question(content), *_opening(think)])


class ReplyStream:
    """Takes a reply apart while its ids come.

    With `think` everything before the first `</think>` token is reasoning and everything after it the answer; without, all of it
    is the answer. The token counts: the same characters spelled by other tokens are text, as in a reply about such markers.

    Attributes:
        kind: what the next id belongs to.
        answer_ids: the answer's token ids so far.
    """

    def __init__(self, tokenizer: Tokenizer, *, think: bool = False):
        """Raises: InputError, a vocabulary without the markers."""
        self.kind: Literal["reasoning", "answer"] = "reasoning" if think else "answer"
        self.answer_ids: list[int] = []
        self._end = tokenizer.marker_id(END_THINK)
        self._text = tokenizer.stream()

    def push(self, ids: Iterable[int]) -> list[Piece]:
        """The text that these ids complete, at most one piece of each kind; characters come whole."""
        ids = list(ids)
        pieces = []
        if self.kind == "reasoning":
            cut = ids.index(self._end) if self._end in ids else len(ids)
            ended, thought = cut < len(ids), self._text.push(ids[:cut])
            pieces.append(Piece("reasoning", thought + self._text.flush() if ended else thought))
            ids = ids[cut + 1 :]
            if ended:
                self.kind = "answer"
        self.answer_ids += ids
        pieces.append(Piece("answer", self._text.push(ids) if ids else ""))
        return [piece for piece in pieces if piece.text]

    def flush(self) -> list[Piece]:
        """What is left at the end: U+FFFD for a character that was never completed."""
        text = self._text.flush()
        return [Piece(self.kind, text)] if text else []


def split_reasoning(tokenizer: Tokenizer, ids: Iterable[int], *, think: bool = False) -> Reply:
    """Take a whole reply apart, its end token left out; `think` as the prompt had it.

    Raises:
        InputError: a vocabulary without the markers, or an id outside it.
    """
    stream = ReplyStream(tokenizer, think=think)
    pieces = [*stream.push(ids), *stream.flush()]
    reasoning, answer = ("".join(text for kind, text in pieces if kind == wanted) for wanted in ("reasoning", "answer"))
    return Reply(reasoning if think else None, answer, tuple(stream.answer_ids))


def _parts(turns: Sequence[Turn], think: bool, effort_prefix: str) -> list[_Part]:
    _check(turns, think, effort_prefix)
    systems = [turn.content for turn in turns if turn.role == "system" and turn.content]
    # One part: nothing separates the two, so tokens may reach from one into the other.
    parts = [_Part(BOS, True), _Part(effort_prefix + "\n\n".join(systems))]
    for i, turn in enumerate(turns):
        if turn.role == "user":
            parts += _question(turn.content)
        elif turn.role == "assistant":
            parts.append(_Part(ASSISTANT, True))
            if think and i == len(turns) - 1:
                parts += [_Part(THINK, True), _Part(turn.reasoning or "")]
            parts += [_Part(END_THINK, True), _Part(turn.content), _Part(EOS, True)]
    return parts if turns[-1].role == "assistant" else parts + _opening(think)


def _question(content: str) -> list[_Part]:
    return [_Part(USER, True), _Part(content)]


def _opening(think: bool) -> list[_Part]:
    return [_Part(ASSISTANT, True), _Part(THINK if think else END_THINK, True)]


def _ids(tokenizer: Tokenizer, parts: Iterable[_Part]) -> list[int]:
    ids = []
    for text, is_marker in parts:
        ids += [tokenizer.marker_id(text)] if is_marker else tokenizer.encode(text)
    return ids


def _check(turns: Sequence[Turn], think: bool, effort_prefix: str) -> None:
    if effort_prefix and not think:
        raise InputError("effort_prefix: it asks for reasoning, which think=False rules out; give one or the other")
    before = "system"
    for i, turn in enumerate(turns):
        if turn.role not in ROLES:
            raise InputError(f"turns[{i}]: role: {turn.role[:60]!r} is unknown; it must be one of {', '.join(ROLES)}")
        if turn.reasoning is not None and turn.role != "assistant":
            raise InputError(f"turns[{i}]: reasoning: only an assistant's turn has any; this one is of role {turn.role!r}")
        if turn.role == "system" and before != "system":
            raise InputError(f"turns[{i}]: role: a system turn after the first user turn; put it before that")
        if turn.role == "assistant" and before != "user":
            raise InputError(f"turns[{i}]: role: an assistant's turn must follow a user's")
        before = turn.role
    if before == "system":
        raise InputError("turns: there is no user turn to reply to; add one")

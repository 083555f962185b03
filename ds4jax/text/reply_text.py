"""The text of a reply, in which a marker's token is one character that no text holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ds4jax.text.tokenizer import DSML, END_THINK, THINK

if TYPE_CHECKING:
    from ds4jax.text.tokenizer import Tokenizer

# Lone surrogates: decoded UTF-8 never holds one, so a spelled marker cannot be mistaken for its token.
MARK, END_MARK, THINK_MARK = "\ud800", "\ud801", "\ud802"
_SPELLED = {MARK: DSML, END_MARK: END_THINK, THINK_MARK: THINK}
_TABLE = str.maketrans(_SPELLED)


def spelled(text: str) -> str:
    """The text as a client gets it, with markers spelled out."""
    return text.translate(_TABLE)


class ReplyText:
    """Decodes a reply as it arrives. A character comes when all of its bytes are there; a marker ends one that is incomplete."""

    def __init__(self, tokenizer: Tokenizer, *, tools: bool):
        """Start a reply.

        Args:
            tools: whether the marker of calls counts.

        Raises:
            InputError: the vocabulary has no chat markers.
        """
        counted = [END_MARK, THINK_MARK, *([MARK] if tools else [])]
        self.mark_of = {tokenizer.marker_id(_SPELLED[mark]): mark for mark in counted}
        self._text = tokenizer.stream()

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete."""
        return "".join(self._text.flush() + self.mark_of[i] if i in self.mark_of else self._text.push([i]) for i in ids)

    def flush(self) -> str:
        """The remaining text at the end: U+FFFD for an incomplete character."""
        return self._text.flush()

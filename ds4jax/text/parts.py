"""A prompt as markers and texts kept apart, so that a text that spells a marker never becomes one."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from ds4jax.errors import InputError
from ds4jax.text.tokenizer import DSML, END_THINK, THINK

if TYPE_CHECKING:
    from ds4jax.text.tokenizer import Tokenizer

_MARKERS = re.compile(f"({DSML}|{THINK}|{END_THINK})")


class Part(NamedTuple):
    """A marker, or a text that is never parsed for markers."""

    text: str
    is_marker: bool = False


def marker(text: str) -> Part:
    """The part of one marker."""
    return Part(text, True)


def template(text: str) -> list[Part]:
    """Parts of a text of the format itself: the markers of reasoning and of calls in it are markers."""
    return [Part(piece, bool(_MARKERS.fullmatch(piece))) for piece in _MARKERS.split(text) if piece]


def written(parts: Iterable[Part]) -> str:
    """The parts as one text."""
    return "".join(part.text for part in parts)


def ids(tokenizer: Tokenizer, parts: Iterable[Part]) -> list[int]:
    """Token ids of the parts. All text between two markers is encoded as one, so one token may span several texts.

    Raises:
        InputError: the vocabulary lacks a marker, or a text is not valid Unicode.
    """
    found: list[int] = []
    for is_marker, group in itertools.groupby(parts, key=lambda part: part.is_marker):
        if is_marker:
            found += [tokenizer.marker_id(part.text) for part in group]
        else:
            found += tokenizer.encode(written(group))
    return found


def valid(text: str, where: str) -> str:
    """The text, if tokens can encode it.

    Raises:
        InputError: it holds a lone surrogate; the message begins with `where`.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: character {error.start} is not valid Unicode; give UTF-8 text") from None
    return text

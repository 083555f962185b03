"""Tags of DeepSeek's markup for calls, read from a text that may end in the middle of one."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from ds4jax.text.reply_text import END_MARK, MARK, THINK_MARK

# The block's name, and the one that DeepSeek-V3.2 gave it.
BLOCKS = ("tool_calls", "function_calls")
INVOKE, PARAMETER = "invoke", "parameter"
OPENING, CLOSING = "<", "</"
# What a model may write in place of the marker inside a block: nothing, or the marker without one of its bars.
_INSTEAD = ("", "DSML｜", "｜DSML")

_END = re.compile(r"\s*>")
_NEXT = re.compile(r'\s+([a-z_]+)="')
_BLANK = re.compile(r"\s*\Z")
_NEXT_BEGUN = re.compile(r"\s*\Z|\s+[a-z_]+=?\Z")
_NO_VALUE = re.compile(f"[\r\n{MARK}{END_MARK}{THINK_MARK}]")

Partial = Literal["partial"]
PARTIAL: Partial = "partial"


class Tag(NamedTuple):
    """A whole tag.

    Attributes:
        closing: whether it is `</...>`.
        kind: one of `BLOCKS`, `INVOKE` or `PARAMETER`.
        attributes: value by name.
        end: index of the character behind it.
        marked: whether it holds the marker's token.
    """

    closing: bool
    kind: str
    attributes: dict[str, str]
    end: int
    marked: bool


class Form(NamedTuple):
    """The beginning of a tag: `OPENING` or `CLOSING`, and its kind."""

    bracket: str
    kind: str


OPEN_BLOCK = tuple(Form(OPENING, kind) for kind in BLOCKS)
OPEN_INVOKE, OPEN_PARAMETER = (Form(OPENING, INVOKE),), (Form(OPENING, PARAMETER),)
CLOSE_BLOCK = tuple(Form(CLOSING, kind) for kind in BLOCKS)
CLOSE_INVOKE, CLOSE_PARAMETER = (Form(CLOSING, INVOKE),), (Form(CLOSING, PARAMETER),)
CLOSERS = (*CLOSE_BLOCK, *CLOSE_INVOKE, *CLOSE_PARAMETER)
ALL = (*OPEN_BLOCK, *OPEN_INVOKE, *OPEN_PARAMETER, *CLOSERS)


def read_tag(text: str, start: int, forms: Sequence[Form], *, unmarked: bool = False) -> Tag | Partial | None:
    """The tag of one of these forms at a place of a text; `PARTIAL` where the text ends too early to tell.

    Args:
        start: index of the tag's `<`.
        unmarked: also take tags without the marker, or without one of its bars.
    """
    partial = False
    for head, form, marked in _heads(tuple(forms), unmarked):
        if text.startswith(head, start):
            return _rest(text, start + len(head), form, marked)
        partial = partial or (len(text) - start < len(head) and head.startswith(text[start:]))
    return PARTIAL if partial else None


@functools.cache
def _heads(forms: tuple[Form, ...], unmarked: bool) -> list[tuple[str, Form, bool]]:
    marks = (MARK, *_INSTEAD) if unmarked else (MARK,)
    return [(form.bracket + mark + form.kind, form, mark == MARK) for form in forms for mark in marks]


def _rest(text: str, at: int, form: Form, marked: bool) -> Tag | Partial | None:
    """The tag from behind its kind on."""
    opening = form.bracket == OPENING
    attributes: dict[str, str] = {}
    while not (end := _END.match(text, at)):
        found = _NEXT.match(text, at) if opening else None
        if found is None:
            return PARTIAL if (_NEXT_BEGUN if opening else _BLANK).match(text, at) else None
        name, start = found[1], found.end()
        quote = _closing_quote(text, start)
        if quote is None or isinstance(quote, str) or name in attributes:
            return quote if isinstance(quote, str) else None
        attributes[name] = text[start:quote]
        at = quote + 1
    return Tag(not opening, form.kind, attributes, end.end(), marked)


def _closing_quote(text: str, start: int) -> int | Partial | None:
    """The index of the quote that ends a value. A name may hold quotes: the one counts behind which the tag goes on."""
    stop = _NO_VALUE.search(text, start)
    limit = stop.start() if stop else len(text)
    at = text.find('"', start, limit)
    while at >= 0:
        if _END.match(text, at + 1) or _NEXT.match(text, at + 1):
            return at
        if _NEXT_BEGUN.match(text, at + 1):
            return PARTIAL
        at = text.find('"', at + 1, limit)
    return None if stop else PARTIAL

"""Finds where a block of calls begins in a text that is still being written."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Literal, NamedTuple

from ds4jax.text import tags
from ds4jax.text.block_reader import behind_blank
from ds4jax.text.tags import INVOKE, PARTIAL, Partial, Tag, read_tag

# Closing tags and empty blocks at the very end of a reply.
Noise = Literal["noise"]
NOISE: Noise = "noise"


class Opener(NamedTuple):
    """The beginning of a block up to the opening tag of its first call.

    Attributes:
        name: the called function.
        end: index of the character behind the tag.
        bare: whether the tag of the block is missing.
    """

    name: str
    end: int
    bare: bool


def find_opener(text: str, start: int, names: Collection[str], *, bare: bool, noise: bool) -> Opener | Noise | Partial | None:
    """What begins at a `<`: a block whose first call is of one of these functions, or noise up to the text's end.

    `PARTIAL` where the text ends too early to tell.

    Args:
        bare: also take a call without the tag of the block.
        noise: also take closing tags without a block, and a block without calls.
    """
    # The end of a block that is text must be seen whole.
    closers = tags.CLOSERS if noise else tags.CLOSE_BLOCK
    tag = read_tag(text, start, (*tags.OPEN_BLOCK, *(tags.OPEN_INVOKE if bare else ()), *closers))
    if not isinstance(tag, Tag):
        return tag
    if tag.closing:
        return _noise(text, tag.end) if noise else None
    if tag.kind == INVOKE:
        return _opener(tag, names, bare=True)
    at = behind_blank(text, tag.end)
    if at == len(text):
        return PARTIAL
    inner = read_tag(text, at, (*tags.OPEN_INVOKE, *(tags.CLOSE_BLOCK if noise else ()))) if not tag.attributes else None
    if not isinstance(inner, Tag):
        return inner
    return _noise(text, inner.end) if inner.closing else _opener(inner, names, bare=False)


def quotes(text: str, start: int) -> bool | None:
    """Whether the tag at a `<`, which is shown as text, opens a block or closes it; None for neither."""
    tag = read_tag(text, start, (*tags.OPEN_BLOCK, *tags.CLOSE_BLOCK))
    return not tag.closing if isinstance(tag, Tag) else None


def places(text: str) -> Iterable[int]:
    """The indices of `<`."""
    return (match.start() for match in re.finditer("<", text))


def line_ends(text: str, end: int, *, cut: bool = False) -> int:
    """The index where up to two line ends before `end` begin. With `cut`, a last carriage return may be half of one."""
    for i in range(2):
        if text.endswith("\r\n", 0, end):
            end -= 2
        elif text.endswith("\n", 0, end) or (cut and i == 0 and text.endswith("\r", 0, end)):
            end -= 1
    return end


def _opener(tag: Tag, names: Collection[str], *, bare: bool) -> Opener | None:
    name = tag.attributes.get("name")
    return Opener(name, tag.end, bare) if name is not None and name in names and len(tag.attributes) == 1 else None


def _noise(text: str, at: int) -> Noise | Partial | None:
    """Whether nothing but closing tags follows."""
    while (at := behind_blank(text, at)) < len(text):
        tag = read_tag(text, at, tags.CLOSERS)
        if not isinstance(tag, Tag):
            return tag
        at = tag.end
    return NOISE

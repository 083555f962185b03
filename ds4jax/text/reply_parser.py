"""Takes replies apart into reasoning, content and tool calls as they come.

The marker's *tokens* count; the same characters spelled by other tokens are text. Whatever is not surely a call is shown as text,
and no call is ever made up. The result of a stream does not depend on how it is cut into pieces.

Source of the markup: `encoding/encoding_dsv4.py` of the V4-Flash checkpoint. It raises where a reply deviates; how such replies
are read is this project's choice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

from ds4jax.errors import InputError
from ds4jax.text.block_reader import BlockReader, behind_blank
from ds4jax.text.call_list import CallList
from ds4jax.text.openers import NOISE, Opener, find_opener, line_ends, places, quotes
from ds4jax.text.parsed import Delta, End, Finish, ParsedReply
from ds4jax.text.reply_text import END_MARK, THINK_MARK, ReplyText, spelled
from ds4jax.text.stops import StopMatcher
from ds4jax.text.tags import PARTIAL
from ds4jax.text.tokenizer import Tokenizer
from ds4jax.text.tools_block import functions

# What may follow a block in the reasoning: the end of the reasoning, and no answer.
_NO_ANSWER = re.compile(rf"\s*{END_MARK}?\s*")


class ReplyParser:
    """Takes a reply apart as it comes. The joined pieces are what `ds4jax.parse_reply` returns for the whole reply.

    A call is given out as it is written. If it then turns out to be none, `malformed` is set: a client that got a part of it must
    get an error. `result` does not have the call, but its markup as content.

    Attributes:
        reasons: whether the reasoning has not ended.
        malformed: whether a call that was given out is none.
        stops: the matcher of the stop texts; `stops.found` is the one that ended the content.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        think: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        stop: Sequence[str] = (),
    ):
        """Arguments and errors are as in `ds4jax.parse_reply`."""
        self._functions = {one["name"]: one.get("parameters") for one in functions(tools, tool_choice)}
        self._text = ReplyText(tokenizer, tools=bool(self._functions))
        self.reasons = think
        self.malformed = False
        self.stops = StopMatcher(stop)
        self._reasoning: list[str] | None = [] if think else None
        self._content: list[str] = []
        self._calls = CallList()
        self._finish: Finish | None = None
        # Text that is not given out yet, and whether it begins the reply, a line, or what follows a block.
        self._buffer = ""
        self._begins_reply = self._begins_line = True
        self._behind_block = False
        # Whether the beginning of a block was shown as text, and its closing tag was not.
        self._quoted = False
        # The block that is being read, and whether the last one was closed. Of a block that may still turn out to be text: all
        # its text, the index of its `<` there, and the text behind it.
        self._block: BlockReader | None = None
        self._closed = False
        self._held: str | None = None
        self._held_at = 0
        self._tail = ""

    def push(self, ids: Iterable[int]) -> Delta:
        """What these token ids add."""
        self._buffer += self._text.push(ids)
        return self._run(None)

    def finish(self, end: End = "eos") -> Delta:
        """The remaining text at the end of the reply; `end` as in `ds4jax.parse_reply`."""
        if end not in get_args(End):
            raise InputError(f"end: {str(end)[:60]!r} is unknown; it must be one of {', '.join(get_args(End))}")
        self._buffer += self._text.flush()
        delta = self._run(end)
        complete = self._calls.any_complete()
        if self.stops.found is None and end == "length" and not (complete and self._closed):
            self._finish = "length"
        else:
            self._finish = "tool_calls" if complete else "stop"
        return delta

    def result(self) -> ParsedReply:
        """The reply so far. Before `finish`, its `finish` is "length"."""
        reasoning = None if self._reasoning is None else "".join(self._reasoning)
        return ParsedReply(reasoning, "".join(self._content), self._calls.calls(), self._finish or "length")

    def _run(self, end: End | None) -> Delta:
        before = len(self._reasoning or ()), len(self._content)
        while self.stops.found is None and self._step(end):
            pass
        if self.stops.found is None and end:
            self._content.append(self.stops.flush())
        elif self.stops.found is not None:
            self.stops.rest += spelled(self._buffer)
            self._buffer = ""
        reasoning, content = (self._reasoning or [])[before[0] :], self._content[before[1] :]
        return Delta("".join(reasoning), "".join(content), self._calls.new())

    def _step(self, end: End | None) -> bool:
        """Read on. Returns whether there may be more to read without more text."""
        if self._block and self.reasons:
            return self._block_in_reasoning(self._block, end)
        if self._block:
            return self._block_in_content(self._block, end)
        if not self._buffer:
            return False
        if self._begins_reply and self._buffer[0] == (THINK_MARK if self.reasons else END_MARK):
            # The prompt ends in this marker already.
            self._buffer = self._buffer[1:]
        self._begins_reply = False
        return self._read_reasoning(end) if self.reasons else self._read_content(end)

    # Reasoning.

    def _read_reasoning(self, end: End | None) -> bool:
        limit = self._buffer.find(END_MARK)
        text, ended = (self._buffer[:limit], True) if limit >= 0 else (self._buffer, False)
        final = ended or end is not None
        for at in places(text) if self._functions else ():
            if not (text[at - 1] == "\n" if at else self._begins_line):
                continue
            found = find_opener(text, at, self._functions, bare=False, noise=False)
            if found is None or (found == PARTIAL and final):
                continue
            start = line_ends(text, at)
            self._think(text[:start])
            self._buffer = self._buffer[start:]
            if isinstance(found, Opener):
                self._hold(found, self._buffer, at - start, found.end - start)
            return isinstance(found, Opener)
        keep = len(text) if final or not self._functions else line_ends(text, len(text), cut=True)
        self._think(text[:keep])
        self._buffer = self._buffer[keep + ended :]
        if ended:
            self.reasons, self._begins_line = False, True
        return ended

    def _think(self, text: str) -> None:
        if text and self._reasoning is not None:
            self._reasoning.append(spelled(text))
            self._begins_line = text.endswith("\n")

    def _block_in_reasoning(self, block: BlockReader, end: End | None) -> bool:
        """Hold a block until it is known whether it ends the reply, and so is a call."""
        new, self._buffer = self._buffer, ""
        self._held = (self._held or "") + new
        if block.reading:
            limit = new.find(END_MARK)
            block.push(new if limit < 0 else new[:limit])
            if block.reading and limit < 0 and end is None:
                return False
            new = block.rest + ("" if limit < 0 else new[limit:])
        self._tail += new
        if block.state != "closed" or not _NO_ANSWER.fullmatch(self._tail) or end == "length":
            self._release(self._think)
            return True
        if end == "eos":
            self._held, self._block, self.reasons, self._closed = None, None, False, True
            self._calls.take(block.events)
        return False

    # Blocks that may be text.

    def _hold(self, opener: Opener, text: str, at: int, end: int) -> None:
        """Read a block that may still turn out to be text.

        Args:
            text: with the line ends before the block.
            at, end: indices of the block's `<` and of the character behind the opener.
        """
        self._block = BlockReader(self._functions, opener.name, "")
        self._held, self._held_at, self._tail = text[:end], at, ""
        self._buffer = text[end:]

    def _release(self, give: Callable[[str], None]) -> None:
        """Give out the `<` of a block that is text; what follows it is read again."""
        text = (self._held or "") + self._buffer
        self._held, self._block = None, None
        give(text[: self._held_at + 1])
        self._buffer = text[self._held_at + 1 :]

    # Content.

    def _read_content(self, end: End | None) -> bool:
        text = self._buffer
        if not self._functions:
            self._answer(text)
            self._buffer = ""
            return False
        visible = behind_blank(text) if self._behind_block else -1
        if visible == len(text):
            return False
        for at in places(text):
            found = self._opener_at(text, at)
            if found is None or (found == PARTIAL and end is not None):
                quoted = quotes(text, at)
                self._quoted = self._quoted if quoted is None else quoted
                continue
            # Whitespace between two blocks is nothing, and so are two line ends before one.
            start = 0 if at == visible else line_ends(text, at)
            self._answer(text[:start])
            self._buffer = text[start:]
            if at != visible and self.stops.completes(text[start:at]):
                self._answer(text[start:at])
                self._buffer = text[at:]
                return False
            if not isinstance(found, Opener):
                if found == NOISE and end is not None:
                    self._buffer = ""
                return False
            self._open(found, self._buffer, at - start, found.end - start)
            return True
        keep = len(text) if end is not None else line_ends(text, len(text), cut=True)
        self._answer(text[:keep])
        self._buffer = text[keep:]
        if self.stops.completes(self._buffer):
            self._answer(self._buffer)
            self._buffer = ""
        return False

    def _opener_at(self, text: str, at: int) -> Any:
        begins_line = text[at - 1] == "\n" if at else self._begins_line
        return find_opener(text, at, self._functions, bare=begins_line and not self._quoted, noise=not self._quoted)

    def _open(self, opener: Opener, text: str, at: int, end: int) -> None:
        """Begin a block of calls behind the content; arguments as in `_hold`."""
        self._closed = False
        if opener.bare:
            self._hold(opener, text, at, end)
            return
        self._content.append(self.stops.flush())
        self._block = BlockReader(self._functions, opener.name, text[:end])
        self._buffer = text[end:]

    def _answer(self, text: str) -> None:
        if text:
            self._content.append(self.stops.push(spelled(text)))
            self._begins_line, self._behind_block = text.endswith("\n"), False

    def _block_in_content(self, block: BlockReader, end: End | None) -> bool:
        new, self._buffer = self._buffer, ""
        block.push(new)
        if self._held is not None:
            self._held += new
            if not any(event.kind == "end" for event in block.events):
                # A call without the tag of its block is given out when it is whole.
                if block.reading and end is None:
                    return False
                self._release(self._answer)
                self._quoted = True
                return True
            self._held = None
            self._content.append(self.stops.flush())
        self._calls.take(block.events)
        if block.reading and end is None:
            return False
        self._block = None
        if block.state == "closed":
            self._closed = self._behind_block = self._begins_line = True
            self._buffer = block.rest
        elif block.state == "left":
            self._quoted = True
            self._buffer = block.rest
        elif block.state == "broken" or (end == "eos" and block.state != "between"):
            self._calls.drop_last()
            self.malformed = self._quoted = True
            self._answer(block.markup)
            self._buffer = block.rest
        elif end == "eos" and not block.ends_within_closing:
            self._quoted = True
            self._buffer = block.rest
        return bool(self._buffer)

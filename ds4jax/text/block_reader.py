"""Reads a block of calls while the model writes it.

    <｜DSML｜tool_calls>
    <｜DSML｜invoke name="...">
    <｜DSML｜parameter name="..." string="true|false">...</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜tool_calls>

Source of the markup: `encoding/encoding_dsv4.py` of the V4-Flash checkpoint. Models also write what it refuses. That is read
where it has one meaning: other whitespace, tags without the marker, a JSON object in place of parameters, a call that the
block's closing tag ends. Anything else is no call; a wrong guess would be executed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from ds4jax.text import tags
from ds4jax.text.arguments import Arguments, parsed
from ds4jax.text.reply_text import spelled
from ds4jax.text.tags import INVOKE, PARAMETER, PARTIAL, Tag, read_tag

_VISIBLE = re.compile(r"\S")
_BODY = (*tags.OPEN_PARAMETER, *tags.CLOSE_INVOKE, *tags.CLOSE_BLOCK)
_BETWEEN = (*tags.OPEN_INVOKE, *tags.CLOSE_BLOCK)
_JSON_END = (*tags.CLOSE_INVOKE, *tags.CLOSE_BLOCK)


class Event(NamedTuple):
    """A call begins (its name), goes on (a piece of its arguments) or ends."""

    kind: Literal["call", "arguments", "end"]
    text: str = ""


class BlockReader:
    """Reads the calls of a block behind the opening tag of its first call.

    Attributes:
        events: what the calls have said so far; the owner takes them out.
        state: "call", "value", "json" or "between" while it reads; "closed" behind the block; "broken" where a call turned out to
            be none; "left" where something else than a call followed one.
        markup: all text of the call that is being read, spelled out; that of the broken call.
        rest: text that is not read yet. Behind a call that was left, it begins directly behind that call.
    """

    def __init__(self, functions: Mapping[str, Any], name: str, markup: str):
        """Begin with a first call.

        Args:
            functions: schema of the parameters by name of the function.
            name: the called function, one of them.
            markup: the text before.
        """
        self.events: list[Event] = []
        self.state: Literal["call", "value", "json", "between", "closed", "broken", "left"] = "call"
        self.rest = ""
        self._functions = functions
        self._begin(name, markup)

    @property
    def markup(self) -> str:
        """All text of the call that is being read, spelled out."""
        return spelled("".join(self._markup))

    @property
    def ends_within_closing(self) -> bool:
        """Whether nothing but whitespace and the beginning of a closing tag is left."""
        at = behind_blank(self.rest)
        return at == len(self.rest) or read_tag(self.rest, at, tags.CLOSE_BLOCK, unmarked=True) == PARTIAL

    @property
    def reading(self) -> bool:
        """Whether more text may still be part of the block."""
        return self.state not in ("closed", "broken", "left")

    def push(self, text: str) -> None:
        """Read on."""
        self.rest += text
        steps = {"call": self._call, "value": self._read_value, "json": self._json, "between": self._between}
        while self.reading and steps[self.state]():
            pass

    def _begin(self, name: str, markup: str) -> None:
        self._markup = [markup]
        self._arguments = Arguments(self._functions[name])
        self._is_marked = True
        self._closed_early = False
        self._searched = 0
        self.state = "call"
        self.events.append(Event("call", name))

    def _take(self, end: int) -> str:
        text, self.rest = self.rest[:end], self.rest[end:]
        self._markup.append(text)
        return text

    def _say(self, arguments: str) -> None:
        if arguments:
            self.events.append(Event("arguments", arguments))

    def _break(self, at: int) -> bool:
        self._take(at)
        self.state = "broken"
        return False

    def _end_call(self, tag: Tag, arguments: str = "") -> bool:
        self._say(arguments or self._arguments.close())
        self.events.append(Event("end"))
        self._take(tag.end)
        self._markup = []
        self.state = "between" if tag.kind == INVOKE else "closed"
        return True

    def _call(self) -> bool:
        """Read a tag inside a call."""
        at = behind_blank(self.rest)
        if at == len(self.rest):
            return False
        if self.rest[at] == "{" and not self._arguments.names:
            self._take(at)
            self.state, self._searched = "json", 0
            return True
        tag = read_tag(self.rest, at, _BODY, unmarked=True)
        if tag == PARTIAL:
            return False
        if not isinstance(tag, Tag):
            return self._break(at)
        if tag.closing:
            return self._end_call(tag)
        name, string = tag.attributes.get("name"), tag.attributes.get("string")
        known = tag.attributes.keys() <= {"name", "string"} and string in (None, "true", "false")
        if name is None or not known or name in self._arguments.names:
            return self._break(at)
        self._take(tag.end)
        self._is_marked, self._closed_early = tag.marked, False
        self.state = "value"
        self._say(self._arguments.begin(name, string))
        return True

    def _read_value(self) -> bool:
        """Read a parameter's value up to its closing tag, as far as it is known to be the value."""
        forms = (*tags.CLOSE_PARAMETER, *(tags.OPEN_PARAMETER if self._closed_early else ()))
        at = self.rest.find("<")
        tag = read_tag(self.rest, at, forms, unmarked=True) if at >= 0 else None
        if at < 0 or tag == PARTIAL:
            self._value(len(self.rest) if at < 0 else at)
            return False
        if not isinstance(tag, Tag):
            self._value(at + 1)
            return True
        if not tag.closing:
            if tag.marked or not self._is_marked:
                return self._break(at)
            self._value(tag.end)
            return True
        ends = self._ends(tag)
        if ends is None:
            self._value(at)
            return False
        self._value(at if ends else tag.end)
        if ends:
            self._take(tag.end - at)
            self._say(self._arguments.end())
            self.state = "call"
        self._closed_early = not ends
        return True

    def _value(self, end: int) -> None:
        if end:
            self._say(self._arguments.add(spelled(self._take(end))))

    def _ends(self, closer: Tag) -> bool | None:
        """Whether a closing tag ends the value: if markup follows. Otherwise it is text; None where it is too early to tell."""
        at = behind_blank(self.rest, closer.end)
        if at == len(self.rest):
            return None
        following = read_tag(self.rest, at, tags.ALL, unmarked=True)
        if following == PARTIAL:
            return None
        if not isinstance(following, Tag):
            return False
        of_parameter = following.closing and following.kind == PARAMETER
        if following.marked:
            return closer.marked or not of_parameter
        # XML inside a value has such tags, too; a value that the marker opened needs the marker.
        return (closer.marked or not self._is_marked) and not of_parameter

    def _json(self) -> bool:
        """Read a JSON object in place of parameters; it is given out whole."""
        at = self.rest.find("<", self._searched)
        while at >= 0:
            tag = read_tag(self.rest, at, _JSON_END)
            if tag == PARTIAL:
                self._searched = at
                return False
            if isinstance(tag, Tag):
                body = spelled(self.rest[:at]).strip()
                if not isinstance(parsed(body), dict):
                    return self._break(at)
                return self._end_call(tag, body)
            at = self.rest.find("<", at + 1)
        self._searched = len(self.rest)
        return False

    def _between(self) -> bool:
        """Read what follows a call."""
        at = behind_blank(self.rest)
        if at == len(self.rest):
            return False
        tag = read_tag(self.rest, at, _BETWEEN, unmarked=True)
        if tag == PARTIAL:
            return False
        if isinstance(tag, Tag) and tag.closing:
            self._take(tag.end)
            self.state = "closed"
            return True
        name = tag.attributes.get("name") if isinstance(tag, Tag) else None
        if not isinstance(tag, Tag) or name is None or name not in self._functions or len(tag.attributes) > 1:
            self.state = "left"
            return False
        self._take(at)
        self._markup = []
        markup = self._take(tag.end - at)
        self._begin(name, markup)
        return True


def behind_blank(text: str, start: int = 0) -> int:
    """The index of the first character that is no whitespace."""
    found = _VISIBLE.search(text, start)
    return found.start() if found else len(text)

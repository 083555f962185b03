"""Arguments of a call as JSON text, written while the model writes the parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Parameters that models wrap all arguments in.
_WRAPPERS = ("arguments", "input")
_WORDS = {"true": "true", "false": "false", "null": "null", "none": "null"}
_TYPE_NAMES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object", type(None): "null"}


class Arguments:
    """Writes the arguments of one call. Every method returns the text to append.

    Strings are written as they come. Other values wait for their end, and so does a parameter that may hold all arguments.
    """

    def __init__(self, schema: Any):
        """Start a call.

        Args:
            schema: the function's JSON schema of its parameters; None without one.
        """
        properties = schema.get("properties") if isinstance(schema, dict) else None
        self._properties: Mapping[str, Any] = properties if isinstance(properties, dict) else {}
        self.names: list[str] = []
        self._written = 0
        self._is_string = self._waits = self._may_wrap = False
        self._value: list[str] = []

    def begin(self, name: str, string: str | None) -> str:
        """A parameter begins.

        Args:
            name: not in `names`.
            string: the attribute of that name, "true" or "false"; None without it.
        """
        before = self._plain() if self._may_wrap else ""
        types = _types(self._properties.get(name))
        self._is_string = string == "true" or (string is None and (types is None or "string" in types))
        self._may_wrap = not self.names and name in _WRAPPERS and name not in self._properties
        self._waits = self._may_wrap or not self._is_string
        self._value = []
        self.names.append(name)
        return before if self._waits else before + self._key() + '"'

    def add(self, text: str) -> str:
        """A piece of the parameter's value."""
        if not self._waits:
            return _escaped(text)
        self._value.append(text)
        return ""

    def end(self) -> str:
        """The parameter ends."""
        if not self._waits:
            return '"'
        return "" if self._may_wrap else self._plain()

    def close(self) -> str:
        """The call ends."""
        if self._may_wrap:
            value = "".join(self._value)
            inside = parsed(value)
            if isinstance(inside, dict) and inside.keys() <= self._properties.keys():
                return value
            return self._plain() + "}"
        return "}" if self.names else "{}"

    def _plain(self) -> str:
        """The waiting parameter, as it is."""
        self._may_wrap = False
        value = "".join(self._value)
        return self._key() + (f'"{_escaped(value)}"' if self._is_string else self._json(value))

    def _key(self) -> str:
        before = ", " if self._written else "{"
        self._written += 1
        return f"{before}{json.dumps(self.names[-1], ensure_ascii=False)}: "

    def _json(self, value: str) -> str:
        """A value that should be JSON: its text, or else a literal's word, or else a string."""
        if parsed(value) is not INVALID:
            return value
        types = _types(self._properties.get(self.names[-1]))
        word = _WORDS.get(value.strip().lower())
        if word is not None and not (types and "string" in types):
            return word
        return f'"{_escaped(value)}"'


INVALID = object()


def parsed(text: str) -> Any:
    """The value of a JSON text, numbers as 0; `INVALID` for any other text. NaN and infinities are not JSON."""
    try:
        # Numbers are never converted: their text is what counts, and long ones would be refused.
        return json.loads(text, parse_int=_zero, parse_float=_zero, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return INVALID


def _zero(text: str) -> int:
    return 0


def _refuse(text: str) -> None:
    raise ValueError(text)


def _escaped(text: str) -> str:
    """A piece of a JSON string: quotes, backslashes and control characters are escaped."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _types(schema: Any) -> frozenset[str] | None:
    """The JSON types that a schema allows; None where it does not say."""
    if not isinstance(schema, dict):
        return None
    named = schema.get("type")
    if isinstance(named, str):
        return frozenset((named,))
    if isinstance(named, list):
        return frozenset(one for one in named if isinstance(one, str))
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            parts = [_types(one) for one in schema[key]]
            return None if None in parts else frozenset().union(*(part for part in parts if part))
    values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema["const"]] if "const" in schema else []
    return frozenset(_TYPE_NAMES.get(type(value), "") for value in values) or None

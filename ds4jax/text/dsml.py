"""Calls and their results as a prompt shows them, in DeepSeek's markup.

Source: `encoding/encoding_dsv4.py` of the V4-Flash checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ds4jax.text.parts import Part, marker
from ds4jax.text.tokenizer import DSML


class Call(NamedTuple):
    """One call of an earlier reply.

    Attributes:
        id: its id, "" without one.
        arguments: value by parameter.
    """

    id: str
    name: str
    arguments: Mapping[str, Any]


def calls_block(calls: Sequence[Call]) -> list[Part]:
    """The block of calls at the end of a reply, with the blank line before it; nothing is escaped."""
    if not calls:
        return []
    parts = [Part("\n\n"), *_tag("tool_calls>\n")]
    for call in calls:
        parts += _tag(f'invoke name="{call.name}">\n')
        # A call without arguments leaves an empty line.
        parts += _parameters(call.arguments) or [Part("\n")]
        parts += _closing("invoke>\n")
    return [*parts, *_closing("tool_calls>")]


def result_text(text: str) -> str:
    """A call's result inside a user's turn."""
    return f"<tool_result>{text}</tool_result>"


def _parameters(arguments: Mapping[str, Any]) -> list[Part]:
    parts = []
    for name, value in arguments.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        parts += _tag(f'parameter name="{name}" string="{"true" if isinstance(value, str) else "false"}">{text}')
        parts += _closing("parameter>\n")
    return parts


def _tag(rest: str) -> list[Part]:
    return [Part("<"), marker(DSML), Part(rest)]


def _closing(rest: str) -> list[Part]:
    return [Part("</"), marker(DSML), Part(rest)]

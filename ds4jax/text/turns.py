"""The turns of a conversation, from its messages.

Source: `encoding/encoding_dsv4.py` of the V4-Flash checkpoint, which merges messages and sorts results in the same way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ds4jax.text.dsml import Call
from ds4jax.text.messages import Message
from ds4jax.text.tools_block import Functions


@dataclasses.dataclass(frozen=True)
class System:
    """A system text before the first turn; `functions` and `schema` are shown behind it."""

    text: str
    functions: Functions = ()
    schema: Any = None


@dataclasses.dataclass(frozen=True)
class UserTurn:
    """A user's turn.

    Attributes:
        texts: texts and results, in the order of the prompt.
        developer: a turn of DeepSeek's search agent.
        task: the task of DeepSeek's own that follows; None for none.
        functions, schema: what is shown behind a developer's text.
    """

    texts: list[str]
    developer: bool = False
    task: str | None = None
    functions: Functions = ()
    schema: Any = None


@dataclasses.dataclass(frozen=True)
class Reply:
    """An assistant's turn; with `prefix`, it is not finished."""

    text: str
    reasoning: str
    calls: tuple[Call, ...]
    prefix: bool
    task: str | None


@dataclasses.dataclass(frozen=True)
class Reminder:
    """DeepSeek's own reminder of date and place."""

    text: str
    task: None = None
    functions: Functions = ()


Turn = UserTurn | Reply | Reminder


def in_turns(messages: Sequence[Message]) -> tuple[list[System], list[Turn]]:
    """The leading system texts, and the turns behind them.

    Consecutive messages of a user and of tools are one turn, and so are those of an assistant. A system message behind the first
    turn is a text of the user's turn where it stands.
    """
    lead = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    systems = [System(message.text, message.functions, message.schema) for message in messages[:lead]]
    turns: list[Turn] = []
    order: Mapping[str, int] = {}
    for group in _groups(messages[lead:]):
        first, last = group[0], group[-1]
        if first.role == "assistant":
            reply = _reply(group)
            if reply.calls:
                order = {call.id: i for i, call in enumerate(reply.calls) if call.id}
            turns.append(reply)
        elif first.role == "latest_reminder":
            turns.append(Reminder(first.text))
        elif first.role == "developer":
            turns.append(UserTurn([first.text], True, first.task, first.functions, first.schema))
        else:
            turns.append(UserTurn(_sorted(group, order), task=last.task))
    return systems, turns


def _groups(messages: Iterable[Message]) -> list[list[Message]]:
    """The messages of each turn. A message with a task ends its turn."""
    groups: list[list[Message]] = []
    for message in messages:
        before = groups[-1][-1] if groups else None
        same = before is not None and before.task is None and _side(message) is not None and _side(message) == _side(before)
        if same:
            groups[-1].append(message)
        else:
            groups.append([message])
    return groups


def _side(message: Message) -> str | None:
    """Whose turn a message is part of; None for a message that is a turn alone."""
    return {"user": "user", "tool": "user", "system": "user", "assistant": "assistant"}.get(message.role)


def _reply(group: Sequence[Message]) -> Reply:
    texts, thoughts = (
        [text for text in found if text] for found in zip(*((one.text, one.reasoning) for one in group), strict=True)
    )
    calls = tuple(call for one in group for call in one.calls)
    return Reply("\n\n".join(texts), "\n\n".join(thoughts), calls, group[-1].prefix, group[-1].task)


def _sorted(group: Sequence[Message], order: Mapping[str, int]) -> list[str]:
    """Texts of a user's turn. Results take their places by the order of the latest calls; unknown ones count as the first."""
    results = iter(sorted((one for one in group if one.role == "tool"), key=lambda one: order.get(one.call_id, 0)))
    return [(next(results) if one.role == "tool" else one).text for one in group]

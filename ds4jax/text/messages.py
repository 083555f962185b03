"""A conversation in OpenAI's form, checked and read: texts, calls and results, with the names of fields for every error."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from ds4jax.errors import InputError
from ds4jax.text.dsml import Call, result_text
from ds4jax.text.parts import valid
from ds4jax.text.tools_block import as_json, functions

Level = Literal["server", "encoder"]
# A server's `developer` is a system text by another name; DeepSeek's own is a turn of its search agent.
_ROLES = {
    "server": ("system", "developer", "user", "assistant", "tool"),
    "encoder": ("system", "developer", "user", "assistant", "tool", "latest_reminder"),
}
TASKS = ("action", "query", "authority", "domain", "title", "read_url")


@dataclasses.dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: "system", "developer" (DeepSeek's own), "user", "assistant", "tool" or "latest_reminder".
        text: its content; a tool's with its tags.
        reasoning, calls, prefix: an assistant's reasoning and calls, and whether the reply goes on from its text.
        call_id: the call that a tool's result answers, "" for none.
        task: the task of DeepSeek's own that follows; None for none.
        functions, schema: tools and format that belong to this message alone, in DeepSeek's own form.
    """

    role: str
    text: str
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    prefix: bool = False
    call_id: str = ""
    task: str | None = None
    functions: tuple[Mapping[str, Any], ...] = ()
    schema: Any = None


def read(messages: Sequence[Mapping[str, Any]], level: Level = "server") -> list[Message]:
    """The messages of a conversation. null, an absent field and an empty text are the same; unknown fields are ignored.

    Args:
        messages: objects with role and content, which is a text, null or a list of text parts.
        level: "server" for the roles of OpenAI's clients, "encoder" for DeepSeek's own.

    Raises:
        InputError: no messages, an unknown role or part, or a field that cannot be used; the message names it.
    """
    if level not in get_args(Level):
        raise InputError(f"level: {str(level)[:60]!r} is unknown; it must be one of {', '.join(get_args(Level))}")
    if not isinstance(messages, list | tuple):
        raise InputError(f"messages: is a {type(messages).__name__}; it must be a list")
    if not messages:
        raise InputError("messages: there are none; add at least a user's")
    found = [_message(message, f"messages[{i}]", level) for i, message in enumerate(messages)]
    for i, message in enumerate(found[:-1]):
        if message.prefix:
            raise InputError(f"messages[{i}].prefix: only the last message can be continued; leave it out")
    return found


def _message(message: Any, where: str, level: Level) -> Message:
    if not isinstance(message, dict):
        raise InputError(f"{where}: is a {type(message).__name__}; it must be an object")
    role = message.get("role")
    if role not in _ROLES[level]:
        raise InputError(f"{where}.role: {str(role)[:60]!r} is unknown; it must be one of {', '.join(_ROLES[level])}")
    native = level == "encoder"
    text = _content(message.get("content"), f"{where}.content", of_tool=role == "tool")
    if native and role == "developer" and not text:
        raise InputError(f"{where}.content: is empty; a developer's turn needs a text")
    if message.get("prefix") and role != "assistant":
        raise InputError(f"{where}.prefix: only an assistant's message can be continued")
    found = Message("system" if role == "developer" and not native else role, text)
    if native:
        found = dataclasses.replace(found, task=_task(message.get("task"), f"{where}.task"))
    if native and role in ("system", "developer"):
        own = tuple(functions(message.get("tools"))), message.get("response_format") or None
        found = dataclasses.replace(found, functions=own[0], schema=own[1])
    if role == "tool":
        call_id = _optional(message, "tool_call_id", where)
        return dataclasses.replace(found, text=result_text(text), call_id=call_id)
    if role == "assistant":
        # DeepSeek's name for the reasoning, or the one of vLLM and OpenRouter.
        reasoning = _optional(message, "reasoning_content", where) or _optional(message, "reasoning", where)
        calls = _calls(message.get("tool_calls"), f"{where}.tool_calls")
        return dataclasses.replace(found, reasoning=reasoning, calls=calls, prefix=_flag(message, "prefix", where))
    return found


def _content(content: Any, where: str, *, of_tool: bool) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return valid(content, where)
    if not isinstance(content, list | tuple):
        raise InputError(f"{where}: is a {type(content).__name__}; it must be a text or a list of text parts")
    return "\n\n".join(_part(part, f"{where}[{i}]", of_tool=of_tool) for i, part in enumerate(content))


def _part(part: Any, where: str, *, of_tool: bool) -> str:
    if not isinstance(part, dict):
        raise InputError(f"{where}: is a {type(part).__name__}; it must be an object")
    kind = part.get("type")
    if kind == "text":
        return _optional(part, "text", where)
    if of_tool:
        return valid(f"[Unsupported {kind}]", f"{where}.type")
    raise InputError(f"{where}.type: {str(kind)[:60]!r} cannot be read by a text model; give parts of type 'text'")


def _calls(calls: Any, where: str) -> tuple[Call, ...]:
    if calls is None:
        return ()
    if not isinstance(calls, list | tuple):
        raise InputError(f"{where}: is a {type(calls).__name__}; it must be a list")
    return tuple(_call(call, f"{where}[{i}]") for i, call in enumerate(calls))


def _call(call: Any, where: str) -> Call:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise InputError(f"{where}.function: missing or no object; the called function is named there")
    name = _optional(function, "name", f"{where}.function")
    if not name:
        raise InputError(f"{where}.function.name: missing or empty; name the called function")
    call_id = _optional(call, "id", where) or _optional(function, "id", f"{where}.function")
    return Call(call_id, name, _arguments(function.get("arguments"), f"{where}.function.arguments"))


def _arguments(arguments: Any, where: str) -> Mapping[str, Any]:
    """Value by parameter. A text that is no JSON object is the value of a parameter `arguments`."""
    if arguments is None or arguments == "":
        return {}
    if not isinstance(arguments, str | dict):
        raise InputError(f"{where}: is a {type(arguments).__name__}; it must be an object as JSON text")
    values = arguments if isinstance(arguments, dict) else _object(arguments)
    # Lone surrogates appear only now, from escapes.
    as_json(values, where)
    return values


def _object(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    return values if isinstance(values, dict) else {"arguments": text}


def _task(task: Any, where: str) -> str | None:
    if task is not None and task not in TASKS:
        raise InputError(f"{where}: {str(task)[:60]!r} is unknown; it must be one of {', '.join(TASKS)}")
    return task


def _optional(fields: Mapping[str, Any], name: str, where: str) -> str:
    """A field that is a text; "" where it is null or absent."""
    value = fields.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where}.{name}: is a {type(value).__name__}; it must be a text")
    return valid(value, f"{where}.{name}")


def _flag(fields: Mapping[str, Any], name: str, where: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{where}.{name}: is {str(value)[:60]!r}; it must be true or false")
    return bool(value)

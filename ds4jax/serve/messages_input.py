"""Anthropic's conversations in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ds4jax.serve import conversation, shapes
from ds4jax.serve.conversation import Conversation
from ds4jax.serve.errors import bad, unsupported
from ds4jax.serve.thinking import wanted

# Claude Code begins with a line whose digest changes with every request; with it no prefix would ever be used again.
_CHANGING = "x-anthropic-billing-header:"
_ROLES = ("user", "assistant", "system")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def of_messages(asked: shapes.Messages) -> Conversation:
    """The conversation of a request.

    Raises:
        ApiError, InputError: a field cannot be used.
    """
    shapes.refuse(asked, ("mcp_servers", "container"))
    config = asked.output_config or {}
    if config.get("format") is not None:
        response_format = _format(config["format"])
    else:
        response_format = None
    think, effort = wanted(asked.thinking, config.get("effort"), "output_config.effort")
    choice = asked.tool_choice or {}
    return Conversation(
        messages=[*_system(asked.system), *_messages(asked.messages)],
        sampling=conversation.sampling_of(asked),
        tools=_tools(asked.tools),
        tool_choice=_choice(choice),
        response_format=response_format,
        think=think,
        effort=effort,
        max_new_tokens=conversation.limit_of("max_tokens", asked.max_tokens),
        stop=conversation.stops_of(asked.stop_sequences, "stop_sequences"),
        parallel=choice.get("disable_parallel_tool_use") is not True,
    )


def _format(given: Any) -> dict[str, Any]:
    if not isinstance(given, dict) or given.get("type") != "json_schema":
        raise bad("output_config.format: its type must be json_schema", "output_config.format")
    return {"type": "json_schema", "json_schema": {"name": "reply", "schema": given.get("schema")}}


def _system(system: str | list[Any] | None) -> list[dict[str, Any]]:
    texts = [system] if isinstance(system, str) else [_text(one, f"system[{i}]") for i, one in enumerate(system or ())]
    kept = [text for text in texts if text and not text.startswith(_CHANGING)]
    return [{"role": "system", "content": "\n\n".join(kept)}] if kept else []


def _messages(messages: list[Any]) -> Iterator[dict[str, Any]]:
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise bad(f"{where}: is a {type(message).__name__}; it must be an object", where)
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            raise bad(f"{where}.role: {str(role)[:60]!r} is unknown; it must be one of {', '.join(_ROLES)}", f"{where}.role")
        if isinstance(content, str) or content is None:
            content = [{"type": "text", "text": content or ""}]
        if not isinstance(content, list):
            raise bad(f"{where}.content: must be a text or a list of blocks", f"{where}.content")
        blocks = [(one, f"{where}.content[{k}]") for k, one in enumerate(content)]
        if role == "assistant":
            yield _assistant(blocks)
        else:
            # A late system text stays in its place, so that what precedes it stays a prefix.
            yield from (_of_user(block, where, role) for block, where in blocks)


def _assistant(blocks: list[tuple[Any, str]]) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for block, where in blocks:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "thinking":
            thoughts.append(_string(block, "thinking", where))
        elif kind == "tool_use":
            arguments = block.get("input")
            if arguments is not None and not isinstance(arguments, dict):
                raise bad(f"{where}.input: must be an object", f"{where}.input")
            function = {"name": _string(block, "name", where), "arguments": arguments or {}}
            calls.append({"id": _string(block, "id", where), "type": "function", "function": function})
        elif kind != "redacted_thinking":
            texts.append(_text(block, where))
    return {
        "role": "assistant",
        "content": "".join(texts),
        "reasoning_content": "\n".join(thoughts),
        "tool_calls": calls or None,
    }


def _of_user(block: Any, where: str, role: str) -> dict[str, Any]:
    if isinstance(block, dict) and block.get("type") == "tool_result":
        content = block.get("content")
        if isinstance(content, list):
            content = [one if isinstance(one, dict) else {"type": str(one)} for one in content]
        elif content is not None and not isinstance(content, str):
            content = json.dumps(content, ensure_ascii=False)
        return {"role": "tool", "tool_call_id": _string(block, "tool_use_id", where), "content": content}
    return {"role": role, "content": _text(block, where)}


def _text(block: Any, where: str) -> str:
    if not isinstance(block, dict):
        raise bad(f"{where}: is a {type(block).__name__}; it must be an object", where)
    if block.get("type") != "text":
        kind = str(block.get("type"))[:60]
        raise bad(f"{where}.type: {kind!r} cannot be read by a text model; give blocks of type 'text'", f"{where}.type")
    return _string(block, "text", where)


def _string(block: dict[str, Any], field: str, where: str) -> str:
    value = block.get(field)
    if value is not None and not isinstance(value, str):
        raise bad(f"{where}.{field}: is a {type(value).__name__}; it must be a text", f"{where}.{field}")
    return value or ""


def _tools(tools: list[Any] | None) -> list[dict[str, Any]] | None:
    """The tools that the client runs. Those that Anthropic's servers run are left out."""
    found = []
    for i, tool in enumerate(tools or ()):
        if not isinstance(tool, dict):
            raise bad(f"tools[{i}]: is a {type(tool).__name__}; it must be an object", f"tools[{i}]")
        if tool.get("type") not in (None, "custom"):
            continue
        function = {"name": tool.get("name"), "description": tool.get("description"), "parameters": tool.get("input_schema")}
        found.append({"type": "function", "function": {name: value for name, value in function.items() if value is not None}})
    return found or None


def _choice(choice: dict[str, Any]) -> str | dict[str, Any] | None:
    kind = choice.get("type")
    if kind is None:
        return None
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if kind not in _CHOICES:
        raise unsupported("tool_choice", f"its type must be one of {', '.join((*_CHOICES, 'tool'))}")
    return _CHOICES[kind]

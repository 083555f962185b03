"""Conversations of OpenAI's Responses interface in the form of its chat interface."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ds4jax.serve import conversation, shapes
from ds4jax.serve.conversation import Conversation
from ds4jax.serve.errors import bad, unsupported
from ds4jax.serve.thinking import wanted

_STORED = ("previous_response_id", "conversation", "background", "prompt", "max_tool_calls")
_TEXTS = ("input_text", "output_text", "text", "refusal")


def of_responses(asked: shapes.Responses) -> Conversation:
    """The conversation of a request.

    Raises:
        ApiError, InputError: a field cannot be used.
    """
    for field in _STORED:
        if getattr(asked, field):
            raise unsupported(field, "is not supported, since nothing is stored; send the whole input")
    begun = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
    items = [{"role": "user", "content": asked.input}] if isinstance(asked.input, str) else list(_messages(asked.input))
    think, effort = wanted(None, (asked.reasoning or {}).get("effort"), "reasoning.effort")
    return Conversation(
        messages=[*begun, *items],
        sampling=conversation.sampling_of(asked),
        tools=_tools(asked.tools),
        tool_choice=_choice(asked.tool_choice),
        response_format=_format(asked.text),
        think=think,
        effort=effort,
        max_new_tokens=conversation.limit_of("max_output_tokens", asked.max_output_tokens),
        parallel=asked.parallel_tool_calls is not False,
    )


def _messages(items: list[Any]) -> Iterator[dict[str, Any]]:
    for i, item in enumerate(items):
        where = f"input[{i}]"
        if not isinstance(item, dict):
            raise bad(f"{where}: is a {type(item).__name__}; it must be an object", where)
        kind = item.get("type") or "message"
        if kind == "message":
            yield {"role": item.get("role"), "content": _content(item.get("content"), f"{where}.content")}
        elif kind in ("function_call", "custom_tool_call"):
            arguments = item.get("arguments") if kind == "function_call" else item.get("input")
            call = {"id": item.get("call_id"), "function": {"name": item.get("name"), "arguments": arguments}}
            yield {"role": "assistant", "content": "", "tool_calls": [call]}
        elif kind in ("function_call_output", "custom_tool_call_output"):
            output = item.get("output")
            text = output if isinstance(output, str) else _output(output, f"{where}.output")
            yield {"role": "tool", "tool_call_id": item.get("call_id"), "content": text}
        elif kind == "reasoning":
            yield {"role": "assistant", "content": "", "reasoning_content": _reasoning(item)}
        # Items of tools that OpenAI's servers run are left out, as the tools are.


def _content(content: Any, where: str) -> Any:
    if not isinstance(content, list):
        return content
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXTS:
            raise bad(f"{where}[{i}].type: {str(kind)[:60]!r} cannot be read by a text model; give texts", f"{where}[{i}].type")
        texts.append({"type": "text", "text": part.get("text")})
    return texts


def _output(output: Any, where: str) -> str:
    if isinstance(output, list) and all(isinstance(one, dict) and isinstance(one.get("text"), str) for one in output):
        return "\n\n".join(one["text"] for one in output)
    return json.dumps(output, ensure_ascii=False)


def _reasoning(item: dict[str, Any]) -> str:
    """The reasoning's text: its content, or else its summary."""
    for field in ("content", "summary"):
        parts = item.get(field)
        texts = [one.get("text") for one in parts if isinstance(one, dict)] if isinstance(parts, list) else []
        if any(texts):
            return "\n".join(text for text in texts if isinstance(text, str))
    return ""


def _tools(tools: list[Any] | None) -> list[dict[str, Any]] | None:
    """The functions. Tools of other types are left out, since the model cannot be shown them."""
    found = []
    for i, tool in enumerate(tools or ()):
        if not isinstance(tool, dict):
            raise bad(f"tools[{i}]: is a {type(tool).__name__}; it must be an object", f"tools[{i}]")
        if tool.get("type") == "function":
            found.append({"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}})
    return found or None


def _choice(choice: Any) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if isinstance(choice, dict):
        raise unsupported("tool_choice", f"{str(choice.get('type'))[:60]!r} is not supported; name a function")
    return choice


def _format(text: dict[str, Any] | None) -> dict[str, Any] | None:
    given = (text or {}).get("format")
    if not isinstance(given, dict):
        return None
    if given.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {name: value for name, value in given.items() if name != "type"}}
    return given

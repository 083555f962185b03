"""Whether a request asks for reasoning, and how much: in the words of the clients of several servers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds4jax.serve import shapes
from ds4jax.serve.errors import bad
from ds4jax.text import efforts

_SWITCHES = {"enabled": True, "adaptive": True, "disabled": False}


def of_chat(asked: shapes.Chat) -> tuple[bool, str]:
    """Whether to think, and the effort, by `thinking`, `reasoning_effort` and `chat_template_kwargs`.

    Raises:
        ApiError: a value is unknown.
    """
    template: Mapping[str, Any] = asked.chat_template_kwargs or {}
    effort = asked.reasoning_effort or template.get("reasoning_effort")
    switches = [template.get("thinking"), template.get("enable_thinking")]
    return wanted(asked.thinking, effort, "reasoning_effort", switches)


def wanted(thinking: Any, effort: Any, field: str, switches: list[Any] | None = None) -> tuple[bool, str]:
    """Whether to think, and the effort. Without a word, the model thinks with `efforts.DEFAULT`, as with DeepSeek's API.

    Args:
        thinking: an object with `type`, or None.
        effort: its name, or None; "none" turns reasoning off.
        field: the effort's name in the request.
        switches: further values that turn it on or off; None says nothing.

    Raises:
        ApiError: a value is unknown.
    """
    kind = thinking.get("type") if isinstance(thinking, dict) else None
    if kind is not None and kind not in _SWITCHES:
        raise bad(f"thinking.type: {str(kind)[:60]!r} is unknown; it must be one of {', '.join(_SWITCHES)}", "thinking.type")
    if effort is not None and effort not in efforts.NAMES:
        raise bad(f"{field}: {str(effort)[:60]!r} is unknown; it must be one of {', '.join(efforts.NAMES)}", field)
    if isinstance(thinking, dict) and effort is None and thinking.get("reasoning_effort") in efforts.NAMES:
        effort = thinking["reasoning_effort"]
    said = [_SWITCHES[kind]] if kind is not None else [bool(one) for one in switches or () if one is not None]
    think = said[0] if said else True
    return think and effort != efforts.NO_REASONING, effort or efforts.DEFAULT

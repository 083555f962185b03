"""`POST /v1/messages` and `/v1/messages/count_tokens`, Anthropic's interface."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator
from typing import Any

import msgspec

from ds4jax.serve import shapes
from ds4jax.serve.begin import begin
from ds4jax.serve.endpoint import Answer, Call, event
from ds4jax.serve.errors import bad
from ds4jax.serve.messages_input import of_messages
from ds4jax.serve.reply import Ended, Reply
from ds4jax.text.parsed import Delta, ToolCall

_FINISH = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"}


async def messages(call: Call) -> Answer:
    """Reply to a conversation.

    Raises:
        ApiError, InputError: it cannot be replied to.
    """
    asked = shapes.read(call.body, shapes.Messages)
    if asked.max_tokens is None:
        raise bad("max_tokens: missing; say how many tokens the reply may have", "max_tokens")
    wanted = of_messages(asked)
    if call.runner.settings.log_prompts:
        call.record.prompts = [asked.system, asked.messages]
    [reply] = await begin(call, wanted)
    if asked.stream:
        return _Stream(call, reply).events()
    ended = await reply.whole()
    note(call, ended)
    blocks = [one for one in (_thinking(ended), _text(ended)) if one]
    blocks += map(_tool_use, ended.calls)
    return _head(call, reply) | {"content": blocks, **_finish(ended), "usage": _usage(reply, ended), **_bits(ended)}


async def count_tokens(call: Call) -> Answer:
    """The number of tokens of a conversation's prompt."""
    asked = shapes.read(call.body, shapes.Messages)
    ids = await asyncio.to_thread(of_messages(asked).ids, call.runner)
    return {"input_tokens": len(ids)}


def note(call: Call, ended: Ended) -> None:
    """Write a reply into the record of the log."""
    call.record.add(ended.result, ended.finish, ended.tokens)
    if call.runner.settings.log_prompts:
        call.record.replies = [ended.result.text]


def _head(call: Call, reply: Reply) -> dict[str, Any]:
    return {
        "id": f"msg_{secrets.token_hex(12)}",
        "type": "message",
        "role": "assistant",
        "model": call.runner.settings.served_name,
        "system_fingerprint": call.runner.fingerprint,
        "seed": reply.seed,
    }


def _tool_use(one: ToolCall) -> dict[str, Any]:
    # The arguments as the model wrote them.
    return {"type": "tool_use", "id": _new_call(), "name": one.name, "input": msgspec.Raw(one.arguments.encode())}


def _new_call() -> str:
    return f"toolu_{secrets.token_hex(12)}"


def _thinking(ended: Ended) -> dict[str, Any] | None:
    return {"type": "thinking", "thinking": ended.reasoning, "signature": ""} if ended.reasoning else None


def _text(ended: Ended) -> dict[str, Any] | None:
    return {"type": "text", "text": ended.content} if ended.content else None


def _finish(ended: Ended) -> dict[str, Any]:
    reason = "stop_sequence" if ended.stop is not None and ended.finish == "stop" else _FINISH[ended.finish]
    return {"stop_reason": reason, "stop_sequence": ended.stop}


def _bits(ended: Ended) -> dict[str, Any]:
    return {"fingerprint": ended.fingerprint}


def _usage(reply: Reply, ended: Ended | None) -> dict[str, Any]:
    prompt, reused = len(reply.job.request.prompt_ids), ended.result.reused if ended else 0
    return {
        "input_tokens": prompt - reused,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": reused,
        "output_tokens": ended.tokens if ended else 0,
    }


class _Stream:
    """The events of a reply: blocks of thinking, text and calls, one after the other."""

    def __init__(self, call: Call, reply: Reply):
        self._call, self._reply = call, reply
        # The kind of the block that is open, the number of blocks before the next one, and the open call.
        self._open, self._blocks, self._tool = "", 0, -1

    async def events(self) -> AsyncGenerator[bytes, None]:
        """All events."""
        empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(self._reply, None)}
        yield _event("message_start", message=_head(self._call, self._reply) | empty)
        yield _event("ping")
        async with contextlib.aclosing(self._reply.parts()) as parts:
            async for part in parts:
                self._reply.require_sound()
                for data in self._deltas(part.delta):
                    yield data
        for data in self._closed():
            yield data
        ended = self._reply.ended
        assert ended is not None
        note(self._call, ended)
        yield _event("message_delta", delta=_finish(ended), usage=_usage(self._reply, ended), **_bits(ended))
        yield _event("message_stop")

    def _deltas(self, delta: Delta) -> list[bytes]:
        found: list[bytes] = []
        if delta.reasoning:
            found += self._in("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            found.append(self._delta({"type": "thinking_delta", "thinking": delta.reasoning}))
        if delta.content:
            found += self._in("text", {"type": "text", "text": ""})
            found.append(self._delta({"type": "text_delta", "text": delta.content}))
        for one in delta.tool_calls:
            if one.name is not None:
                block = {"type": "tool_use", "id": _new_call(), "name": one.name, "input": {}}
                found += self._in(f"call {one.index}", block)
            if one.arguments:
                found.append(self._delta({"type": "input_json_delta", "partial_json": one.arguments}))
        return found

    def _in(self, kind: str, block: dict[str, Any]) -> list[bytes]:
        """Events that make a block of this kind the open one."""
        if self._open == kind:
            return []
        found = self._closed()
        self._open = kind
        return [*found, _event("content_block_start", index=self._blocks, content_block=block)]

    def _closed(self) -> list[bytes]:
        if not self._open:
            return []
        found = [self._delta({"type": "signature_delta", "signature": ""})] if self._open == "thinking" else []
        found.append(_event("content_block_stop", index=self._blocks))
        self._open, self._blocks = "", self._blocks + 1
        return found

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._blocks, delta=delta)


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)

"""`POST /v1/responses`, OpenAI's Responses interface without what a server would have to store."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

from ds4jax.serve import shapes
from ds4jax.serve.begin import begin
from ds4jax.serve.chat import new_call
from ds4jax.serve.endpoint import Answer, Call, event
from ds4jax.serve.merging import drained
from ds4jax.serve.messages import note
from ds4jax.serve.reply import Ended, Reply
from ds4jax.serve.responses_input import of_responses
from ds4jax.text.parsed import Delta


async def responses(call: Call) -> Answer:
    """Reply to a conversation.

    Raises:
        ApiError, InputError: it cannot be replied to.
    """
    asked = shapes.read(call.body, shapes.Responses)
    wanted = of_responses(asked)
    if call.runner.settings.log_prompts:
        call.record.prompts = [asked.instructions, asked.input]
    [reply] = await begin(call, wanted)
    stream = _Stream(call, asked, reply)
    return stream.events() if asked.stream else await stream.whole()


class _Item:
    """An item of the output that grows: reasoning, message or call."""

    def __init__(self, index: int, kind: str, fields: dict[str, Any], part: str = ""):
        """Args: `part`, the type of its one part of content; "" if it has no content."""
        self.index, self.kind, self.text, self._part, self._fields = index, kind, "", part, fields
        self.id = f"{ {'message': 'msg', 'reasoning': 'rs', 'function_call': 'fc'}[kind] }_{secrets.token_hex(12)}"

    def part(self) -> dict[str, Any]:
        """Its part as it is now."""
        found: dict[str, Any] = {"type": self._part, "text": self.text}
        return found | ({"annotations": [], "logprobs": []} if self._part == "output_text" else {})

    def shown(self, status: str) -> dict[str, Any]:
        """The item as it is now; a new one has no parts yet."""
        found = {"id": self.id, "type": self.kind, "status": status, **self._fields}
        if not self._part:
            return found | {"arguments": self.text}
        return found | {"content": [self.part()] if status != "in_progress" or self.text else []}


class _Stream:
    """The events of a reply, and the response that they end with."""

    def __init__(self, call: Call, asked: shapes.Responses, reply: Reply):
        self._call, self._asked, self._reply = call, asked, reply
        self._id, self._created, self._number = f"resp_{secrets.token_hex(12)}", int(time.time()), 0
        self._items: list[_Item] = []
        self._open: _Item | None = None
        self._which = ""

    async def whole(self) -> dict[str, Any]:
        """The response at once, from the same parts."""
        await drained(self._events())
        return self._final()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """All events."""
        async with contextlib.aclosing(self._events()) as events:
            async for one in events:
                self._reply.require_sound()
                yield one

    async def _events(self) -> AsyncGenerator[bytes, None]:
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self._response("in_progress", None))
        async with contextlib.aclosing(self._reply.parts()) as parts:
            async for part in parts:
                for data in self._deltas(part.delta):
                    yield data
        ended = self._reply.ended
        assert ended is not None
        for data in self._closed("incomplete" if ended.finish == "length" else "completed"):
            yield data
        note(self._call, ended)
        kind = "incomplete" if ended.finish == "length" else "completed"
        yield self._event(f"response.{kind}", response=self._final())

    def _deltas(self, delta: Delta) -> list[bytes]:
        found: list[bytes] = []
        if delta.reasoning:
            found += self._in("reasoning", "reasoning", {"summary": []}, "reasoning_text")
            found.append(self._grown("response.reasoning_text.delta", delta.reasoning, content_index=0))
        if delta.content:
            found += self._in("message", "message", {"role": "assistant"}, "output_text")
            found.append(self._grown("response.output_text.delta", delta.content, content_index=0, logprobs=[]))
        for one in delta.tool_calls:
            if one.name is not None:
                fields = {"call_id": new_call(), "name": one.name}
                found += self._in(f"call {one.index}", "function_call", fields, "")
            if one.arguments:
                found.append(self._grown("response.function_call_arguments.delta", one.arguments))
        return found

    def _in(self, which: str, kind: str, fields: dict[str, Any], part: str) -> list[bytes]:
        """Events that make this item the open one."""
        if self._which == which:
            return []
        found = self._closed("completed")
        item = self._open = _Item(len(self._items), kind, fields, part)
        self._items.append(item)
        self._which = which
        found.append(self._event("response.output_item.added", output_index=item.index, item=item.shown("in_progress")))
        if part:
            found.append(self._of(item, "response.content_part.added", content_index=0, part=item.part()))
        return found

    def _grown(self, name: str, text: str, **fields: Any) -> bytes:
        assert self._open is not None
        self._open.text += text
        return self._of(self._open, name, delta=text, **fields)

    def _closed(self, status: str) -> list[bytes]:
        item, self._open, self._which = self._open, None, ""
        if item is None or (item.kind == "function_call" and status == "incomplete"):
            # A call that was cut is never closed.
            return []
        if item.kind == "function_call":
            found = [self._of(item, "response.function_call_arguments.done", arguments=item.text, name=item.shown("")["name"])]
        else:
            name = "response.output_text.done" if item.kind == "message" else "response.reasoning_text.done"
            extra: dict[str, Any] = {"logprobs": []} if item.kind == "message" else {}
            found = [
                self._of(item, name, content_index=0, text=item.text, **extra),
                self._of(item, "response.content_part.done", content_index=0, part=item.part()),
            ]
        return [*found, self._event("response.output_item.done", output_index=item.index, item=item.shown(status))]

    def _of(self, item: _Item, kind: str, /, **fields: Any) -> bytes:
        return self._event(kind, item_id=item.id, output_index=item.index, **fields)

    def _event(self, kind: str, /, **fields: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number - 1, **fields}, kind)

    def _final(self) -> dict[str, Any]:
        ended = self._reply.ended
        assert ended is not None
        return self._response("incomplete" if ended.finish == "length" else "completed", ended)

    def _response(self, status: str, ended: Ended | None) -> dict[str, Any]:
        asked = self._asked
        # Of the calls, the whole ones.
        items = [one for one in self._items if one.kind != "function_call" or not ended or _whole(one, ended)]
        found: dict[str, Any] = {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": self._call.runner.settings.served_name,
            "output": [one.shown("completed") for one in items] if ended else [],
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": (asked.reasoning or {}).get("effort"), "summary": None},
            "store": False,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "text": asked.text or {"format": {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools or [],
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
            "usage": _usage(ended) if ended else None,
            "metadata": asked.metadata or {},
            "system_fingerprint": self._call.runner.fingerprint,
            "seed": self._reply.seed,
        }
        return found | ({"fingerprint": ended.fingerprint} if ended else {})


def _whole(item: _Item, ended: Ended) -> bool:
    return any(call.name == item.shown("")["name"] and call.arguments == item.text for call in ended.calls)


def _usage(ended: Ended) -> dict[str, Any]:
    prompt = len(ended.result.prompt_ids)
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": ended.result.reused},
        "output_tokens": ended.tokens,
        "output_tokens_details": {"reasoning_tokens": ended.reasoning_tokens},
        "total_tokens": prompt + ended.tokens,
    }

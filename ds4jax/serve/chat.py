"""`POST /v1/chat/completions`, OpenAI's chat interface with DeepSeek's fields for reasoning."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

from ds4jax.serve import conversation, shapes
from ds4jax.serve.begin import begin
from ds4jax.serve.conversation import Conversation
from ds4jax.serve.endpoint import Answer, Call, event
from ds4jax.serve.errors import bad
from ds4jax.serve.merging import merged, together
from ds4jax.serve.probabilities import chat_logprobs
from ds4jax.serve.reply import Ended, Part, Reply
from ds4jax.serve.thinking import of_chat
from ds4jax.text.tokenizer import Tokenizer

_UNSUPPORTED = (
    "logit_bias", "frequency_penalty", "presence_penalty", "functions", "function_call", "audio", "prediction",
    "web_search_options",
)  # fmt: skip


async def chat(call: Call) -> Answer:
    """Reply to a conversation.

    Raises:
        ApiError, InputError: it cannot be replied to.
    """
    asked = shapes.read(call.body, shapes.Chat)
    wanted = _conversation(asked)
    if call.runner.settings.log_prompts:
        call.record.prompts = asked.messages
    replies = await begin(call, wanted)
    head = _Head(call, asked, int(wanted.sampling.seed or 0))
    return head.stream(replies) if asked.stream else await head.whole(replies)


def _conversation(asked: shapes.Chat) -> Conversation:
    shapes.refuse(asked, _UNSUPPORTED)
    if asked.repetition_penalty not in (None, 1):
        raise bad("repetition_penalty: is not supported; leave it out", "repetition_penalty", "unsupported_parameter")
    if asked.modalities not in (None, [], ["text"]):
        raise bad("modalities: only text is possible", "modalities", "unsupported_parameter")
    if asked.top_logprobs is not None and not asked.logprobs:
        raise bad("top_logprobs: needs logprobs true", "top_logprobs")
    if asked.top_logprobs is not None and not 0 <= asked.top_logprobs <= 20:
        raise bad(f"top_logprobs: is {asked.top_logprobs}; it must be 0 to 20", "top_logprobs")
    if asked.max_completion_tokens is not None:
        limit = conversation.limit_of("max_completion_tokens", asked.max_completion_tokens)
    else:
        limit = conversation.limit_of("max_tokens", asked.max_tokens)
    think, effort = of_chat(asked)
    return Conversation(
        messages=asked.messages,
        sampling=conversation.sampling_of(asked),
        tools=asked.tools,
        tool_choice=asked.tool_choice,
        response_format=asked.response_format,
        think=think,
        effort=effort,
        max_new_tokens=limit,
        stop=conversation.stops_of(asked.stop),
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        count=conversation.count_of(asked.n),
        parallel=asked.parallel_tool_calls is not False,
    )


class _Head:
    """What all chunks of an answer have, and how the answer is put together."""

    def __init__(self, call: Call, asked: shapes.Chat, seed: int):
        self._call, self._asked = call, asked
        self._tokenizer: Tokenizer = call.runner.tokenizer
        self._top = asked.top_logprobs or 0
        self._fields = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": call.runner.settings.served_name,
            "system_fingerprint": call.runner.fingerprint,
            "seed": seed,
        }

    async def whole(self, replies: list[Reply]) -> dict[str, Any]:
        """The answer at once."""
        ended = await together([reply.whole() for reply in replies])
        self._note(ended)
        choices = [self._choice(index, one) for index, one in enumerate(ended)]
        return {**self._fields, "object": "chat.completion", "choices": choices, "usage": usage(ended)}

    def _choice(self, index: int, ended: Ended) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": ended.content or (None if ended.calls else "")}
        message["refusal"] = None
        if ended.reasoning is not None:
            message |= {"reasoning_content": ended.reasoning, "reasoning": ended.reasoning}
        if ended.calls:
            message["tool_calls"] = [
                {"id": new_call(), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in ended.calls
            ]
        return {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(self._tokenizer, ended.scored) if self._asked.logprobs else None,
            "finish_reason": ended.finish,
            "fingerprint": ended.fingerprint,
        }

    async def stream(self, replies: list[Reply]) -> AsyncGenerator[bytes, None]:
        """The answer as events."""
        for index in range(len(replies)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async with contextlib.aclosing(merged([reply.parts() for reply in replies])) as parts:
            async for index, part in parts:
                replies[index].require_sound()
                for data in self._deltas(index, part):
                    yield data
                ended = replies[index].ended
                if ended:
                    yield self._chunk(index, {}, finish_reason=ended.finish, fingerprint=ended.fingerprint)
        ended_all = [reply.ended for reply in replies if reply.ended]
        self._note(ended_all)
        if self._with_usage:
            yield event({**self._fields, "object": "chat.completion.chunk", "choices": [], "usage": usage(ended_all)})
        yield b"data: [DONE]\n\n"

    @property
    def _with_usage(self) -> bool:
        options = self._asked.stream_options
        return bool(options and options.include_usage)

    def _deltas(self, index: int, part: Part) -> list[bytes]:
        """The chunks of a part. Probabilities stand in the first of them."""
        deltas: list[dict[str, Any]] = []
        if part.delta.reasoning:
            deltas.append({"reasoning_content": part.delta.reasoning, "reasoning": part.delta.reasoning})
        if part.delta.content:
            deltas.append({"content": part.delta.content})
        for call in part.delta.tool_calls:
            named = {"id": new_call(), "type": "function"} if call.name is not None else {}
            function = ({"name": call.name} if call.name is not None else {}) | {"arguments": call.arguments}
            deltas.append({"tool_calls": [{"index": call.index, **named, "function": function}]})
        if part.scored and not deltas:
            deltas.append({})
        scored = chat_logprobs(self._tokenizer, part.scored) if part.scored else None
        return [self._chunk(index, delta, logprobs=scored if i == 0 else None) for i, delta in enumerate(deltas)]

    def _chunk(self, index: int, delta: dict[str, Any], **others: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} | others
        fields = {**self._fields, "object": "chat.completion.chunk", "choices": [choice]}
        return event(fields | ({"usage": None} if self._with_usage else {}))

    def _note(self, ended: list[Ended]) -> None:
        for one in ended:
            self._call.record.add(one.result, one.finish, one.tokens)
        if self._call.runner.settings.log_prompts:
            self._call.record.replies = [one.result.text for one in ended]


def new_call() -> str:
    """An id of a call, which nobody can guess."""
    return f"call_{secrets.token_hex(12)}"


def usage(ended: list[Ended]) -> dict[str, Any]:
    """Numbers of tokens. Those from the prefix cache depend on what else the server does."""
    prompt, tokens = len(ended[0].result.prompt_ids), sum(one.tokens for one in ended)
    steps = sum(one.result.steps for one in ended)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": tokens,
        "total_tokens": prompt + tokens,
        "prompt_tokens_details": {"cached_tokens": max(one.result.reused for one in ended)},
        "completion_tokens_details": {"reasoning_tokens": sum(one.reasoning_tokens for one in ended)},
        # What drafts gave.
        "tokens_per_step": round(tokens / steps, 3) if steps else None,
    }

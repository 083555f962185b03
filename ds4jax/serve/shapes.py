"""Bodies of requests. Null is as good as absent, and unknown fields are ignored.

Tools, schemas and messages stay dictionaries in the client's order of keys, since a prompt shows them in that order. Fields of
type `Any` at the end of a shape are known and refused where they ask for something.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from ds4jax.serve.errors import ApiError, bad, unsupported

Object = dict[str, Any]
Shape = TypeVar("Shape", bound=msgspec.Struct)

# Values with which a field asks for nothing.
_NEUTRAL: tuple[Any, ...] = (None, False, 0, "", [], {})
# What msgspec says of a field of the body itself; shapes inside of it demand none.
_MISSING = re.compile(r"Object missing required field `(\w+)`")


class StreamOptions(msgspec.Struct):
    """How a stream is sent."""

    include_usage: bool | None = None


class _OpenAI(msgspec.Struct, kw_only=True):
    """What both of OpenAI's older interfaces have. `min_p` and `top_k` are other servers' fields."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    repetition_penalty: Any = None


class Chat(_OpenAI, kw_only=True):
    """`POST /v1/chat/completions`. `thinking` and `chat_template_kwargs` are other servers' fields."""

    messages: list[Any]
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    response_format: Any = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    reasoning_effort: str | None = None
    thinking: Object | None = None
    chat_template_kwargs: Object | None = None
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    modalities: Any = None


class Completion(_OpenAI, kw_only=True):
    """`POST /v1/completions`."""

    prompt: str | list[Any]
    best_of: int | None = None
    logprobs: int | None = None
    echo: bool | None = None
    ignore_eos: bool | None = None
    suffix: Any = None


class Messages(msgspec.Struct):
    """`POST /v1/messages`, and `/v1/messages/count_tokens`, which has no `max_tokens`."""

    messages: list[Any]
    model: str | None = None
    system: str | list[Any] | None = None
    max_tokens: int | None = None
    tools: list[Any] | None = None
    tool_choice: Object | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    thinking: Object | None = None
    output_config: Object | None = None
    mcp_servers: Any = None
    container: Any = None


class Responses(msgspec.Struct):
    """`POST /v1/responses`, without what a server would have to store."""

    input: str | list[Any]
    model: str | None = None
    instructions: str | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stream: bool | None = None
    reasoning: Object | None = None
    text: Object | None = None
    metadata: Object | None = None
    previous_response_id: Any = None
    conversation: Any = None
    background: Any = None
    prompt: Any = None
    max_tool_calls: Any = None


class Tokenize(msgspec.Struct):
    """`POST /tokenize`."""

    prompt: str
    add_special_tokens: bool | None = None


class Detokenize(msgspec.Struct):
    """`POST /detokenize`."""

    tokens: list[int]


def read(body: bytes, shape: type[Shape]) -> Shape:
    """The body of a request.

    Raises:
        ApiError: it is not JSON, lacks a field, or a field is of another type; the message names the field.
    """
    try:
        return msgspec.json.decode(body, type=shape)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        field = where.strip("`").removeprefix(".") or None
        if missing := _MISSING.fullmatch(what):
            field, what = missing[1], "is missing"
        raise bad(f"{field or 'the body'}: {what}", field) from None
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from None


def refuse(request: msgspec.Struct, fields: Sequence[str]) -> None:
    """Refuse fields that are known and not implemented, where they ask for something.

    Raises:
        ApiError: the message names the first of them.
    """
    for field in fields:
        if getattr(request, field) not in _NEUTRAL:
            raise unsupported(field)

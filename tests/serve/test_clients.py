"""The clients that people use, against a server of the small model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("llguidance", reason="needs the extra serve")
pytest.importorskip("openai", reason="needs the extra test")
pytest.importorskip("anthropic", reason="needs the extra test")

import anthropic
import openai
from serving import TOOLS, Served, served

pytestmark = pytest.mark.long
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
PLAIN: dict[str, Any] = {"thinking": {"type": "disabled"}}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as one:
        yield one.ready()


@pytest.fixture(scope="module")
def chat(server: Served) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(server: Served) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0) as client:
        yield client


def test_openai_chats(chat: Any) -> None:
    options = {"model": "m", "messages": HELLO, "max_tokens": 15, "seed": 3, "extra_body": PLAIN}
    whole = chat.chat.completions.create(**options, n=2, logprobs=True, top_logprobs=3)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 3
    assert whole.seed == 3
    text = ""
    for chunk in chat.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage
    assert text == whole.choices[0].message.content
    assert usage.total_tokens == usage.prompt_tokens + 15
    stop = text[4:7]
    cut = chat.chat.completions.create(**options, stop=[stop])
    assert cut.choices[0].message.content == text[: text.index(stop)]


def test_openai_goes_around_with_a_tool(chat: Any) -> None:
    options: dict[str, Any] = {"model": "m", "tools": TOOLS, "extra_body": PLAIN, "max_tokens": 300}
    choice = {"type": "function", "function": {"name": "weather"}}
    first = chat.chat.completions.create(messages=HELLO, tool_choice=choice, parallel_tool_calls=False, **options).choices[0]
    [call] = first.message.tool_calls
    assert (first.finish_reason, call.function.name) == ("tool_calls", "weather")
    result = {"role": "tool", "tool_call_id": call.id, "content": "no rain"}
    second = chat.chat.completions.create(messages=[*HELLO, first.message.model_dump(), result], **options)
    assert second.usage.prompt_tokens > 0


def test_openai_completes(chat: Any) -> None:
    found = chat.completions.create(model="m", prompt=[[9, 10, 11], [12, 13]], max_tokens=1, echo=True, logprobs=1, temperature=0)
    assert [len(choice.logprobs.token_logprobs) for choice in found.choices] == [4, 3]
    assert [choice.logprobs.token_logprobs[0] for choice in found.choices] == [None, None]


def test_openai_responds(chat: Any) -> None:
    options: dict[str, Any] = {"model": "m", "input": "Hello", "temperature": 0, "max_output_tokens": 400}
    tools = [{"type": "function", **TOOLS[0]["function"]}, {"type": "web_search"}]
    demanded = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False, "reasoning": {"effort": "none"}}
    with chat.responses.stream(**options, **demanded) as stream:
        events = list(stream)
        final = stream.get_final_response()
    [item] = final.output
    assert (final.status, item.type, item.name) == ("completed", "function_call", "weather")
    done = [event for event in events if event.type == "response.output_item.done"]
    assert done[0].item.id == item.id
    assert [event.sequence_number for event in events] == list(range(len(events)))
    whole = chat.responses.create(**options, **demanded)
    assert whole.output[0].arguments == item.arguments
    text = chat.responses.create(**options | {"max_output_tokens": 9}, reasoning={"effort": "none"})
    assert text.status in ("incomplete", "completed")
    assert text.usage.output_tokens <= 9


def test_openai_hears_of_errors(chat: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat.chat.completions.create(model="m", messages=HELLO, frequency_penalty=1)
    assert (caught.value.param, caught.value.code) == ("frequency_penalty", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError):
        chat.models.retrieve("none")
    assert [one.id for one in chat.models.list()] == ["small"]


def test_anthropic_talks(claude: Any) -> None:
    options: dict[str, Any] = {"model": "m", "messages": HELLO, "max_tokens": 30, "extra_body": {"seed": 4}}
    whole = claude.messages.create(**options)
    with claude.messages.stream(**options) as stream:
        streamed = stream.get_final_message()
    assert [block.model_dump() for block in streamed.content] == [block.model_dump() for block in whole.content]
    assert whole.stop_reason == streamed.stop_reason
    assert whole.usage.output_tokens == streamed.usage.output_tokens
    with pytest.raises(anthropic.BadRequestError, match="top-p is 2"):
        claude.messages.create(**options | {"extra_body": {"top_p": 2}})


def test_anthropic_goes_around_with_a_tool(claude: Any) -> None:
    function = TOOLS[0]["function"]
    tools = [{"name": function["name"], "input_schema": function["parameters"]}]
    options: dict[str, Any] = {"model": "m", "max_tokens": 300, "tools": tools, "thinking": {"type": "disabled"}}
    choice = {"type": "any", "disable_parallel_tool_use": True}
    with claude.messages.stream(messages=HELLO, tool_choice=choice, extra_body={"seed": 1}, **options) as stream:
        first = stream.get_final_message()
    [block] = first.content
    assert (block.type, first.stop_reason, set(block.input)) == ("tool_use", "tool_use", {"days", "unit"})
    result = {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "no rain"}]}
    turns = [*HELLO, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = claude.messages.create(messages=turns, **options)
    counted = claude.messages.count_tokens(model="m", messages=turns, tools=tools, thinking={"type": "disabled"})
    assert counted.input_tokens == second.usage.input_tokens + second.usage.cache_read_input_tokens

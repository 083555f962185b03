"""A server over HTTP: what it answers, whole and streamed, and how it refuses."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("llguidance", reason="needs the extra serve")
pytest.importorskip("httpx2", reason="needs the extra test")

from held_calls import held
from serving import CONTEXT, SLOTS, TOOLS, Served, served, tokenizer

# Each test is quick; the module compiles the programs of a model once.
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as one:
        assert one.client.get("/health").status_code == 503
        answer = one.client.post("/v1/chat/completions", json={"messages": []})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
        yield one.ready()
        assert one.idle()


def joined(events: list[Any]) -> tuple[str, str, str, str | None]:
    """Reasoning, content, arguments and finish of a stream of chunks of choice 0."""
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    finishes = [choice["finish_reason"] for event in events for choice in event["choices"] if choice["finish_reason"]]
    calls = [call["function"]["arguments"] for delta in deltas for call in delta.get("tool_calls", ())]
    assert len(finishes) == 1
    assert len({event["id"] for event in events}) == 1
    reasoning = "".join(delta.get("reasoning_content", "") for delta in deltas)
    return reasoning, "".join(delta.get("content") or "" for delta in deltas), "".join(calls), finishes[0]


@pytest.mark.parametrize("think", [False, True])
def test_a_stream_says_what_the_whole_answer_says(server: Served, think: bool) -> None:
    body = {
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 30,
        "seed": 7,
        "thinking": {"type": "enabled" if think else "disabled"},
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = server.post("/v1/chat/completions", **body)
    events = server.events("/v1/chat/completions", **body, stream_options={"include_usage": True})
    message, choice = whole["choices"][0]["message"], whole["choices"][0]
    reasoning, content, _, finish = joined(events)
    assert (reasoning, content, finish) == (message.get("reasoning_content", ""), message["content"], choice["finish_reason"])
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert events[-1]["usage"] == whole["usage"]
    assert events[-1]["choices"] == []
    assert all(event["usage"] is None for event in events[:-1])
    scored = [one for event in events[:-1] for one in (event["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert scored == choice["logprobs"]["content"]
    assert len(scored) == whole["usage"]["completion_tokens"]
    assert events[-2]["choices"][0]["fingerprint"] == choice["fingerprint"]
    assert message.get("reasoning") == message.get("reasoning_content")


def test_a_reply_can_be_asked_for_again_under_load(server: Served) -> None:
    first = server.chat(max_tokens=40)
    assert first["system_fingerprint"] == server.runner.fingerprint
    assert server.chat(max_tokens=40)["seed"] != first["seed"]
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(server.chat, f"No. {i} " * (20 * i), max_tokens=9 * i + 1) for i in range(7)]
        again = server.chat(max_tokens=40, seed=first["seed"])
        for other in others:
            other.result()
    assert again["choices"] == first["choices"]


def test_several_replies_have_seeds_in_a_row(server: Served) -> None:
    both = server.chat(n=2, seed=5)
    alone = [server.chat(seed=5 + i)["choices"][0] for i in range(2)]
    assert [choice | {"index": 0} for choice in both["choices"]] == alone
    assert both["choices"][0]["fingerprint"] != both["choices"][1]["fingerprint"]


def test_a_stop_text_ends_the_answer_for_the_engine_too(server: Served) -> None:
    whole = server.chat(max_tokens=400, seed=3)
    content = whole["choices"][0]["message"]["content"]
    stop = content[20:23]
    cut = server.chat(max_tokens=400, seed=3, stop=[stop])
    assert cut["choices"][0]["message"]["content"] == content[: content.index(stop)]
    assert cut["choices"][0]["finish_reason"] == "stop"
    assert 0 < cut["usage"]["completion_tokens"] < 400
    assert server.idle(10)


@pytest.mark.parametrize("stream", [False, True])
def test_a_demanded_call(server: Served, stream: bool) -> None:
    body = {
        "messages": [{"role": "user", "content": "Rain?"}],
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "seed": 1,
        "thinking": {"type": "disabled"},
        "max_tokens": 200,
    }
    if stream:
        events = server.events("/v1/chat/completions", **body)
        calls = [call for one in events for call in one["choices"][0]["delta"].get("tool_calls", ())]
        assert calls[0]["function"]["name"] == "weather"
        assert calls[0]["id"].startswith("call_")
        assert all(set(call) == {"index", "function"} for call in calls[1:])
        _, content, arguments, finish = joined(events)
    else:
        choice = server.post("/v1/chat/completions", **body)["choices"][0]
        [call] = choice["message"]["tool_calls"]
        content, arguments, finish = choice["message"]["content"], call["function"]["arguments"], choice["finish_reason"]
    assert (content or "", finish) == ("", "tool_calls")
    found = json.loads(arguments)
    assert found["days"] in range(1, 10)
    assert found["unit"] in ("C", "F")


def test_a_reply_of_a_schema_behind_its_reasoning(server: Served) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for seed in range(2):
        found = server.chat(response_format=response_format, seed=seed, max_tokens=40)["choices"][0]["message"]["content"]
        assert json.loads(found)["a"] in (True, False)
    # Of the random model, a reasoning ends by chance.
    found = server.chat(response_format=response_format, seed=0, max_tokens=900, thinking={"type": "enabled"}, logprobs=True)
    message = found["choices"][0]["message"]
    assert message["content"] == "" or json.loads(message["content"])["a"] in (True, False)


def test_a_text_with_the_probabilities_of_its_prompt(server: Served) -> None:
    ids = tokenizer().encode("In the beginning")
    body = {"prompt": [ids, ids[:3]], "logprobs": 2, "temperature": 0, "seed": 1}
    echoed = server.post("/v1/completions", **body, echo=True, max_tokens=2)
    assert [choice["index"] for choice in echoed["choices"]] == [0, 1]
    first = echoed["choices"][0]["logprobs"]
    assert first["token_logprobs"][0] is None
    assert len(first["tokens"]) == len(ids) + 2
    assert "".join(first["tokens"][: len(ids)]) == "In the beginning"
    assert first["text_offset"][1] == len(first["tokens"][0])
    assert echoed["choices"][0]["text"].startswith("In the beginning")
    # A likely token's probability is the same number in both places.
    for token, logprob, top in zip(first["tokens"][1:], first["token_logprobs"][1:], first["top_logprobs"][1:], strict=True):
        assert len(top) == 2
        assert top.get(token, logprob) == logprob
    # The beginning of a prompt has the probabilities that it has alone.
    short = echoed["choices"][1]["logprobs"]
    assert short["token_logprobs"][:3] == first["token_logprobs"][:3]
    only = server.post("/v1/completions", **body | {"prompt": ids}, echo=True, max_tokens=0)["choices"][0]
    assert only["logprobs"]["token_logprobs"] == first["token_logprobs"][: len(ids)]
    assert only["text"] == "In the beginning"
    plain = server.post("/v1/completions", **body | {"prompt": "In the beginning"}, max_tokens=3)["choices"][0]
    assert len(plain["logprobs"]["tokens"]) == 3


def test_a_streamed_text(server: Served) -> None:
    body = {"prompt": ["Hello", "World"], "max_tokens": 20, "seed": 2, "stop": "e"}
    whole = server.post("/v1/completions", **body)
    events = server.events("/v1/completions", **body)
    for choice in whole["choices"]:
        own = [one for event in events for one in event["choices"] if one["index"] == choice["index"]]
        assert "".join(one["text"] for one in own) == choice["text"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        assert own[-1]["fingerprint"] == choice["fingerprint"]


def test_tokens_there_and_back(server: Served) -> None:
    found = server.post("/tokenize", prompt="Hello <think>", add_special_tokens=False)["tokens"]
    assert found == tokenizer().encode("Hello <think>")
    assert server.post("/detokenize", tokens=found) == {"prompt": "Hello <think>"}
    info = server.client.get("/tokenizer_info").json()
    assert info["eos_token_id"] == tokenizer().eos_id
    assert server.client.get("/v1/models").json()["data"][0]["id"] == "small"
    assert server.client.get("/v1/models/small").json()["max_model_len"] == CONTEXT
    assert server.client.get("/v1/models/large").json()["error"]["code"] == "model_not_found"


def raw(server: Served, path: str, body: bytes) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_frees_the_slot_and_the_place_in_the_queue(server: Served, stream: bool) -> None:
    body = {"prompt": "Hello", "max_tokens": CONTEXT, "ignore_eos": True, "stream": stream}
    with held(server.runner.engine) as calls:
        connections = [raw(server, "/v1/completions", json.dumps(body).encode()) for _ in range(6)]
        calls.until(lambda: server.runner.counts == (4, 2))
        log = len(server.log)
        for connection in connections:
            connection.close()
        calls.until(lambda: server.runner.counts == (0, 0))
    until = time.monotonic() + 20
    while len(server.log) < log + 6 and time.monotonic() < until:
        time.sleep(0.01)
    assert [line["status"] for line in server.log[log:]] == [499] * 6
    assert server.chat(max_tokens=1)["choices"]


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/v1/chat/completions", b"{", 400, "not JSON"),
        ("/v1/chat/completions", b'{"messages": ' + b"[" * 100_000, 400, "not JSON"),
        ("/v1/chat/completions", b"\xff", 400, "not JSON"),
        ("/v1/chat/completions", b"{}", 400, "messages: is missing"),
        ("/v1/chat/completions", b"[]", 400, "the body: Expected `object`"),
        ("/v1/chat/completions", b'{"messages": []}', 400, "messages: there are none"),
        ("/v1/chat/completions", b'{"messages": [1], "max_tokens": "a"}', 400, "max_tokens"),
        ("/v1/chat/completions", b'{"messages": [], "logit_bias": {"1": 2}}', 400, "logit_bias"),
        ("/v1/chat/completions", b'{"messages": [], "n": 99}', 400, "n: is 99"),
        ("/v1/chat/completions", b'{"messages": [], "temperature": -1}', 400, "temperature"),
        ("/v1/chat/completions", b'{"messages": [{"role": "user"}], "tool_choice": "required"}', 400, "tool_choice"),
        ("/v1/completions", b'{"prompt": []}', 400, "prompt"),
        ("/v1/completions", b'{"prompt": [9999]}', 400, "outside the vocabulary"),
        ("/v1/completions", b'{"prompt": [true]}', 400, "prompt"),
        ("/v1/completions", b'{"prompt": "a", "max_tokens": 0}', 400, "max_tokens"),
        ("/v1/responses", b'{"input": "a", "previous_response_id": "r"}', 400, "previous_response_id"),
        ("/v1/messages", b'{"messages": []}', 400, "max_tokens"),
        ("/v1/messages", b'{"messages": [{"role": "user", "content": [{"type": "image"}]}], "max_tokens": 1}', 400, "image"),
        ("/nowhere", b"", 404, "no such path"),
        ("/health", b"", 405, "not possible"),
    ],
)
def test_a_bad_request_says_what_is_wrong(server: Served, path: str, body: bytes, status: int, said: str) -> None:
    answer = server.client.post(path, content=body)
    error = answer.json()["error"]
    assert answer.status_code == status
    assert said in error["message"]
    if said.endswith(": is missing"):
        assert error["param"] == said.removesuffix(": is missing")
    assert (answer.json().get("type") == "error") == path.startswith("/v1/messages")


def test_a_long_prompt_is_told_from_other_errors(server: Served) -> None:
    answer = server.client.post("/v1/completions", json={"prompt": [5] * CONTEXT})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert answer.json()["error"]["n_ctx"] == CONTEXT
    large = server.client.post("/v1/completions", content=b" " * 16_000_001)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")


def test_no_body_makes_a_server_error(server: Served) -> None:
    dice = random.Random(1)
    values: list[Any] = [None, True, -1, 0, 1e400, 2**70, "", "none", "\x00", [], [[]], {}, {"type": "x"}, [None], "json_schema"]
    base: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "tools": TOOLS, "max_tokens": 1},
        "/v1/completions": {"prompt": "a", "max_tokens": 1},
        "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
        "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "a"}]},
        "/v1/responses": {"input": [{"role": "user", "content": "a"}], "max_output_tokens": 1},
        "/tokenize": {"prompt": "a"},
        "/detokenize": {"tokens": [1]},
    }
    fields = ["messages", "prompt", "input", "tools", "tool_choice", "stop", "n", "seed", "top_p", "top_k", "stream", "thinking",
              "response_format", "logprobs", "top_logprobs", "stream_options", "system", "reasoning", "text", "echo", "tokens",
              "output_config", "chat_template_kwargs", "reasoning_effort", "stop_sequences", "instructions"]  # fmt: skip
    statuses = set()
    for _ in range(150):
        path = dice.choice(list(base))
        body = json.loads(json.dumps(base[path]))
        for _ in range(dice.randrange(1, 3)):
            field, value = dice.choice(fields), dice.choice(values)
            messages = body.get("messages")
            if dice.random() < 0.3 and isinstance(messages, list) and messages and isinstance(messages[0], dict):
                messages[0][dice.choice(["role", "content", "tool_calls", "reasoning_content"])] = value
            else:
                body[field] = value
        text = json.dumps(body).replace("Infinity", "1e999")
        answer = server.client.post(path, content=text.encode())
        assert answer.status_code in (200, 400), (path, text, answer.text)
        statuses.add(answer.status_code)
    assert statuses == {200, 400}
    assert server.runner.alive


def test_the_log_and_the_figures(server: Served) -> None:
    before = len(server.log)
    server.chat(max_tokens=5, seed=1)
    line = server.log[before]
    assert (line["path"], line["status"], line["finish"]) == ("/v1/chat/completions", 200, "length")
    assert line["tokens"] == 5
    assert "prompts" not in line
    figures = server.client.get("/metrics").text
    assert 'ds4jax_requests_total{path="/v1/chat/completions",status="200"}' in figures
    assert "ds4jax_up 1.0" in figures
    assert f"ds4jax_slots {SLOTS}.0" in figures
    rows = [one.split() for one in figures.splitlines() if one[0] != "#" and "{le" not in one]
    value = {key: float(number) for key, number in rows}
    lines = [one for one in server.log if one.get("tokens")]
    assert value["ds4jax_generated_tokens_total"] == sum(one["tokens"] for one in lines)
    assert value["ds4jax_first_token_seconds_count"] == len(lines)
    assert value["ds4jax_token_seconds_count"] == len([one for one in lines if one["tokens"] > 1])
    assert value["ds4jax_prefix_hits_total"] == len([one for one in server.log if one["cached"]])
    kinds = ("drafts", "accepted_drafts")
    made, stood = (sum(value[f'ds4jax_{kind}_total{{slot="{i}"}}'] for i in range(SLOTS)) for kind in kinds)
    # Those of replies that were cancelled have no line.
    assert 0 < sum(one["drafts"] for one in lines) <= made
    assert 0 <= sum(one["accepted"] for one in lines) <= stood < made
    assert 0 < line["first"] < line["seconds"]
    assert value["process_resident_memory_bytes"] > 1e7

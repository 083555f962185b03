"""Who may use a server, and what it says without a model."""

from __future__ import annotations

import argparse
import json
import socket
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("llguidance", reason="needs the extra serve")
pytest.importorskip("httpx2", reason="needs the extra test")

import numpy as np
from serving import TOOLS, tokenizer
from starlette.testclient import TestClient

from ds4jax.cli import main as cli
from ds4jax.cli.commands.serve import size
from ds4jax.decode.sampling import Sampling
from ds4jax.engine.scheduler import Closed, QueueFull
from ds4jax.errors import InputError
from ds4jax.serve import errors, shapes
from ds4jax.serve.app import application
from ds4jax.serve.conversation import Conversation, samplings
from ds4jax.serve.guidance import Guide, constraint
from ds4jax.serve.messages_input import of_messages
from ds4jax.serve.responses_input import of_responses
from ds4jax.serve.runner import Runner
from ds4jax.serve.settings import Settings, keys_of, require_safe
from ds4jax.serve.thinking import of_chat
from ds4jax.text.parse_reply import parse_reply


def never() -> Any:
    raise AssertionError("the model is not loaded here")


def client(**settings: Any) -> TestClient:
    """A client of a server whose model is still being loaded."""
    return TestClient(application(Runner(never, Settings(**settings))))


def test_a_key_is_asked_for_where_the_model_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ds4jax.access")
    one = client(keys=("first", "second"))
    for headers in ({}, {"Authorization": "Bearer third"}, {"x-api-key": "firs"}, {"Authorization": "first"}):
        answer = one.get("/v1/models", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert one.post("/v1/messages", headers=headers, json={}).json()["error"]["type"] == "authentication_error"
    lines = [json.loads(line.getMessage()) for line in caplog.records if line.name == "ds4jax.access"]
    assert [(line["path"], line["status"], line["error"]) for line in lines[:2]] == [
        ("/v1/models", 401, "invalid_api_key"),
        ("/v1/messages", 401, "invalid_api_key"),
    ]
    assert 'requests_total{path="",status="401"} 8.0' in one.get("/metrics", headers={"x-api-key": "first"}).text
    assert one.get("/v1/models", headers={"Authorization": "bearer second"}).status_code == 200
    assert one.get("/v1/models", headers={"x-api-key": "first"}).status_code == 200
    assert one.get("/").status_code == 200
    assert one.get("/health").status_code == 503


def test_pages_of_other_origins_are_refused() -> None:
    assert client().get("/v1/models", headers={"Origin": "https://elsewhere.org"}).status_code == 403
    assert client().get("/v1/models", headers={"Origin": "http://testserver"}).status_code == 200
    allowed = client(origins=("https://elsewhere.org",)).get("/v1/models", headers={"Origin": "https://elsewhere.org"})
    assert allowed.headers["access-control-allow-origin"] == "https://elsewhere.org"
    ask = {"Origin": "https://elsewhere.org", "Access-Control-Request-Method": "POST"}
    keyed = client(origins=("https://elsewhere.org",), keys=("a",)).options("/v1/models", headers=ask)
    assert keyed.status_code == 200


def test_a_server_without_keys_answers_to_its_own_name_alone() -> None:
    for host in ("127.0.0.1:8000", "localhost", "[::1]:80"):
        assert client(local=True).get("/v1/models", headers={"Host": host}).status_code == 200
    for host in ("elsewhere.org", "["):
        assert client(local=True).get("/v1/models", headers={"Host": host}).json()["error"]["code"] == "host"
    assert client().get("/v1/models", headers={"Origin": "http://["}).status_code == 403


def test_the_page_loads_nothing_from_elsewhere() -> None:
    page = client().get("/")
    assert "http" not in page.text.split("<script>")[1]
    assert "src=" not in page.text
    assert "default-src 'self'" in page.headers["content-security-policy"]


def test_other_machines_need_a_key(tmp_path: Path) -> None:
    for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3"):
        require_safe(host, keys=False, insecure=False)
    for host in ("0.0.0.0", "::", "example.org"):
        with pytest.raises(InputError, match="other machines reach it"):
            require_safe(host, keys=False, insecure=False)
        require_safe(host, keys=True, insecure=False)
        require_safe(host, keys=False, insecure=True)
    (tmp_path / "keys").write_text("# mine\n one \n\ntwo\n")
    assert keys_of(tmp_path / "keys") == ("one", "two")
    (tmp_path / "none").write_text("\n# none\n")
    with pytest.raises(InputError, match="has no key"):
        keys_of(tmp_path / "none")


def test_the_command_refuses_before_it_loads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words, said in (
            (["--host", "0.0.0.0"], "other machines reach it"),
            (["--api-key-file", str(tmp_path / "keys")], "has no key"),
            (["--port", port], f"--port {port}: Address already in use; give another --port, or 0 for any\n"),
            (["--max-body", "much"], "no number of bytes"),
        ):
            with pytest.raises(SystemExit) as ended:
                cli.main(["serve", *words])
            assert ended.value.code == 2
            assert said in capsys.readouterr().err


@pytest.mark.parametrize(("word", "bytes_"), [("0", 0), ("16MB", 16_000_000), ("1.5gb", 1_500_000_000), ("7", 7), ("3k", 3000)])
def test_sizes(word: str, bytes_: int) -> None:
    assert size(word) == bytes_


@pytest.mark.parametrize("word", ["", "MB", "-1", "1 XB", "1e3"])
def test_no_sizes(word: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="no number of bytes"):
        size(word)


def test_errors_name_the_field() -> None:
    assert errors.of(InputError("messages[0].role: 'x' is unknown")).param == "messages[0].role"
    assert errors.of(InputError("top-p is 3; it must be")).param == "top_p"
    full = errors.of(QueueFull("the queue is full"))
    assert (full.status, full.headers["Retry-After"]) == (429, "2")
    assert errors.of(Closed("closed")).status == 503
    hidden = errors.of(RuntimeError("secret"))
    assert (hidden.status, "secret" in hidden.message) == (500, False)


def test_null_is_as_good_as_absent() -> None:
    fields = {name: None for name in shapes.Chat.__struct_fields__ if name != "messages"}
    assert shapes.read(json.dumps({"messages": []} | fields).encode(), shapes.Chat) == shapes.Chat(messages=[])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (True, "high")),
        ({"thinking": {"type": "disabled"}}, (False, "high")),
        ({"reasoning_effort": "none"}, (False, "none")),
        ({"reasoning_effort": "max"}, (True, "max")),
        ({"chat_template_kwargs": {"enable_thinking": False}}, (False, "high")),
        ({"chat_template_kwargs": {"thinking": True}}, (True, "high")),
        ({"thinking": {"type": "enabled"}, "chat_template_kwargs": {"thinking": False}}, (True, "high")),
    ],
)
def test_switches_of_reasoning(fields: dict[str, Any], expected: tuple[bool, str]) -> None:
    assert of_chat(shapes.Chat(messages=[], **fields)) == expected


def test_seeds_of_several_replies_stay_in_64_bits() -> None:
    assert [one.seed for one in samplings(Sampling(seed=2**63 - 1), 2)] == [2**63 - 1, -(2**63)]


def test_a_conversation_of_anthropics_clients() -> None:
    found = of_messages(
        shapes.Messages(
            system=[{"type": "text", "text": "x-anthropic-billing-header: cch=1;"}, {"type": "text", "text": "Be brief."}],
            messages=[
                {"role": "user", "content": "Rain?"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "Hm.", "signature": ""},
                        {"type": "text", "text": "Let me see."},
                        {"type": "tool_use", "id": "t1", "name": "weather", "input": {"days": 1}},
                    ],
                },
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "no"}]},
                {"role": "system", "content": "5 tokens left"},
            ],
            tools=[{"name": "weather", "input_schema": {"b": 1, "a": 2}}, {"type": "web_search_20250305", "name": "w"}],
            tool_choice={"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
            max_tokens=5,
        )
    )
    call = {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": {"days": 1}}}
    assert list(found.messages) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "Let me see.", "reasoning_content": "Hm.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "t1", "content": "no"},
        {"role": "system", "content": "5 tokens left"},
    ]
    assert found.tools == [{"type": "function", "function": {"name": "weather", "parameters": {"b": 1, "a": 2}}}]
    assert (found.tool_choice, found.parallel) == ({"type": "function", "function": {"name": "weather"}}, False)


def test_a_conversation_of_the_responses_interface() -> None:
    items: list[dict[str, Any]] = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Rain?"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "no"},
        {"type": "web_search_call", "id": "w"},
    ]
    tools = [{"type": "function", "name": "weather", "parameters": {}}, {"type": "web_search"}, {"type": "local_shell"}]
    found = of_responses(shapes.Responses(input=items, instructions="Be brief.", tools=tools))
    assert [one["role"] for one in found.messages] == ["system", "user", "assistant", "assistant", "tool"]
    assert found.messages[2]["reasoning_content"] == "Hm."
    assert found.tools == [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def followed(guide: Guide, dice: np.random.Generator, wanted: list[int] | None = None, most: int = 300) -> list[int]:
    """A reply of random tokens that the guide allows, or of those that are wanted."""
    ids: list[int] = []
    while len(ids) < most:
        mask = guide(tuple(ids))
        assert mask is not None
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[: tokenizer().vocab_size])
        token = int(dice.choice(allowed)) if wanted is None or len(ids) >= len(wanted) else wanted[len(ids)]
        assert token in allowed, tokenizer().decode([*ids, token])
        if token == tokenizer().eos_id:
            return ids
        ids.append(token)
    raise AssertionError("the reply does not end")


def guide_of(**options: Any) -> Guide:
    found = constraint(Conversation([], Sampling(), **{"think": False} | options), tokenizer(), tokenizer().vocab_size)
    assert found is not None
    return found


def test_a_guide_ends_in_json_and_begins_behind_the_reasoning() -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    dice = np.random.default_rng(1)
    ids = followed(guide_of(response_format=response_format), dice)
    assert json.loads(tokenizer().decode(ids))["a"] in "xy"
    thought = [*tokenizer().encode("So {"), tokenizer().marker_id("</think>")]
    guide = guide_of(response_format=response_format, think=True)
    ids = followed(guide, dice, thought)
    assert json.loads(tokenizer().decode(ids[len(thought) :]))["a"] in "xy"
    # The engine may make a reply again.
    assert followed(guide, dice, ids) == ids


def test_a_guide_of_calls_allows_what_the_parser_reads() -> None:
    text = {"type": "function", "function": {"name": "say", "parameters": {"properties": {"it": {"type": "string"}, "n": {}}}}}
    tools = [*TOOLS, text]
    opened = '<｜DSML｜invoke name="say">\n<｜DSML｜parameter name="it" string="true"><b></b>"</｜DSML｜parameter>\n'
    value = '<｜DSML｜parameter name="n" string="false">[1,{"a":2}]</｜DSML｜parameter>\n'
    reply = f"\n\n<｜DSML｜tool_calls>\n{opened}{value}</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    wanted = tokenizer().encode(reply, parse_special=True)
    ids = followed(guide_of(tools=tools, tool_choice="required", parallel=False), np.random.default_rng(1), wanted)
    [call] = parse_reply(ids, tokenizer=tokenizer(), think=False, tools=tools).tool_calls
    assert json.loads(call.arguments) == {"it": '<b></b>"', "n": [1, {"a": 2}]}
    choice = {"type": "function", "function": {"name": "weather"}}
    for seed in range(3):
        ids = followed(guide_of(tools=tools, tool_choice=choice, parallel=False), np.random.default_rng(seed))
        [call] = parse_reply(ids, tokenizer=tokenizer(), think=False, tools=tools).tool_calls
        assert (call.name, set(json.loads(call.arguments))) == ("weather", {"days", "unit"})
    with pytest.raises(errors.ApiError, match="there is no tool 'x'"):
        guide_of(tools=tools, tool_choice={"type": "function", "function": {"name": "x"}})
    with pytest.raises(errors.ApiError, match="response_format: the schema cannot be used"):
        guide_of(response_format={"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}})

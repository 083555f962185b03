"""Clients that are no part of the extra `test`, against the tiny model in a process of its own: `pip install 'ds4jax[clients]'`.

Agents come from npm: `npm install @openai/codex opencode-ai`. DS4JAX_CODEX and DS4JAX_OPENCODE name their programs where PATH
does not have them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("llguidance", reason="needs the extra serve")

from serving_process import Process, process

# They start a server of the tiny model, and read long prompts.
pytestmark = pytest.mark.slow
PLAIN: dict[str, Any] = {"thinking": {"type": "disabled"}}
ASKED: dict[str, Any] = {"temperature": 0.5, "seed": 3, "max_tokens": 20}


def needs(name: str) -> pytest.MarkDecorator:
    """Skips without a package."""
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"needs {name} of the extra clients")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with process(tmp_path_factory.mktemp("server"), "--context", "4096", "--slots", "2") as one:
        yield one


def direct(server: Process, **body: Any) -> str:
    """The answer without any client."""
    asked = {"messages": [{"role": "user", "content": "Who art thou?"}], **ASKED, **body}
    text: str = server.post("/v1/chat/completions", **asked)["choices"][0]["message"]["content"]
    return text


@needs("llm")
def test_llm(server: Process, tmp_path: Path) -> None:
    about = {"model_id": "tiny", "model_name": "tiny", "api_base": f"{server.url}/v1", "reasoning": True}
    # JSON is YAML, too.
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([about]))
    asked = ASKED | {"reasoning_effort": "none"}
    options = [word for name, value in asked.items() for word in ("-o", name, str(value))]
    expected = direct(server, reasoning_effort="none").strip()
    assert expected
    for how in ([], ["--no-stream"]):
        command = [sys.executable, "-m", "llm", "-m", "tiny", "--key", "any", *how, *options, "Who art thou?"]
        environment = os.environ | {"LLM_USER_PATH": str(tmp_path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == expected


@needs("langchain_openai")
def test_langchain(server: Process) -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=f"{server.url}/v1", api_key="any", model="tiny", extra_body=PLAIN, **ASKED)  # type: ignore[arg-type]
    expected = direct(server, **PLAIN)
    assert expected
    whole = model.invoke("Who art thou?")
    assert whole.content == expected
    assert whole.response_metadata["system_fingerprint"] == server.post("/v1/completions", prompt="a")["system_fingerprint"]
    pieces = list(model.stream("Who art thou?"))
    assert "".join(str(piece.content) for piece in pieces) == expected
    assert len(pieces) > 2

    def count(number: Literal[1, 2, 3], word: Literal["king", "people"]) -> str:
        """Count a word."""
        return f"{number} {word}"

    limits = {"max_tokens": 200, "parallel_tool_calls": False}
    for reply in (model.bind_tools([count], tool_choice="count").invoke("Count.", **limits), summed(model, count, limits)):
        [call] = reply.tool_calls
        assert call["name"] == "count"
        assert set(call["args"]) == {"number", "word"}


def summed(model: Any, tool: Any, limits: dict[str, Any]) -> Any:
    """The streamed reply with a demanded call, its pieces added up."""
    first, *others = model.bind_tools([tool], tool_choice="count").stream("Count.", **limits)
    for one in others:
        first += one
    return first


@needs("lm_eval")
def test_lm_eval_scores_as_ds4jax_logits_does(tmp_path: Path) -> None:
    """In strict mode. In the other one, XLA's sums of other numbers of rows round activations in another way."""
    with process(tmp_path / "server", "--slots", "1", "--strict") as server:
        scores, tokens = evaluated(server, tmp_path)
    for (score, greedy), (context, more) in zip(scores, tokens, strict=True):
        logits = scored([*context, *more], tmp_path)[len(context) - 1 : -1]
        logs = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(1, keepdims=True)
        expected = logs[np.arange(len(more)), more].sum()
        print(f"lm-eval {score:.6f}, ds4jax logits {expected:.6f}")
        assert score == pytest.approx(expected, abs=5e-5)
        assert greedy == (logits.argmax(1) == more).all()


def evaluated(server: Process, tmp_path: Path) -> Any:
    """What lm-eval makes of some pairs of texts: scores, and tokens."""
    pairs = [("In the beginning", " God created the heaven"), ("And the LORD said", " unto Moses"), ("The king", " xyzzy, of")]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    program = f"""
import json
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
model = LocalCompletionsAPI(base_url="{server.url}/v1/completions", model="tiny", batch_size=2, max_length=2048)
pairs = [tuple(one) for one in json.load(open("pairs.json"))]
asked = [Instance("loglikelihood", {{}}, one, i) for i, one in enumerate(pairs)]
print(json.dumps([model.loglikelihood(asked), [[model.tok_encode(text) for text in one] for one in pairs]]))
"""
    environment = os.environ | {"OPENAI_API_KEY": "any", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def scored(ids: list[int], folder: Path) -> np.ndarray:
    """What `ds4jax logits` says of a sequence."""
    np.save(folder / "ids.npy", np.array(ids, np.int32))
    command = [sys.executable, "-m", "ds4jax", "logits", "--ids", "ids.npy", "--out", "logits.npz", "--strict"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    logits: np.ndarray = np.load(folder / "logits.npz")["logits"].astype(np.float64)
    return logits


@pytest.fixture(scope="module")
def large() -> Iterator[Any]:
    """A server whose context holds what an agent begins with. The tiny model's does not."""
    pytest.importorskip("httpx2", reason="needs the extra test")
    from serving import served

    with served(roomy=True, context=131072, slots=2, chunk=1024) as one:
        yield one.ready()


def agent(name: str) -> str:
    """The program of an agent, or a skip."""
    found = os.environ.get(f"DS4JAX_{name.upper()}", "") or shutil.which(name)
    if not found:
        pytest.skip(f"needs npm's {name}; DS4JAX_{name.upper()} names the program")
    return found


def turn(command: list[str], folder: Path, **environment: str) -> str:
    """Let an agent do one task in a folder of its own. Returns what it printed."""
    (folder / "work").mkdir()
    (folder / "work" / "notes.txt").write_text("The king is David.\n")
    own = {"HOME": str(folder), "ANY_KEY": "any", "NO_PROXY": "127.0.0.1", **environment}
    inherited = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    how: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 540, "stdin": subprocess.DEVNULL}
    done = subprocess.run(command, env=inherited | own, cwd=folder / "work", **how)
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])
    printed: str = done.stdout
    return printed


def test_codex_does_a_task(large: Any, tmp_path: Path) -> None:
    program = agent("codex")
    (tmp_path / "config.toml").write_text(f"""
model = "small"
model_provider = "here"
model_context_window = 131072
[model_providers.here]
name = "here"
base_url = "{large.url}/v1"
wire_api = "responses"
env_key = "ANY_KEY"
request_max_retries = 0
stream_max_retries = 0
[analytics]
enabled = false
""")
    before = len(large.log)
    command = [program, "exec", "--skip-git-repo-check", "--sandbox", "read-only", "--json", "Who is the king? Read notes.txt."]
    events = [json.loads(line) for line in turn(command, tmp_path, CODEX_HOME=str(tmp_path)).splitlines() if line.startswith("{")]
    records = [one for one in large.log[before:] if one["path"] == "/v1/responses"]
    print(records)
    assert [one["status"] for one in records] == [200]
    assert [one["usage"]["output_tokens"] for one in events if one["type"] == "turn.completed"] == [records[0]["tokens"]]


def test_opencode_does_a_task(large: Any, tmp_path: Path) -> None:
    program = agent("opencode")
    models = {"small": {"name": "small", "limit": {"context": 131072, "output": 200}}}
    options = {"baseURL": f"{large.url}/v1", "apiKey": "any"}
    provider = {"here": {"npm": "@ai-sdk/openai-compatible", "name": "here", "options": options, "models": models}}
    about = {"provider": provider, "autoupdate": False, "share": "disabled", "small_model": "here/small"}
    (tmp_path / "opencode.json").write_text(json.dumps(about))
    before = len(large.log)
    command = [program, "run", "--model", "here/small", "--format", "json", "Who is the king? Read notes.txt."]
    settings = {"OPENCODE_CONFIG": str(tmp_path / "opencode.json"), "OPENCODE_DISABLE_MODELS_FETCH": "1"}
    printed = turn(command, tmp_path, **settings)
    records = [one for one in large.log[before:] if one["path"] == "/v1/chat/completions"]
    print(records, printed[-2000:])
    assert records
    assert {one["status"] for one in records} == {200}
    assert "step_finish" in printed

"""The command in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request

import pytest

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("llguidance", reason="needs the extra serve")

# It compiles the tiny model's programs.
pytestmark = pytest.mark.slow


def test_the_command_serves_the_tiny_model_until_a_signal(ctrl_c: None) -> None:
    command = [sys.executable, "-m", "ds4jax", "serve", "--port", "0", "--slots", "2", "--context", "2048"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        ready = next(line for line in process.stderr if "is ready at" in line)
        url = ready.split()[-1]
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3, "thinking": {"type": "disabled"}}
        with urllib.request.urlopen(f"{url}/v1/chat/completions", json.dumps(body).encode()) as answer:
            found = json.load(answer)
        assert found["usage"]["completion_tokens"] == 3
        assert found["model"] == "ds4jax-tiny"
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
    assert process.returncode == 0
    record = json.loads(next(line for line in rest.splitlines() if line.startswith("{")))
    assert record["tokens"] == 3
    assert "Traceback" not in rest

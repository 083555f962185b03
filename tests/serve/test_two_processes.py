"""A server of two processes, with four devices each, replies as one process with one device does."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("llguidance", reason="needs the extra serve")

from concurrent.futures import ThreadPoolExecutor

from numerics import GOLDEN
from serving_process import Process, process

from ds4jax.processes.relay import free_port

# They compile the same programs in two processes.
pytestmark = pytest.mark.slow
OPTIONS = [str(GOLDEN / "hub"), "--slots", "4", "--context", "128", "--chunk", "32", "--draft", "1"]


@contextlib.contextmanager
def pair(folder: Path) -> Iterator[tuple[Process, subprocess.Popen[bytes]]]:
    """Process 0 of a job of two, and the other one."""
    job = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2"]
    command = [sys.executable, "-m", "ds4jax", "serve", *OPTIONS, *job, "--process", "1"]
    with (folder / "other.log").open("w") as log:
        other = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
    try:
        with process(folder, *OPTIONS, *job, "--process", "0") as one:
            yield one, other
    finally:
        other.kill()
        other.wait()


def replies(server: Process) -> list[Any]:
    """Replies to requests at once, greedy and drawn, one prompt twice."""
    asked = [(40, 0.0), (3, 1.0), (70, 0.0), (40, 0.7), (70, 0.0)]
    bodies = [
        {"prompt": [i * 7 % 50 + 3 for i in range(length)], "temperature": heat, "seed": 5, "max_tokens": 12, "ignore_eos": True}
        for length, heat in asked
    ]
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = list(pool.map(lambda body: server.post("/v1/completions", **body), bodies))
    return [[answer["choices"], answer["system_fingerprint"]] for answer in answers]


def test_two_processes_reply_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    with process(tmp_path, *OPTIONS) as one:
        expected = replies(one)
    with pair(tmp_path) as (server, other):
        assert replies(server) == expected
        server.signal(signal.SIGTERM)
        assert (server.wait(60), other.wait(60)) == (0, 0)
        assert "error" not in server.log.read_text() + (tmp_path / "other.log").read_text()
    with pair(tmp_path) as (server, other):
        other.kill()
        assert server.wait(60) == 1
        assert server.log.read_text().splitlines()[-1] == "ds4jax: error: process 1 of 2 is lost, and with it the job"

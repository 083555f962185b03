"""Starts the processes of a run of the benchmark of several devices, reads what they say, and ends them in time."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any

from ds4jax.bench.environment import ROOT
from ds4jax.bench.mesh_worker import MARK, Task
from ds4jax.processes.relay import free_port

# The arguments of a process before its task.
PROGRAM: tuple[str, ...] = ("-m", "ds4jax.bench.mesh_worker")
# Seconds that a process has to end by itself, after it was asked and after it has said everything.
PATIENCE = 10
SHOWN = "CUDA_VISIBLE_DEVICES"


class FailedError(Exception):
    """A run ended too early; the message says why."""


def said(task: Task, limit: float | None) -> Iterator[tuple[str, Any]]:
    """Run a task. Yields kinds and values of what process 0 says.

    Args:
        task: its index and port do not matter.
        limit: seconds until the processes are ended; None for none.

    Raises:
        FailedError: a process failed, or the time was up.
    """
    until = None if limit is None else time.monotonic() + limit
    with contextlib.ExitStack() as stack:
        if limit is not None and limit <= 0:
            raise FailedError("the time was up")
        errors = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(task.run.processes)]
        processes = _started(task, errors)
        stack.callback(_end, processes)
        lines = _lines(processes[0])
        while True:
            try:
                line = lines.get(timeout=None if until is None else max(until - time.monotonic(), 0))
            except queue.Empty:
                raise FailedError(f"ended after {limit:.0f} s") from None
            if line is None:
                break
            if line.startswith(MARK):
                yield from json.loads(line.removeprefix(MARK)).items()
        for process, error in zip(processes, errors, strict=True):
            _require_success(process, error)


def _started(task: Task, errors: Sequence[IO[str]]) -> list[subprocess.Popen[str]]:
    count, port = task.run.processes, free_port()
    found = []
    for i, error in enumerate(errors):
        words = [sys.executable, *PROGRAM, Task(task.options, task.run, i, port).text()]
        environment = os.environ | (_share_of_devices(i, count, task.run.devices) if count > 1 else {})
        out = subprocess.PIPE if i == 0 else subprocess.DEVNULL
        found.append(subprocess.Popen(words, stdout=out, stderr=error, text=True, env=environment, cwd=ROOT))
    return found


def _share_of_devices(index: int, count: int, devices: int) -> dict[str, str]:
    """Variables that let a process see its part of the devices alone, of GPUs and of a CPU."""
    visible = os.environ.get(SHOWN, "").split(",") if os.environ.get(SHOWN) else [str(i) for i in range(devices)]
    each = devices // count
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={each}"
    return {SHOWN: ",".join(visible[index * each : (index + 1) * each]), "XLA_FLAGS": flags.strip()}


def _lines(process: subprocess.Popen[str]) -> queue.SimpleQueue[str | None]:
    """What a process prints; None at its end."""
    found: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout
        with process.stdout as printed:
            for line in printed:
                found.put(line)
        found.put(None)

    threading.Thread(target=read, name="ds4jax mesh", daemon=True).start()
    return found


def _require_success(process: subprocess.Popen[str], error: IO[str]) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)
    if process.returncode == 0:
        return
    error.seek(0)
    lines = error.read().strip().splitlines() or ["no output"]
    ended = "did not end" if process.returncode is None else f"ended with {process.returncode}"
    raise FailedError(f"the process {ended}: {lines[-1][:300]}")


def _end(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()

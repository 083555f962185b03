"""Processes of a job that gather over JAX, and end together with one line each."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds4jax.processes.relay import free_port

pytestmark = pytest.mark.long
WORKER = Path(__file__).parents[1] / "job_worker.py"
COUNT = 3
LOST = "ds4jax: error: process {} of 3 is lost, and with it the job"


@contextlib.contextmanager
def job() -> Iterator[list[subprocess.Popen[str]]]:
    """Three processes with two devices each, which have gathered."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    port, pipe = free_port(), subprocess.PIPE
    words = [[sys.executable, str(WORKER), str(port), str(i), str(COUNT)] for i in range(COUNT)]
    found = [subprocess.Popen(each, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment) for each in words]
    try:
        for one in found:
            assert one.stdout
            lines = (line for line in one.stdout if "Gloo" not in line)
            assert next(lines, "") == "[0, 1, 2, 3, 4, 5] 2\n", one.stderr and one.stderr.read()
        yield found
    finally:
        for one in found:
            one.kill()
            one.communicate()


def ended(one: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code, and what it said on stderr. Its stdin stays open, since its end would end the job."""
    assert one.stderr
    return one.wait(60), one.stderr.read().strip()


def test_a_lost_process_ends_the_job() -> None:
    with job() as (first, second, third):
        second.send_signal(signal.SIGKILL)
        assert [ended(first), ended(third)] == [(1, LOST.format(1))] * 2


def test_a_lost_process_0_ends_the_job() -> None:
    """JAX's service is lost with it, and would abort the others with a trace."""
    with job() as (first, second, third):
        first.send_signal(signal.SIGKILL)
        assert [ended(second), ended(third)] == [(1, LOST.format(0))] * 2


def test_ctrl_c_ends_the_job() -> None:
    with job() as processes:
        processes[1].send_signal(signal.SIGINT)
        assert [ended(one) for one in processes] == [(130, "ds4jax: error: process 1: interrupted")] * 3


def test_an_error_of_one_process_is_told_by_all() -> None:
    with job() as processes:
        assert processes[0].stdin
        processes[0].stdin.write("fail\n")
        processes[0].stdin.flush()
        said = {ended(one) for one in processes}
        assert said <= {(1, f"ds4jax: error: process {i}: no memory left") for i in (1, 2)}


def test_a_job_ends_after_its_orders() -> None:
    with job() as processes:
        out, said = processes[0].communicate("one\ntwo\n", timeout=60)
        assert (processes[0].returncode, out, said) == (0, "", "")
        for one in processes[1:]:
            out, said = one.communicate(timeout=60)
            assert (one.returncode, out, said) == (0, "{'do': 'one'}\n{'do': 'two'}\n", "")

"""What a run of the tests prints, and that it does not depend on how it was started."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HANDLER = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"


def test_skips_are_counted_by_reason(root: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-n", "0", "tests/kernels/test_gpu.py"]
    done = subprocess.run(command, cwd=root, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    counted = re.findall(r"^skipped (\d+): (.*)$", done.stdout, re.MULTILINE)
    assert [reason for _, reason in counted] == ["gpu: jax runs on cpu here"], done.stdout
    assert done.stdout.splitlines()[-1].strip("= ").startswith(f"{counted[0][0]} skipped in ")
    assert "SKIPPED" not in done.stdout
    assert done.stdout.count("\n") < 24


@pytest.fixture
def ignored() -> Iterator[None]:
    """As in a background job of a script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ignored", "ctrl_c")
def test_ctrl_c_reaches_a_test_that_asks_for_it_wherever_the_run_was_started() -> None:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert subprocess.run([sys.executable, "-c", HANDLER], capture_output=True, text=True).stdout == "True\n"

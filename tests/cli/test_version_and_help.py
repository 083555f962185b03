"""What somebody sees who has just installed it: `--version` in any state of the machine, and an example with every command."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import jax
import pytest

import ds4jax
from ds4jax.cli import main as cli
from ds4jax.cli.commands import version
from ds4jax.cli.options import parsers
from ds4jax.doctor import probe


def printed(**environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "ds4jax", "--version"], capture_output=True, text=True, check=True, env=os.environ | environment
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_version() -> None:
    lines = printed()
    assert lines[0] == f"ds4jax   {ds4jax.__version__}"
    assert lines[1] == f"jax      {metadata.version('jax')}"
    assert lines[2].endswith(jax.devices()[0].device_kind)
    path = "pallas share-warp" if jax.default_backend() == "gpu" else "jnp, quantised arithmetic"
    assert lines[3] == f"kernels  {path} (Q8_0, at most 32 rows)"
    assert len(lines) == 4


def test_version_tells_of_switches() -> None:
    assert printed(DS4JAX_STRICT="1")[3] == "kernels  jnp.dot, float32 (DS4JAX_STRICT=1)"
    assert printed(DS4JAX_NO_SHARE_WARP="1")[3] == "kernels  jnp, quantised arithmetic (DS4JAX_NO_SHARE_WARP=1)"


def test_version_where_jax_does_not_start() -> None:
    lines = printed(JAX_PLATFORMS="nowhere")
    assert lines[2].startswith("device   jax does not start: ")
    assert "nowhere" in lines[2]
    assert lines[3] == "kernels  none without a device"


def test_version_where_jax_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "PROGRAM", "import time; time.sleep(60)")
    monkeypatch.setattr(probe, "SECONDS", 0.2)
    began = time.monotonic()
    assert version.lines()[2:] == ["device   jax does not start: stopped after 0 s", "kernels  none without a device"]
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("parser", [*parsers(cli.build_parser())], ids=lambda parser: parser.prog)
def test_every_help_has_an_example(parser: argparse.ArgumentParser) -> None:
    text = parser.format_help()
    _, found, examples = text.rpartition("examples:\n")
    lines = [line for line in examples.splitlines() if line.startswith("  ")]
    assert found
    assert lines
    assert all(len(line) <= 110 for line in lines)
    assert all(parser.prog in line for line in lines)


def test_the_documentation_knows_every_command(root: Path) -> None:
    table = (root / "docs" / "reference" / "commands.md").read_text()
    names = [
        parser.prog for parser in [*parsers(cli.build_parser())][1:] if "bench" not in parser.prog or parser.prog.count(" ") > 1
    ]
    assert [name for name in names if not re.search(rf"`{name}[ `]", table)] == []

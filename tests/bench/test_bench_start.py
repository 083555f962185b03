"""`ds4jax bench start`: a warm process loads what a cold one compiled, and has its bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds4jax.bench import start
from ds4jax.cli import main as cli
from ds4jax.timing import PARTS

SECONDS = dict.fromkeys((*PARTS, "total", "without_load", "cpu", "traced", "compiled"), 1.0)


def content(**fingerprints: str) -> dict[str, Any]:
    runs = {name.replace("_", " "): SECONDS | {"fingerprint": fingerprint} for name, fingerprint in fingerprints.items()}
    return {"device": "A GPU", "jax": "0.11.2", "layout": None, "prompt": 8, "runs": runs}


def test_a_process_with_other_bits_fails(capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = content(cold="a", warm="a", warm_again="a"), content(cold="a", warm="a", warm_again="b")
    assert start.same_bits(good)
    assert not start.same_bits(bad)
    start.show(good)
    assert capsys.readouterr().out.splitlines()[-1] == "  bits of 64 tokens in all processes: the same"
    start.show(bad)
    assert capsys.readouterr().out.splitlines()[-1] == "  bits of 64 tokens in all processes: not the same: FAILED"


@pytest.mark.long
def test_warm_processes_compile_nothing_and_have_the_bits_of_the_cold_one(tmp_path: Path) -> None:
    out = tmp_path / "start.json"
    assert cli.main(["bench", "start", "--prompt", "40", "--json", str(out)]) == 0
    runs = json.loads(out.read_text())["runs"]
    assert list(runs) == list(start.RUNS)
    cold, *warm = (run["compiled"] for run in runs.values())
    assert cold >= 3
    assert warm == [0, 0]

"""Figures of the README and the documentation: those of benchmarks/results, or with a link to where they are from."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
SPEED = re.compile(r"\d[\d.,]*(?: |-)?(?:tokens/s|t/s|ms|µs|GB/s|TB/s)\b")


def _figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("figures", ROOT / "benchmarks" / "figures.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


figures = _figures()
DOCUMENTS = [pytest.param(path, id=str(path.relative_to(ROOT))) for path in figures.documents()]


@pytest.mark.parametrize("path", DOCUMENTS)
def test_figures_are_those_of_the_results(path: Path) -> None:
    """Otherwise write them again: `python benchmarks/figures.py`."""
    text = path.read_text()
    assert figures.filled(text) == text
    assert len(figures.MARKED.findall(text)) == text.count("<!-- figures: ") == text.count("<!-- end of figures -->")


@pytest.mark.parametrize("path", DOCUMENTS)
def test_a_speed_outside_of_them_has_its_source(path: Path) -> None:
    """In its line, as a link. Outputs of code blocks have tests of their own."""
    text = FENCE.sub("", figures.MARKED.sub("", path.read_text()))
    assert [line for line in text.splitlines() if SPEED.search(line) and "](http" not in line] == []


def test_the_documents_show_every_table() -> None:
    shown = {name for path in figures.documents() for _, name, _, _ in figures.MARKED.findall(path.read_text())}
    assert shown == set(figures.FIGURES)


def test_another_result_is_another_document(monkeypatch: pytest.MonkeyPatch) -> None:
    known = figures.result

    def faster(name: str) -> object:
        content = json.loads(json.dumps(known(name)))
        for row in content["rows"]:
            row["ms_per_step"] = 1.23
        return content

    before = (ROOT / "docs" / "performance" / "figures.md").read_text()
    monkeypatch.setattr(figures, "result", faster)
    monkeypatch.setattr(figures, "FIGURES", dict.fromkeys(figures.FIGURES, figures.FIGURES["decode"]))
    assert "| 1.23 |" in figures.filled(before)


def test_how_old_the_results_are(record_property: pytest.RecordProperty) -> None:
    """Reported and not judged: an old figure is true of its commit."""
    ages = figures.ages()
    assert len(ages) == len(list((ROOT / "benchmarks" / "results").glob("*.json")))
    assert [old for _, old in ages.values() if not (old.isdigit() or old.startswith("unknown: "))] == []
    told = ", ".join(f"{name.removeprefix('nvidia-')} {old}" for name, (_, old) in ages.items())
    record_property("summary", f"age of the figures, in commits that changed pallas_kernels: {told}")


def test_an_age_counts_commits_of_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    def committed(name: str) -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        git("add", ".")
        git("commit", "-qm", name)
        return git("rev-parse", "HEAD")

    monkeypatch.setattr(figures, "ROOT", tmp_path)
    assert figures.age("0" * 40) == "unknown: no history of git here"
    git("init", "-q")
    first, second, third = map(committed, ("pallas_kernels/a", "pallas_kernels/b", "README.md"))
    assert [figures.age(commit) for commit in (first, f"{first}-dirty", second, third)] == ["1", "1", "0", "0"]
    assert figures.age("0" * 40) == "unknown: its commit is not in this history"

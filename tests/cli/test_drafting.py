"""`ds4jax generate` with drafts: the same text, and figures that hold together."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import types
from pathlib import Path
from typing import Any

import jax
import pytest
from gguf_files import SMALL, write_small

from ds4jax.bounds import SHIPPED
from ds4jax.cli import main as cli
from ds4jax.cli.commands import model as models

PROMPT = "In the beginning"
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def without_mtp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model without an MTP block."""
    path = tmp_path_factory.mktemp("models") / "plain.gguf"
    write_small(path, dataclasses.replace(SMALL, n_mtp=0, compress_ratios=SMALL.compress_ratios[: SMALL.n_layers]))
    return path


def told(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    """The object of a `generate --json` that succeeds."""
    line = ["generate", PROMPT, "--max-new-tokens", str(NEW_TOKENS), "--ignore-eos", "--json", *map(str, arguments)]
    assert cli.main(line) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", PROMPT, *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    return err


def check_figures(fields: dict[str, Any], tried: int) -> None:
    """Counts and times of one run, to the digits that are printed."""
    assert len(fields["tokens"]) == NEW_TOKENS
    assert fields["tokens_per_step"] * fields["steps"] == pytest.approx(NEW_TOKENS, rel=1e-3)
    assert fields["tokens_per_second"] == pytest.approx(1e3 * fields["tokens_per_step"] / fields["ms_per_step"], rel=1e-2)
    assert len(fields["acceptance"]) == tried
    assert all(0 <= share <= 1 for share in fields["acceptance"])
    counts = [pair for pair in zip(fields["stood"], fields["tried"], strict=True) if pair[1]]
    assert fields["acceptance"] == [round(stood / count, 4) for stood, count in counts]
    # A draft is tried where the one before it stood.
    assert all(later[1] <= earlier[0] for earlier, later in itertools.pairwise(counts))


@pytest.mark.long
def test_every_depth_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    plain = told(capsys, "--draft", "0")
    assert (plain["draft"], plain["strict"], plain["steps"], plain["tokens_per_step"]) == (0, False, NEW_TOKENS, 1.0)
    check_figures(plain, 0)
    for word, draft in (("1", 1), ("2", 2)):
        drafted = told(capsys, "--draft", word)
        assert drafted["draft"] == draft
        assert (drafted["tokens"], drafted["text"]) == (plain["tokens"], plain["text"])
        assert NEW_TOKENS / (1 + draft) <= drafted["steps"] < NEW_TOKENS
        check_figures(drafted, draft)
    assert told(capsys, "--drafter", "mtp")["draft"] == 2


def test_auto_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    auto = told(capsys, "--draft", "auto")
    assert (auto["draft"], auto["drafter"]) == ("auto", "mtp")
    known = jax.default_backend() == "cpu"
    assert auto["costs"].startswith("the package's table for tiny.gguf on cpu" if known else "measured here")
    assert auto["tokens"] == told(capsys, "--draft", "0")["tokens"]
    check_figures(auto, len(auto["acceptance"]))


@pytest.mark.slow
def test_strict(capsys: pytest.CaptureFixture[str]) -> None:
    strict = told(capsys, "--strict", "--drafter", "mtp")
    assert (strict["strict"], strict["draft"]) == (True, 2)
    check_figures(strict, 2)
    assert strict["tokens"] == told(capsys, "--strict", "--draft", "0")["tokens"]


@pytest.mark.slow
def test_max_draft_0_is_the_loop_without_drafts(capsys: pytest.CaptureFixture[str]) -> None:
    narrow = told(capsys, "--max-draft", "0")
    assert (narrow["draft"], narrow["steps"]) == (0, NEW_TOKENS)
    check_figures(narrow, 0)
    assert "draft is 1, but " in refused(capsys, "--max-draft", "0", "--draft", "1")
    assert "was opened with max_draft 0" in refused(capsys, "--max-draft", "0", "--draft", "auto")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--drafter mtp", None),
        (f"--drafter-file {SHIPPED}", None),
        ("--draft 0", None),
        ("--draft auto", None),
        ("--draft 2", None),
        ("--draft 3", 3),
        ("--draft 4", 4),
        ("--max-draft 4", 4),
        ("--draft 1 --max-draft 3", 3),
        ("--draft 0 --max-draft 0", 0),
    ],
)
def test_only_a_depth_above_the_default_needs_another_program(line: str, expected: int | None) -> None:
    options = cli.build_parser().parse_args(["generate", PROMPT, *line.split()])
    checkpoint = types.SimpleNamespace(opened_with="mtp", config=SMALL)
    assert models.max_drafts(options, checkpoint, drafting=models.asks_for_drafts(options)) == expected


@pytest.mark.parametrize(("backend", "expected"), [("cpu", 0), ("gpu", None)])
def test_a_cpu_drafts_only_when_asked(backend: str, expected: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of one row, so that drafting is never slower than not drafting."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    options = cli.build_parser().parse_args(["generate", PROMPT])
    checkpoint = types.SimpleNamespace(opened_with="mtp", config=SMALL)
    assert models.max_drafts(options, checkpoint, drafting=models.asks_for_drafts(options)) == expected


@pytest.mark.long
def test_by_default_a_cpu_runs_the_loop_without_drafts(capsys: pytest.CaptureFixture[str]) -> None:
    usual, narrow = told(capsys), told(capsys, "--max-draft", "0")
    on_cpu = jax.default_backend() == "cpu"
    assert (usual["drafter"], usual["draft"]) == (("none", 0) if on_cpu else ("mtp", 2))
    assert usual["tokens"] == narrow["tokens"]
    assert not on_cpu or usual["fingerprint"] == narrow["fingerprint"]


def test_a_depth_that_the_drafter_cannot_make_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "--draft", "5")
    assert "draft is 5; the mtp drafter makes at most 4 drafts a step" in said
    assert "max-draft" not in said
    assert "max-draft is 5; the mtp drafter" in refused(capsys, "--max-draft", "5")
    assert "draft is 6; the dspark drafter makes at most 5" in refused(capsys, "--drafter", "dspark", "--draft", "6")


def test_stats_tell_the_acceptance(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["generate", PROMPT, "--max-new-tokens", str(NEW_TOKENS), "--ignore-eos", "--stats"]
    assert cli.main([*line, "--draft", "2"]) == 0
    number = r"\d+\.\d\d"
    share = rf"\d+ of \d+ \({number}\)"
    figures = rf"draft 2 by mtp: {number} tokens a step of {number} ms, accepted by depth: {share}, {share}"
    assert re.fullmatch(figures, capsys.readouterr().err.splitlines()[1])
    assert cli.main([*line, "--draft", "0"]) == 0
    assert re.fullmatch(rf"draft 0 by mtp: 1\.00 tokens a step of {number} ms", capsys.readouterr().err.splitlines()[1])


@pytest.mark.parametrize("draft", ["1", "4", "auto"])
def test_drafting_needs_the_block(capsys: pytest.CaptureFixture[str], without_mtp: Path, draft: str) -> None:
    line = refused(capsys, "--model", without_mtp, "--draft", draft)
    assert line.startswith(f"ds4jax: error: {without_mtp}: mtp: these weights have no MTP block")
    assert line.endswith("drafting needs that block, so use draft 0 and max_draft 0\n")


def test_a_loop_that_can_draft_needs_the_block_too(capsys: pytest.CaptureFixture[str], without_mtp: Path) -> None:
    assert "no MTP block" in refused(capsys, "--model", without_mtp, "--draft", "0", "--max-draft", "2")


@pytest.mark.long
def test_without_the_block_nothing_is_drafted(capsys: pytest.CaptureFixture[str], without_mtp: Path) -> None:
    plain = told(capsys, "--model", without_mtp)
    assert (plain["draft"], plain["steps"]) == (0, NEW_TOKENS)
    check_figures(plain, 0)
    assert told(capsys, "--model", without_mtp, "--draft", "0")["tokens"] == plain["tokens"]

"""`ds4jax vectors` on fixtures of the recorded form, made from the shipped model's own logits."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numerics import END_TO_END

import ds4jax
from ds4jax.cli import main as cli
from ds4jax.errors import InputError
from ds4jax.evaluation import vectors

PROMPTS = {"short_king": "And the king said unto him,", "long_list": "begat and begat; " * 9 + "\n", "ends": "Amen."}
STEPS, TOP = 3, 20


@pytest.fixture(scope="module")
def model() -> ds4jax.LanguageModel:
    return ds4jax.load()


@pytest.fixture(scope="module")
def records(model: ds4jax.LanguageModel) -> str:
    """official.vec for the shipped model: every number from strict `model.logits` of the whole text, in one prefill."""
    tokenizer = model.tokenizer
    lines = ["# what the tiny model says", ""]
    for name, prompt in PROMPTS.items():
        rendered = "<｜begin▁of▁sentence｜><｜User｜>{}<｜Assistant｜></think>".split("{}")
        ids = [*tokenizer.encode(rendered[0], parse_special=True), *tokenizer.encode(prompt)]
        ids += tokenizer.encode(rendered[1], parse_special=True)
        lines.append(f"case {name} 4096 {STEPS} tests/test-vectors/prompts/{name}.txt")
        for i in range(STEPS):
            logits = model.logits(ids, strict=True)["logits"][-1].astype(np.float64)
            logprobs = logits - np.log(np.exp(logits).sum())
            best = np.argsort(-logits)[:TOP]
            lines.append(f"step {i} {tokenizer.token_bytes(best[0]).hex()} {TOP}")
            lines += [f"top {tokenizer.token_bytes(i).hex()} {logprobs[i]:.9g}" for i in best]
            ids.append(int(best[0]))
        lines += ["end", ""]
    return "\n".join(lines)


@pytest.fixture
def folder(tmp_path: Path, records: str) -> Path:
    (tmp_path / "prompts").mkdir()
    for name, prompt in PROMPTS.items():
        (tmp_path / "prompts" / f"{name}.txt").write_text(prompt)
    (tmp_path / "official.vec").write_text(records)
    return tmp_path


def changed(folder: Path, change: Callable[[list[str]], None]) -> None:
    """Edit the records' lines in place."""
    path = folder / "official.vec"
    lines = path.read_text().split("\n")
    change(lines)
    path.write_text("\n".join(lines))


def compared(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> tuple[int, dict]:
    code = cli.main(["vectors", "--from", str(folder), "--json", *options])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("mode", [[], pytest.param(["--strict"], marks=pytest.mark.slow)])
@pytest.mark.slow
def test_own_fixtures_agree(capsys: pytest.CaptureFixture[str], folder: Path, mode: list[str]) -> None:
    code, told = compared(capsys, folder, *mode)
    assert (code, told["equal"], told["skipped"]) == (0, True, [])
    assert [row["id"] for row in told["fixtures"]] == list(PROMPTS)
    for row in told["fixtures"]:
        assert (row["steps"], row["selected"], row["failures"], row["equal"]) == (STEPS, STEPS, [], True)
        assert row["compared"] + row["missing"] == STEPS * TOP
        assert row["compared"] > STEPS * TOP - 5
        # The records are strict; the default mode may quantise activations where it decodes.
        assert not mode or row["largest"] < END_TO_END
    assert cli.main(["vectors", "--from", str(folder), *mode]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("short_king: agrees, after ")
    assert lines[-1] == "3 of 3 agree"


@pytest.mark.long
def test_another_token_selected(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    def change(lines: list[str]) -> None:
        step = next(i for i, line in enumerate(lines) if line.startswith("step 1 "))
        second = lines[step + 2].split()[1]
        lines[step] = f"step 1 {second} {TOP}"

    changed(folder, change)
    code, told = compared(capsys, folder)
    first = told["fixtures"][0]
    assert (code, told["equal"], first["equal"], first["selected"] < STEPS) == (1, False, False, True)
    assert first["failures"][0].startswith("step 1: ")
    assert "the model selects" in first["failures"][0]
    assert [row["equal"] for row in told["fixtures"]] == [False, True, True]
    assert compared(capsys, folder, "--skip", "short_king") == (
        0,
        told | {"equal": True, "skipped": ["short_king"], "fixtures": told["fixtures"][1:]},
    )
    assert cli.main(["vectors", "--from", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "short_king: DISAGREES" in lines[0]
    assert lines[-1] == "2 of 3 agree"


@pytest.mark.parametrize(
    ("shift", "code"), [(3.9, 0), (-4.1, 1), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((-3.9, 0), (4.1, 1)))]
)
@pytest.mark.long
def test_log_probabilities_may_differ_by_less_than_four(
    capsys: pytest.CaptureFixture[str], folder: Path, shift: float, code: int
) -> None:
    def change(lines: list[str]) -> None:
        top = [i for i, line in enumerate(lines) if line.startswith("top ")][7]
        _, token, logprob = lines[top].split()
        lines[top] = f"top {token} {float(logprob) + shift}"

    changed(folder, change)
    found, told = compared(capsys, folder, "--strict")
    first = told["fixtures"][0]
    assert (found, first["equal"], first["selected"]) == (code, not code, STEPS)
    assert first["largest"] == pytest.approx(abs(shift), abs=END_TO_END)
    assert len(first["failures"]) == code
    assert not code or "the log-probability of" in first["failures"][0]


@pytest.mark.long
def test_alternatives_that_are_no_token_are_counted(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    def change(lines: list[str]) -> None:
        top = [i for i, line in enumerate(lines) if line.startswith("top ")][4]
        lines[top] = f"top {b'not one token'.hex()} -30"

    before = compared(capsys, folder)[1]["fixtures"][0]
    changed(folder, change)
    code, told = compared(capsys, folder)
    assert code == 0
    assert told["fixtures"][0]["missing"] == before["missing"] + 1
    assert told["fixtures"][0]["compared"] == before["compared"] - 1


@pytest.mark.long
def test_a_selected_token_that_the_vocabulary_lacks(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    changed(folder, lambda lines: lines.__setitem__(3, f"step 0 {b'not one token'.hex()} {TOP}"))
    code, told = compared(capsys, folder)
    assert code == 1
    assert "does not have as one token" in told["fixtures"][0]["failures"][0]


CASE = "case a 64 1 prompts/a.txt\n"
MALFORMED = [
    ("", "official.vec: no record"),
    ("# only this\n", "official.vec: no record"),
    ("hello\n", "official.vec: line 1: 'hello' is unknown"),
    ("end\n", "official.vec: line 1: 'end' outside a record"),
    ("\ncase a 64 1\n", "official.vec: line 2: 4 words; the form is: case ID CTX STEPS FILE"),
    ("case a x 1 a.txt\n", "official.vec: line 1: CTX is 'x'"),
    ("case a 64 0 a.txt\n", "official.vec: line 1: STEPS is '0'"),
    ("case a 64 1 prompts/none.txt\n", "none.txt: cannot be read: No such file"),
    ("case a 64 1 prompts/empty.txt\n", "empty.txt: the file is empty"),
    ("case a 64 1 prompts/latin.txt\n", "latin.txt: not UTF-8 at byte 0"),
    (CASE, "official.vec: case a: no line 'end' closes it"),
    (CASE + "step 0 41 0\n" + CASE, "official.vec: case a: no line 'end' closes it"),
    (CASE + "end\n", "official.vec: line 2: case a promised 1 steps and has 0"),
    (CASE + "top 41 -1\n", "official.vec: line 2: one top line more"),
    (CASE + "step 1 41 0\n", "official.vec: line 2: step 1; steps count from 0 to 0"),
    (CASE + "step 0 41 0\nstep 1 41 0\n", "official.vec: line 3: step 1; steps count from 0 to 0"),
    (CASE + "step 0 4 0\n", "official.vec: line 2: HEX is '4'"),
    (CASE + "step 0 zz 0\n", "official.vec: line 2: HEX is 'zz'"),
    (CASE + "step 0 41 -1\n", "official.vec: line 2: COUNT is '-1'"),
    (CASE + "step 0 41 2\ntop 41 -1\nend\n", "official.vec: line 4: step 0 promised 2 top lines and has 1"),
    (CASE + "step 0 41 1\ntop 41 -1\ntop 42 -2\nend\n", "official.vec: line 4: one top line more"),
    (CASE + "step 0 41 1\ntop 41 nan\nend\n", "official.vec: line 3: LOGPROB is 'nan'"),
    (CASE + "step 0 41 1\ntop 41 low\nend\n", "official.vec: line 3: LOGPROB is 'low'"),
    (CASE + "step 0 41 1\ntop 41\nend\n", "official.vec: line 3: 2 words; the form is: top HEX LOGPROB"),
    (CASE + "step 0 41 0\nend now\n", "official.vec: line 3: 2 words; the form is: end"),
    ((CASE + "step 0 41 0\nend\n") * 2, "official.vec: line 4: case a: an id that an earlier record has"),
]


@pytest.mark.parametrize(("records", "message"), MALFORMED, ids=[message for _, message in MALFORMED])
def test_malformed_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, records: str, message: str
) -> None:
    monkeypatch.setattr("ds4jax.cli.commands.model.open_model", lambda options, **_: pytest.fail("a model was opened"))
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "a.txt").write_text("A")
    (tmp_path / "prompts" / "empty.txt").touch()
    (tmp_path / "prompts" / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "official.vec").write_text(records)
    with pytest.raises(SystemExit) as ended:
        cli.main(["vectors", "--from", str(tmp_path)])
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_folders_and_names_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "a.txt").write_text("A")
    records = "".join(f"case {name} 64 1 prompts/a.txt\nstep 0 41 0\nend\n" for name in PROMPTS)
    (tmp_path / "official.vec").write_text(records)
    for line, message in (
        (["--from", str(tmp_path / "none")], "none: no such folder"),
        (["--from", str(tmp_path / "prompts")], "official.vec: cannot be read: No such file"),
        (["--from", str(tmp_path), "--skip", "nobody"], "--skip nobody: "),
        (["--from", str(tmp_path), *sum((["--skip", name] for name in PROMPTS), [])], "--skip leaves no fixture"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["vectors", *line])
        err = capsys.readouterr().err
        assert (ended.value.code, err.count("\n")) == (2, 1)
        assert message in err


def test_a_fixture_longer_than_the_context(model: ds4jax.LanguageModel) -> None:
    fixture = vectors.Fixture("long", "word " * model.config.max_context, (vectors.Step(b"A", ()),))
    with pytest.raises(InputError, match=f"case long: .* the model's context of {model.config.max_context}"):
        next(vectors.compare(model, [fixture]))


@pytest.mark.weights
def test_published_weights_agree_with_the_published_vectors() -> None:
    if not os.environ.get("DS4JAX_VECTORS"):
        pytest.skip("DS4JAX_VECTORS does not name a folder with official.vec")
    line = ["vectors", "--model", os.environ["DS4JAX_WEIGHTS"], "--from", os.environ["DS4JAX_VECTORS"]]
    # The two that the project itself leaves out.
    assert cli.main([*line, "--skip", "long_memory_archive", "--skip", "short_code_completion"]) == 0

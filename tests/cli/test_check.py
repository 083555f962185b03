"""`ds4jax check` and `model.check()`: what they compare, and that they can fail."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dspark_files import unpack
from gguf_files import SMALL, write_small

import ds4jax
from ds4jax.cli import main as cli
from ds4jax.decode import loop as decode
from ds4jax.engine.compile import programs
from ds4jax.engine.loaded import Loaded
from ds4jax.engine.options import Options, Result
from ds4jax.evaluation import check
from ds4jax.evaluation.check import difference

HUB = Path(__file__).parents[1] / "golden" / "hub"
PROMPT = "And it came to pass in the days of"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens, for models whose drafts do not matter."""
    monkeypatch.setattr(check, "NEW_TOKENS", 12)


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def small(folder: Path) -> Path:
    """A small model of random weights."""
    write_small(folder / "small.gguf")
    return folder / "small.gguf"


def printed(capsys: pytest.CaptureFixture[str], code: int, *arguments: str | Path) -> list[str]:
    """Lines on stdout of `ds4jax check` when it ends with this exit code and nothing on stderr."""
    assert cli.main(["check", *map(str, arguments)]) == code
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    return err


@pytest.mark.slow
def test_the_shipped_model(capsys: pytest.CaptureFixture[str], prompt_file: Path) -> None:
    # Loading has programs of its own, which split blocks into planes.
    tokenizer = ds4jax.load().tokenizer
    known = set(programs())
    lines = printed(capsys, 0, "--prompt-file", prompt_file, "--max-draft", "2")
    # Of each mode a loop and the prompt's program, of both the start state and the filters; what others compiled before is not
    # compiled again.
    assert len(set(programs()) - known) <= 6
    length = 1 + len(tokenizer.encode(PROMPT))
    assert lines[0] == f"tiny.gguf on {jax.devices()[0].device_kind}, prompts of {length} tokens (given), 96 new tokens"
    assert lines[1] == "drafts of 1 to 2 a step by mtp against none, in one program that can draft 2"
    assert lines[-1] == "all 8 comparisons equal, in every token and every bit of the logits it was chosen from"
    cases = [(0, "itself again"), (1, "draft 0"), (2, "draft 0"), (2, "itself again")]
    expected = [(mode, *case) for mode in ("default", "strict ") for case in cases]
    for line, (mode, draft, against) in zip(lines[2:-1], expected, strict=True):
        assert line.startswith(f"prompt {length:<4} {mode}  draft {draft} against {against:<12}  96 tokens, ")
        assert line.endswith(" a step: equal")
        # Comparing says something only where drafts stand.
        assert (float(line.split()[-4]) > 1.2) is (draft > 0)


@pytest.mark.long
def test_json(capsys: pytest.CaptureFixture[str], prompt_file: Path) -> None:
    (line,) = printed(capsys, 0, "--prompt-file", prompt_file, "--max-draft", "2", "--no-strict", "--json")
    told = json.loads(line)
    assert (told["equal"], told["drafter"], told["max_draft"], told["new_tokens"], told["left_out"]) == (True, "mtp", 2, 96, [])
    assert (told["model"], told["jax"], told["device"]) == ("tiny.gguf", jax.__version__, jax.devices()[0].device_kind)
    assert [(row["draft"], row["against"]) for row in told["rows"]] == [(0, 0), (1, 0), (2, 0), (2, 2)]
    for row in told["rows"]:
        assert (row["strict"], row["tokens"], row["difference"], row["equal"]) == (False, 96, None, True)
        assert (row["tokens_per_step"] > 1.2) is (row["draft"] > 0)


@pytest.mark.slow
def test_every_depth_and_length(small: Path, short: None) -> None:
    report = ds4jax.load(small, max_draft=4).check(strict=False)
    depths = [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (4, 4)]
    assert [(row.prompt_tokens, row.draft, row.against) for row in report.rows] == [
        (length, *depth) for length in check.LENGTHS for depth in depths
    ]
    assert len(report.rows) == report.plan.comparisons
    assert report.equal
    assert str(report).splitlines() == [*map(str, report.rows), report.verdict]


def test_a_model_opened_for_fewer_drafts_is_checked_that_deep(small: Path) -> None:
    model = ds4jax.load(small)
    assert check.plan(model).depths == (1, 2)
    assert check.plan(model.with_max_draft(4)).depths == (1, 2, 3, 4)
    assert check.plan(model.with_max_draft(0)).depths == ()


def test_long_is_the_whole_matrix() -> None:
    plan = check.plan(ds4jax.load(max_draft=4), long=True)
    assert [len(ids) for ids in plan.prompts] == [1, 3, 127, 128, 129, 500]
    assert (plan.new_tokens, plan.stricts, plan.depths, plan.left_out) == (256, (False, True), (1, 2, 3, 4), ())
    assert plan.comparisons == 6 * 2 * 6


@pytest.mark.long
def test_ngrams(capsys: pytest.CaptureFixture[str], small: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(8 * PROMPT)
    chosen = ["--drafter", "ngram", "--max-draft", "3", "--no-strict"]
    lines = printed(capsys, 0, "--model", small, "--prompt-file", tmp_path / "prompt.txt", *chosen)
    assert lines[1] == "drafts of 1 to 3 a step by ngram against none, in one program that can draft 3"
    assert len(lines[2:-1]) == 5
    assert lines[-1] == "all 5 comparisons equal, in every token and every bit of the logits it was chosen from"


@pytest.mark.long
def test_dspark(capsys: pytest.CaptureFixture[str], tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "LENGTHS", (40,))
    told = printed(capsys, 0, "--model", unpack(tmp_path).hub, "--no-qat", "--no-strict", "--json")
    fields = json.loads("".join(told))
    assert (fields["drafter"], fields["max_draft"], fields["equal"]) == ("dspark", 5, True)
    assert [row["draft"] for row in fields["rows"]] == [0, 1, 2, 3, 4, 5, 5]


@pytest.mark.slow
def test_without_an_mtp_block(capsys: pytest.CaptureFixture[str], folder: Path, prompt_file: Path, short: None) -> None:
    path = folder / "plain.gguf"
    write_small(path, dataclasses.replace(SMALL, n_mtp=0, compress_ratios=SMALL.compress_ratios[: SMALL.n_layers]))
    lines = printed(capsys, 0, "--model", path, "--prompt-file", prompt_file)
    assert lines[1] == "no drafter in these weights: the same call is made twice, nothing else can be compared"
    assert ["draft 0 against itself again" in line for line in lines] == [False, False, True, True, False]


@pytest.mark.slow
def test_without_a_tokenizer_the_prompts_are_random(capsys: pytest.CaptureFixture[str], prompt_file: Path, short: None) -> None:
    lines = printed(capsys, 0, "--model", HUB, "--max-draft", "0", "--no-strict")
    assert "(random tokens, since there is no tokenizer)" in lines[0]
    assert lines[1] == "no drafts with --max-draft 0: the same call is made twice, nothing else can be compared"
    assert "tokenizer: none in these files" in refused(capsys, "--model", HUB, "--prompt-file", prompt_file)


@pytest.mark.slow
def test_what_the_context_cannot_hold_is_left_out(capsys: pytest.CaptureFixture[str], folder: Path, short: None) -> None:
    path = folder / "narrow.gguf"
    write_small(path, dataclasses.replace(SMALL, max_context=140))
    lines = printed(capsys, 0, "--model", path, "--no-strict", "--max-draft", "1")
    assert "prompts of 3, 128 tokens" in lines[0]
    assert lines[1] == "left out: prompts of 500 tokens; the context holds 140"
    assert not any(line.startswith("prompt 500") for line in lines)
    path = folder / "none.gguf"
    write_small(path, dataclasses.replace(SMALL, max_context=14))
    line = refused(capsys, "--model", path)
    assert "its context of 14 has no room for a prompt of 3 tokens and 12 new ones" in line


@pytest.mark.long
def test_a_bit_that_a_draft_changes_is_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, small: Path, prompt_file: Path, short: None
) -> None:
    generated = check.generated

    def flipped(model: Loaded, prompt: np.ndarray, options: Options) -> Result:
        result = generated(model, prompt, options)
        if options.draft == 2:
            fingerprints = result.fingerprints.copy()
            fingerprints[7, 0] ^= 1
            return dataclasses.replace(result, fingerprints=fingerprints)
        return result

    monkeypatch.setattr(check, "generated", flipped)
    arguments = ["--model", small, "--prompt-file", prompt_file, "--no-strict"]
    lines = printed(capsys, 1, *arguments)
    assert lines[-1] == "1 of 6 comparisons differ"
    (line,) = (line for line in lines if "DIFFERENT" in line)
    assert "draft 2 against draft 0 " in line
    assert line.endswith("DIFFERENT: new token 8 is the same, the bits of its logits are not")
    told = json.loads(printed(capsys, 1, *arguments, "--json")[0])
    assert not told["equal"]
    assert [row["equal"] for row in told["rows"]] == [True, True, False, True, True, True]


@pytest.mark.long
def test_drafts_that_stand_without_being_right_are_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path, prompt_file: Path, short: None
) -> None:
    accept = decode.accept

    def credulous(logits_SWV: jax.Array, drafts: Any, depth_S: jax.Array, *rest: Any, strict: bool) -> Any:
        _, follower_S = accept(logits_SWV, drafts, depth_S, *rest, strict=strict)
        best_S = jnp.argmax(jnp.take_along_axis(logits_SWV, depth_S[:, None, None], axis=1)[:, 0], axis=1).astype(jnp.int32)
        return depth_S, jnp.where(depth_S > 0, best_S, follower_S)

    monkeypatch.setattr(decode, "accept", credulous)
    # A shape of its own: the loop that is compiled with this fault serves no other test.
    path = folder / "credulous.gguf"
    write_small(path, dataclasses.replace(SMALL, max_context=777))
    lines = printed(capsys, 1, "--model", path, "--prompt-file", prompt_file, "--no-strict", "--max-draft", "2")
    different = [line for line in lines if "DIFFERENT: new token " in line]
    assert [line.split(" against ")[0][-7:] for line in different] == ["draft 1", "draft 2"]
    assert lines[-1] == "2 of 4 comparisons differ"


@pytest.mark.slow
def test_a_call_that_does_not_repeat_is_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, small: Path, prompt_file: Path, short: None
) -> None:
    generated, calls = check.generated, itertools.count()

    def restless(model: Loaded, prompt: np.ndarray, options: Options) -> Result:
        result = generated(model, prompt, options)
        return dataclasses.replace(result, ids=(*result.ids[:-1], 5)) if next(calls) == 1 else result

    monkeypatch.setattr(check, "generated", restless)
    lines = printed(capsys, 1, "--model", small, "--prompt-file", prompt_file, "--no-strict")
    (line,) = (line for line in lines if "DIFFERENT" in line)
    assert "draft 0 against itself again" in line
    assert "DIFFERENT: new token 12 is 5, not " in line


@pytest.mark.slow
def test_the_bar_stays_off_stdout(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, prompt_file: Path, short: None
) -> None:
    arguments = ["check", "--prompt-file", str(prompt_file), "--max-draft", "2", "--no-strict"]
    assert cli.main(arguments) == 0
    unseen = capsys.readouterr().out
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert out == unseen
    assert "comparing" in err


def result(ids: list[int], fingerprints: list[int]) -> Result:
    marks = np.array(fingerprints, np.uint32)[:, None]
    return Result((1,), tuple(ids), "", "length", 1.0, 1.0, 0, "none", False, 1, 1.0, (), (), 1.0, marks)


@pytest.mark.parametrize(
    ("ids", "fingerprints", "words"),
    [
        ([4, 5, 6], [7, 8, 9], None),
        ([4, 3, 6], [7, 8, 9], "new token 2 is 3, not 5"),
        ([4, 5, 2], [7, 8, 1], "new token 3 is 2, not 6"),
        ([4, 5, 2], [7, 1, 9], "new token 2 is the same, the bits of its logits are not"),
        ([4, 5], [7, 8], "it has 2 new tokens, not 3"),
        ([4, 5, 6], [7, 8, 9, 1], "the bits of the stop token's logits are not the same"),
    ],
)
def test_where_two_results_differ(ids: list[int], fingerprints: list[int], words: str | None) -> None:
    assert difference(result([4, 5, 6], [7, 8, 9]), result(ids, fingerprints)) == words

"""The commands on the tiny model that ships with the package."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ds4jax
from ds4jax.bounds import HELD_OUT_TEXT, SHIPPED, TRAINING_EXTRACT
from ds4jax.cli import main as cli
from ds4jax.engine.generation import Generation
from ds4jax.timing import PARTS

PROMPT = "In the beginning"
COMMAND = [sys.executable, "-m", "ds4jax"]
# Takes seconds, so that a test which has read a few bytes can still act; a longer one would compile for a larger buffer.
LONG = [*COMMAND, "generate", PROMPT, "--ignore-eos", "--max-new-tokens", "480", "--temperature", "1"]


@pytest.fixture(scope="module")
def model() -> ds4jax.LanguageModel:
    return ds4jax.load()


def output(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[str, str]:
    """What a command that succeeds prints on stdout and stderr."""
    assert cli.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr()


def error(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line of a command that refuses its input."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    return err


def test_generate_streams_the_continuation_alone(capsys: pytest.CaptureFixture[str], model: ds4jax.LanguageModel) -> None:
    done = subprocess.run([*COMMAND, "generate", PROMPT, "--max-new-tokens", "24", "--stats"], capture_output=True, check=True)
    expected = model.generate(PROMPT, max_new_tokens=24)
    assert done.stdout.decode() == expected.text
    assert f"{len(expected.ids)} new tokens" in done.stderr.decode()
    assert "tokens/s" in done.stderr.decode()
    told = done.stderr.decode().splitlines()[-1].removeprefix("first token after ")
    total, parts = told.split(" s: ")
    seconds = {name: float(number) for name, number in (part.split() for part in parts.split(", "))}
    assert tuple(seconds) == PARTS
    assert sum(seconds.values()) == pytest.approx(float(total), abs=0.05)
    assert min(seconds[part] for part in ("import", "load", "compile", "decode")) > 0
    out, err = output(capsys, "generate", PROMPT, "--max-new-tokens", "24")
    assert (out, err) == (expected.text, "")


def test_generate_json(capsys: pytest.CaptureFixture[str], model: ds4jax.LanguageModel, tmp_path: Path) -> None:
    out, err = output(capsys, "generate", PROMPT, "--max-new-tokens", "24", "--json")
    told = json.loads(out)
    expected = model.generate(PROMPT, max_new_tokens=24)
    assert err == ""
    about_drafts = ["draft", "drafter", "strict", "steps", "tokens_per_step", "ms_per_step", "tried", "stood", "acceptance"]
    assert list(told) == ["prompt_tokens", "tokens", "text", "tokens_per_second", "finish_reason", "fingerprint", *about_drafts]
    prompt_ids = [model.config.bos_id, *model.tokenizer.encode(PROMPT)]
    assert told["prompt_tokens"] == len(prompt_ids)
    assert tuple(told["tokens"]) == expected.ids
    assert told["text"] == expected.text
    assert told["finish_reason"] == expected.finish_reason
    assert told["tokens_per_second"] > 0

    np.save(tmp_path / "ids.npy", np.array(prompt_ids))
    line = ("generate", "--ids", tmp_path / "ids.npy", "--max-new-tokens", "24", "--json", "--stats", "--chunk", "4")
    from_ids = json.loads(output(capsys, *line)[0])
    assert tuple(from_ids.pop("start")) == (*PARTS, "total")
    # A short chunk rounds activations, so logits have other bits.
    for other in ("tokens_per_second", "ms_per_step", "fingerprint"):
        del told[other], from_ids[other]
    assert from_ids == told


def test_seeds_reproduce(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["generate", PROMPT, "--max-new-tokens", "24", "--temperature", "1.5", "--top-k", "40", "--min-p", "0.01", "--seed"]
    first, again, other = (output(capsys, *line, seed)[0] for seed in ("1", "1", "2"))
    assert first == again != other


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_with_the_text_so_far() -> None:
    with subprocess.Popen([*LONG, "--stats"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        begun = process.stdout.read(8)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len((begun + rest).decode()) >= 8
    told = r"\d+ prompt tokens, \d+ new tokens .* ended by: interrupted\ndraft (2 by mtp|0): .* a step .*\nfirst token after .*\n"
    assert re.fullmatch(told, err.decode())


def test_ctrl_c_leaves_a_whole_object(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: ds4jax.LanguageModel
) -> None:
    advance, calls = Generation.advance, []

    def interrupted(generation: Generation, budget: int) -> list[int]:
        calls.append(budget)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return advance(generation, budget)

    monkeypatch.setattr(Generation, "advance", interrupted)
    assert cli.main(["generate", PROMPT, "--max-new-tokens", "50", "--ignore-eos", "--json"]) == 130
    told = json.loads(capsys.readouterr().out)
    assert told["finish_reason"] == "interrupted"
    assert len(told["tokens"]) == sum(calls[:2])
    assert told["text"] == model.tokenizer.decode(told["tokens"])


def test_a_reader_who_leaves() -> None:
    with subprocess.Popen(LONG, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(4)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "inspect"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("ds4jax: error: ")


def test_prompts_that_the_model_cannot_take(
    capsys: pytest.CaptureFixture[str], model: ds4jax.LanguageModel, tmp_path: Path
) -> None:
    config, ids, out = model.config, tmp_path / "ids.npy", tmp_path / "out.npz"
    np.save(ids, np.array([1, config.vocab_size]))
    assert f"token id {config.vocab_size} is outside" in error(capsys, "generate", "--ids", ids)
    assert f"token id {config.vocab_size} is outside" in error(capsys, "logits", "--ids", ids, "--out", out)
    np.save(ids, np.ones(config.max_context + 1, np.int32))
    assert f"context is {config.max_context}" in error(capsys, "generate", "--ids", ids)
    assert f"context is {config.max_context}" in error(capsys, "logits", "--ids", ids, "--out", out)
    np.save(ids, np.ones(config.max_context, np.int32))
    assert "context" in error(capsys, "generate", "--ids", ids)
    assert "decode-from is 99" in error(capsys, "logits", "--prompt", PROMPT, "--decode-from", "99", "--out", out)
    assert sorted(tmp_path.iterdir()) == [ids]


@pytest.mark.parametrize("line", ["generate In --save", "logits --prompt In --out", "chat --session"])
def test_no_file_of_the_model_is_written_over(line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Not even by another name."""
    path, link = tmp_path / "model.gguf", tmp_path / "link"
    shutil.copy(SHIPPED, path)
    os.link(path, link)
    before = path.read_bytes()
    # A conversation goes on with a file that is there, and this one holds none.
    says = "header: " if "chat" in line else f"is {path} of the model"
    assert says in error(capsys, *line.split(), link, "--model", path)
    assert path.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("strict", [pytest.param(True, marks=pytest.mark.slow), False])
def test_logits(capsys: pytest.CaptureFixture[str], model: ds4jax.LanguageModel, tmp_path: Path, strict: bool) -> None:
    path = tmp_path / "scores"
    path.write_text("an older file")
    how = ["--strict"] if strict else []
    out, _ = output(capsys, "logits", "--prompt", PROMPT, "--mtp", "--decode-from", "2", "--out", path, *how)
    ids = model.encode(PROMPT)
    with np.load(path) as arrays:
        assert set(arrays) == {"ids", "logits", "mtp_logits"}
        assert arrays["ids"].dtype == np.int32
        assert arrays["logits"].dtype == arrays["mtp_logits"].dtype == np.float32
        assert arrays["mtp_logits"].shape == (len(ids) - 1, model.config.vocab_size)
        for name, expected in model.logits(ids, decode_from=2, mtp=True, strict=strict).items():
            np.testing.assert_array_equal(arrays[name], expected)
    assert out == ""
    assert list(tmp_path.iterdir()) == [path]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_inspect(capsys: pytest.CaptureFixture[str], model: ds4jax.LanguageModel) -> None:
    told = json.loads(output(capsys, "inspect", "--json")[0])
    assert told["kind"] == "gguf"
    assert told["config"]["dim"] == model.config.dim
    assert told["config"]["compress_ratios"] == list(model.config.compress_ratios)
    assert told["vocabulary"] == model.config.vocab_size
    assert told["bytes"] == sum(row["bytes"] for row in told["tensors"].values()) <= model.path.stat().st_size
    assert told["tensors"]["Q8_0"]["bytes"] * 32 == told["tensors"]["Q8_0"]["values"] * 34
    text, err = output(capsys, "inspect", model.path)
    assert err == ""
    for part in ("config", "dim", "Q8_0", f"{told['tensors']['Q8_0']['bytes']:,}", f"{model.config.vocab_size:,} tokens"):
        assert part in text


@pytest.mark.long
def test_eval(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(HELD_OUT_TEXT.read_bytes()[:1500])
    told = json.loads(output(capsys, "eval", "--text", text, "--json")[0])
    assert told["bytes"] == 1500
    assert 0 < told["bits_per_byte"] < 8
    assert 0 < told["baseline_bits_per_byte"] < 8
    assert "extract" in told["baseline_trained_on"]
    assert 0 <= told["mtp_agreement"] <= 1
    shown, _ = output(capsys, "eval", "--text", text)
    assert f"{told['bits_per_byte']:.4f} bits per byte" in shown
    assert f"{told['mtp_agreement']:.1%}" in shown


@pytest.mark.slow
def test_eval_of_what_ships(capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(output(capsys, "eval", "--json")[0])
    assert told["bytes"] == HELD_OUT_TEXT.stat().st_size
    assert told["bits_per_byte"] <= 1.65
    assert told["bits_per_byte"] < told["baseline_bits_per_byte"]
    assert told["mtp_agreement"] >= 0.45
    assert "records" in told["baseline_trained_on"]


def test_what_was_held_out_is_not_in_the_extract() -> None:
    """No hundred characters of it, wherever they begin."""
    held_out, extract = HELD_OUT_TEXT.read_text(), TRAINING_EXTRACT.read_text()
    shingles = {extract[start : start + 50] for start in range(0, len(extract) - 49, 50)}
    # Fifty of a hundred characters begin at a multiple of fifty in the extract, wherever the hundred do.
    assert [held_out[start : start + 50] for start in range(len(held_out) - 49) if held_out[start : start + 50] in shingles] == []
    assert extract[70:170][30:80] in shingles


@pytest.mark.parametrize("command", ["generate", "chat", "logits", "inspect", "convert", "eval", "vectors", "check", "bench"])
def test_help_has_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert f"examples:\n  ds4jax {command}" in capsys.readouterr().out


def test_inspect_dispatch(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(output(capsys, "inspect", "--dispatch", "--json")[0])["dispatch"]
    paths = {row["product"]: row for row in rows}
    assert paths["attn.wq_b"]["decode"] == {"cuda": "pallas", "default": "xla", "reason": "Q8_0, at most 32 rows"}
    assert paths["attn.wq_b"]["prefill"]["cuda"] == "bfloat16"
    assert paths["attn.wq_b"]["prefill"]["default"] == paths["attn.wq_b"]["strict"]["cuda"] == "dot"
    assert paths["attn.compressor.wkv"]["decode"]["reason"] == "float weights"
    assert paths["head"]["count"] == 1
    text = output(capsys, "inspect", "--dispatch")[0]
    assert "decode: pallas / xla (Q8_0, at most 32 rows); prefill: bfloat16 / dot" in text


@pytest.mark.parametrize(
    ("dense", "device", "path"),
    [(None, "F32", "dot"), ("f32", "F32", "dot"), ("bf16", "BF16", "dot"), ("q8_0", "Q8_0", "pallas")],
)
def test_inspect_dispatch_of_a_checkpoint_directory(
    dense: str | None, device: str, path: str, capsys: pytest.CaptureFixture[str], root: Path
) -> None:
    """The device's type decides, not the file's: that is what runs."""
    chosen = ["--dense", dense] if dense else []
    told = json.loads(output(capsys, "inspect", root / "tests" / "golden" / "hub", *chosen, "--dispatch", "--json")[0])
    (row,) = (row for row in told["dispatch"] if row["product"] == "attn.wq_b")
    assert (row["stored"], row["device"], row["decode"]["cuda"]) == ("F8_E4M3", device, path)
    (row,) = (row for row in told["dispatch"] if row["product"] == "attn.indexer.wq_b")
    assert (row["device"], row["decode"]["reason"]) == ("F32" if device == "F32" else "BF16", "float weights")

"""`ds4jax inspect`: the plan, the look at every value, and what commands that load say and refuse before they do."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from gguf_files import GOLDEN, rewrite, unpacked, write_small
from hub_files import read_raw, write_raw

from ds4jax import cli
from ds4jax.bench import synthetic
from ds4jax.commands import inspect
from ds4jax.commands import model as models
from ds4jax.errors import InputError
from ds4jax.loading import mtp_file
from ds4jax.loading import plan as plans
from pallas_kernels.dispatch import OPT_OUT

BROKEN = [case for case in json.loads((GOLDEN / "bad" / "index.json").read_text()) if case["stage"] == "values"]
HUB = GOLDEN.parent / "hub"


def output(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What `inspect` prints when it succeeds."""
    assert cli.main(["inspect", *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line that `inspect` ends with."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["inspect", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    return err


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Path, Path]:
    """A small model without its MTP block, and in another folder the file that holds it."""
    whole, main, block = tmp_path / "whole.gguf", tmp_path / "model.gguf", tmp_path / "apart" / "mtp.gguf"
    block.parent.mkdir()
    write_small(whole)
    rewrite(whole, main, "deepseek4", lambda name: not name.startswith("mtp."))
    rewrite(whole, block, mtp_file.ARCHITECTURE, lambda name: name.startswith("mtp."), keys=False)
    whole.unlink()
    return main, block


def options(model: Path, mtp: Path | None = None) -> argparse.Namespace:
    return argparse.Namespace(model=model, mtp_file=mtp, dense=None, qat=None, cache="float32")


def test_devices_are_those_of_the_plan() -> None:
    assert tuple(plans.DEVICES) == inspect.DEVICES


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(output(capsys, "--json", "--context", "700"))
    plan = told["plan"]
    assert told["device_bytes"] == sum(row["device_bytes"] for row in told["tensors"].values())
    assert told["bytes"] == sum(part["file"] for part in plan["classes"].values())
    assert told["device_bytes"] == sum(part["device"] for part in plan["classes"].values())
    assert told["mtp_path"] is None
    assert (plan["context"], plan["capacity"]) == (700, 1024)
    assert plan["needed"] == told["device_bytes"] + plan["cache"] + plan["working"]
    assert plan["token"] == plan["cache_token"] + sum(part["token"] for part in plan["classes"].values())
    assert {device["name"] for device in plan["devices"]} >= {"h100", "h200"}
    (alone,) = json.loads(output(capsys, "--json", "--device", "h200"))["plan"]["devices"]
    assert alone["name"] == "h200"
    assert alone["fits"]
    assert alone["largest_context"] == told["config"]["max_context"]
    text = output(capsys, "--context", "700", "--device", "h100")
    for part in (
        *plans.CLASSES,
        "cache of 700",
        f"{plan['draft'] / 1e6:,.1f} more",
        "h100: 80 GB: fits",
        "tokens/s",
        "in calls of 4,096",
    ):
        assert part in text
    assert "h200" not in text


def test_plan_of_a_narrow_cache(capsys: pytest.CaptureFixture[str]) -> None:
    """The tiny model's channels do not divide into blocks of FP8; a model of the hub's form does."""
    assert "cache is narrow, but qat is off" in refused(capsys, "--cache", "narrow")
    assert "--cache: invalid choice: 'wide'" in refused(capsys, "--cache", "wide")
    wide, narrow = (json.loads(output(capsys, HUB, "--json", "--cache", kind))["plan"] for kind in ("float32", "narrow"))
    assert narrow["cache_values"] == wide["cache_values"]
    assert wide["cache_bytes"] == 4 * wide["cache_values"]
    assert narrow["cache"] < wide["cache"]
    assert narrow["cache_token"] < wide["cache_token"]
    text = output(capsys, HUB, "--cache", "narrow")
    said = f"adds {narrow['cache_values']:,g} values to the cache, {narrow['cache_bytes']:,.0f} bytes\n"
    assert said in text


def test_plan_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert "context is 5000; it must be 1 to 4096" in refused(capsys, "--context", "5000")
    assert "--context" in refused(capsys, "--context", "0")
    assert "--device" in refused(capsys, "--device", "abacus")


def test_a_model_that_does_not_fit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plans.DEVICES, "h100", plans.Device("h100", 1_000_000_000, None))
    assert "h100: 1 GB: does not fit, no room for any context\n" in output(capsys, "--device", "h100")


def test_mtp_file(capsys: pytest.CaptureFixture[str], parts: tuple[Path, Path]) -> None:
    main, block = parts
    told = json.loads(output(capsys, main, "--mtp-file", block, "--json"))
    assert told["mtp_path"] == str(block)
    assert told["config"]["n_mtp"] == 1
    assert told["plan"]["classes"]["MTP"]["file"] > 0
    assert f"MTP block in {block}\n" in output(capsys, main, "--mtp-file", block)
    assert json.loads(output(capsys, main, "--json"))["plan"]["classes"]["MTP"]["file"] == 0
    assert "--mtp-file: missing.gguf: no such file" in refused(capsys, main, "--mtp-file", "missing.gguf")
    assert "goes with a GGUF model" in refused(capsys, HUB, "--mtp-file", block)
    assert output(capsys, main, "--mtp-file", block, "--check").startswith(f"{main}: ")


def test_commands_load_the_mtp_file(parts: tuple[Path, Path]) -> None:
    main, block = parts
    model = models.open_model(options(main, block))
    assert (model.config.n_mtp, model.max_draft, model.no_mtp) == (1, 2, "")
    model = models.open_model(options(main))
    assert (model.config.n_mtp, model.max_draft, model.no_mtp) == (0, 0, mtp_file.NONE)
    assert model.with_max_draft(0).no_mtp == mtp_file.NONE
    with pytest.raises(InputError, match=f"{main}: mtp: {mtp_file.NONE}"):
        model.logits([1, 2, 3], mtp=True)


def test_few_rows_of_the_published_types() -> None:
    (layers, mtp, head) = inspect.few_rows(synthetic.checkpoint(synthetic.config_of("flash-q2", 5), "flash-q2"))
    kernels = {"rows": 8, "cuda": "kernels", "default": "modules", "reason": "widths and types fit"}
    assert layers == {"part": "layers", "count": 5, **kernels}
    assert mtp == {"part": "mtp", "count": 1, **kernels}
    assert head == {"part": "head", "count": 1, **kernels}


@pytest.mark.parametrize(
    ("name", "form", "reasons"),
    [
        ("layers.1.attn.wq_b.weight", "BF16", ["a dense weight is not Q8_0", None, None]),
        ("mtp.0.ffn.experts.w2.weight", "F32", [None, "an expert weight is not quantised", None]),
        ("head.weight", "F16", [None, None, "the head is not Q8_0"]),
    ],
)
def test_few_rows_say_why_not(name: str, form: str, reasons: list[str | None]) -> None:
    """The type on the device of one weight of a part decides for the whole of it."""
    whole = synthetic.checkpoint(synthetic.config_of("small-q2", 3), "small-q2")
    tensors = tuple(dataclasses.replace(one, form=form) if one.name == name else one for one in whole.tensors)
    for row, reason in zip(inspect.few_rows(dataclasses.replace(whole, tensors=tensors)), reasons, strict=True):
        assert (row["cuda"], row["reason"]) == ("modules" if reason else "kernels", reason or "widths and types fit")


def test_few_rows_are_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = json.loads(output(capsys, "--dispatch", "--json"))["few_rows"]
    said = {"modules": "modules", "kernels": "kernels / modules"}
    text = output(capsys, "--dispatch")
    assert [row["part"] for row in rows] == ["layers", "mtp", "head"]
    for row in rows:
        line = f"{row['part']} +8 rows +{row['count']}  {said[row['cuda']]} \\({re.escape(row['reason'])}\\)\n"
        assert re.search(line, text), line
    assert "few_rows" not in json.loads(output(capsys, "--json"))
    monkeypatch.setenv(OPT_OUT, "1")
    told = json.loads(output(capsys, "--dispatch", "--json"))["few_rows"]
    assert {(row["cuda"], row["reason"]) for row in told} == {("modules", f"{OPT_OUT}=1")}


def test_check(capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(output(capsys, "--check", "--json"))
    listed = json.loads(output(capsys, "--json"))
    assert told == {"path": listed["path"], "checked": sum(row["count"] for row in listed["tensors"].values())} | {
        "bytes": listed["bytes"]
    }
    said = f"{told['path']}: {told['checked']} tensors, {told['bytes'] / 1e6:.1f} MB: every value can be used\n"
    assert output(capsys, "--check") == said


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case["file"])
def test_check_names_the_first_bad_tensor(case: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = unpacked(case["file"], tmp_path)
    output(capsys, path)
    told = refused(capsys, path, "--check")
    assert str(path) in told
    for alternatives in case["must_mention"]:
        assert any(alternative in told for alternative in alternatives), told


def test_check_of_an_mtp_file(parts: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    main, block = parts
    header = mtp_file.open_support(block)
    info = header.tensors["mtp.0.enorm.weight"]
    with block.open("r+b") as file:
        file.seek(info.offset + 4)
        file.write(np.float32("nan").tobytes())
    assert f"{block}: mtp.0.enorm.weight: value [1] is not finite" in refused(capsys, main, "--mtp-file", block, "--check")
    output(capsys, main, "--check")


def test_check_of_a_checkpoint_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "hub"
    shutil.copytree(HUB, folder)
    assert "every value can be used" in output(capsys, folder, "--check")
    shard = min(folder.glob("*.safetensors"))
    tensors = read_raw(shard)
    name = next(name for name, (dtype, _, _) in tensors.items() if dtype in ("F32", "BF16"))
    dtype, shape, content = tensors[name]
    tensors[name] = (dtype, shape, b"\xff" * len(content))
    write_raw(shard, tensors)
    told = refused(capsys, folder, "--check")
    assert shard.name in told
    assert name in told


def test_check_starts_no_device() -> None:
    program = (
        "from ds4jax.cli import main; from jax._src import xla_bridge\n"
        "main(['inspect', '--check']); print(len(xla_bridge._backends))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1] == "0"


def test_prompts_are_checked_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "small.gguf"
    write_small(path)
    monkeypatch.setattr("ds4jax.loading.gguf_read.reading", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(InputError, match=r"token id 640 is outside the vocabulary of 640"):
        models.open_model(options(path), prompt=np.array([1, 640]))
    with pytest.raises(InputError, match=r"prompt has 1025 tokens; the model's context is 1024"):
        models.open_model(options(path), prompt=np.ones(1025, np.int32))
    with pytest.raises(InputError, match=r"the model's context is 1024"):
        models.open_model(options(path), prompt="In the beginning " * 1024)


def test_large_models_say_what_they_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.gguf"
    write_small(path)
    models.open_model(options(path))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(models, "LARGE", 1000)
    models.open_model(options(path))
    told = capsys.readouterr().err
    assert told.startswith(f"ds4jax: {path}: 0.0 GB of weights, ")
    assert told.count("\n") == 1
    assert told.endswith("read per decoded token; prompts in calls of 512 tokens\n")


class Terminal(io.StringIO):
    """Takes what a terminal would show."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("after", [0.0, 60.0])
def test_bar(after: float, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(models, "BAR_AFTER", after)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with models.loading_bar("loading the model") as show:
        show(1_000_000_000, 4_000_000_000)
        show(2_000_000_000, 4_000_000_000)
    shown = terminal.getvalue()
    assert "loading the model" in shown
    assert ("/4.0 GB" in shown) == (after == 0)


def test_bar_of_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(models, "BAR_AFTER", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with models.reading_bar("reading the prompt") as show:
        for done in (512, 1024, 1536):
            show(done, 4096)
            time.sleep(0.15)
    shown = terminal.getvalue()
    assert "1536/4096" in shown
    assert "tokens/s" in shown


def test_no_bar_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with models.loading_bar("loading the model") as show:
        assert show is None
    assert capsys.readouterr() == ("", "")

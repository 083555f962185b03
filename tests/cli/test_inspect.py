"""`ds4jax inspect`: the plan, the look at every value, and what commands that load say and refuse before they do."""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf_files import GOLDEN, rewrite, unpacked, write_small
from hub_files import read_raw, write_raw

import ds4jax
from ds4jax.bounds import SHIPPED
from ds4jax.cli import main as cli
from ds4jax.cli.commands import model as models
from ds4jax.errors import InputError
from ds4jax.loading import contents, mtp_file, open_checkpoint
from ds4jax.loading import plan as plans
from ds4jax.loading.convert import convert
from ds4jax.loading.plan import token_bytes
from ds4jax.random_models.hub import write_hub
from pallas_kernels.core.dispatch import OPT_OUT

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
    common = {"dense": None, "qat": None, "cache": "float32", "devices": None, "exchange": "auto"}
    return argparse.Namespace(model=model, drafter="auto", drafter_file=mtp, **common)


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
    assert {device["name"] for device in plan["devices"]} >= {"h100", "h200", "h200x2", "h100x2", "rtx-pro-6000"}
    (alone,) = json.loads(output(capsys, "--json", "--context", "700", "--device", "h200"))["plan"]["devices"]
    assert (alone["name"], alone["cards"], alone["modelled"], alone["needed"]) == ("h200", 1, False, plan["needed"])
    assert alone["fits"]
    assert alone["largest_context"] == told["config"]["max_context"]
    text = output(capsys, "--context", "700", "--device", "h100")
    for part in (
        *plans.CLASSES,
        "cache of 700",
        f"{plan['draft'] / 1e6:,.1f} more",
        "h100: 80 GB: fits",
        "tokens/s",
        "in calls of 1,024",
    ):
        assert part in text
    assert "h200" not in text


def test_plan_of_slots(capsys: pytest.CaptureFixture[str]) -> None:
    one, eight = (json.loads(output(capsys, "--json", "--context", "700", "--slots", slots))["plan"] for slots in ("1", "8"))
    assert (one["slots"], eight["slots"]) == (1, 8)
    assert eight["cache"] == pytest.approx(8 * one["cache"], rel=0.02)
    assert eight["needed"] - one["needed"] == eight["cache"] - one["cache"]
    assert all(device["most_slots"] == 64 for device in eight["devices"])
    text = output(capsys, "--context", "700", "--slots", "8", "--device", "h100")
    assert "cache of 8 x 700" in text
    assert "or for any number of slots" in text


def test_plan_of_two_cards(capsys: pytest.CaptureFixture[str]) -> None:
    """Half of all large matrices but the low-rank ones; all of the rest, of cache and of working memory."""
    plan = json.loads(output(capsys, "--json", "--device", "h200x2"))["plan"]
    (pair,) = plan["devices"]
    tensors = open_checkpoint(SHIPPED).tensors
    ends = ("embed", "head", "wq_b", "wo_a", "wo_b", "w1", "w2", "w3", "e_proj", "h_proj")
    cut = [one for one in tensors if one.name.endswith(tuple(f"{end}.weight" for end in ends)) and "indexer" not in one.name]
    halves = sum(one.device_nbytes for one in cut)
    assert pair["needed"] == plan["needed"] - halves + math.ceil(halves / 2)
    assert halves > 0.6 * sum(one.device_nbytes for one in tensors)
    assert pair["whole"] == []
    assert (pair["cards"], pair["memory"], pair["modelled"], pair["fits"]) == (2, 141_000_000_000, True, True)
    config = open_checkpoint(SHIPPED).config
    read = sum(token_bytes(one, config) for one in cut if not one.name.startswith("mtp."))
    count = 4 * config.n_layers + 2
    assert (pair["gathers"], pair["exchange_ms"]) == (count, round(0.0185 * count, 2))
    bound = 1 / ((plan["token"] - read / 2) / pair["bandwidth"] + 18.5e-6 * count)
    assert pair["tokens_per_second"] == pytest.approx(bound, abs=0.1)
    assert f"h200x2: 2 x 141 GB, modelled, {pair['needed'] / 1e6:,.1f} MB on each: fits" in output(capsys)


def test_plan_of_groups(capsys: pytest.CaptureFixture[str]) -> None:
    """A card of two groups of four holds what one of four cards with half of the slots does. Others are left out."""
    options = ("--json", "--context", "700")
    (grouped,) = json.loads(output(capsys, *options, "--slots", "8", "--device", "h200x8", "--groups", "2"))["plan"]["devices"]
    (group,) = json.loads(output(capsys, *options, "--slots", "4", "--device", "h200x4"))["plan"]["devices"]
    assert (grouped.pop("name"), grouped.pop("cards"), grouped.pop("groups")) == ("h200x8", 8, 2)
    assert (group.pop("name"), group.pop("cards"), group.pop("groups")) == ("h200x4", 4, 1)
    assert grouped == group
    devices = json.loads(output(capsys, *options, "--slots", "8", "--groups", "4"))["plan"]["devices"]
    assert {device["cards"] for device in devices} == {4, 8, 16}
    text = output(capsys, "--context", "700", "--slots", "8", "--device", "h200x8", "--groups", "2")
    assert f"h200x8: 8 x 141 GB in 2 groups, modelled, {grouped['needed'] / 1e6:,.1f} MB on each: fits" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--slots 3 --groups 2", "slots is 3; 2 groups of cards must divide it, so give a multiple of 2"),
        ("--slots 2 --groups 2 --device h200", "groups is 2; it must divide the number of cards, 1"),
        ("--slots 3 --groups 3", "groups is 3; it must divide the number of cards, 1 or 2 or 4 or 8 or 16"),
        ("--groups 0", "argument --groups: 0 is out of range"),
    ],
)
def test_groups_that_cannot_be_planned(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, *words.split())


def test_flavour_shards_and_types(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    told = json.loads(output(capsys, "--json"))
    assert (told["flavour"], told["shards"], told["drafter"]["kind"], told["drafter"]["where"]) == ("antirez", 1, "mtp", "inside")
    kinds = {group["kind"]: group["types"] for group in told["types"]}
    last = told["config"]["n_layers"] - 1
    assert kinds["experts gate"] == {"Q8_0": f"0-{last}, mtp"}
    assert kinds["embedding"] == {"Q8_0": ""}
    assert sum(len(group["names"]) for group in told["types"] if group["kind"] == "attention") == 5
    hub = json.loads(output(capsys, HUB, "--json"))
    assert (hub["flavour"], hub["shards"], hub["drafter"]["kind"]) == ("hub", 3, "mtp")
    assert {group["kind"]: group["types"] for group in hub["types"]}["experts down"] == {"F4_E2M1": "0-5, mtp"}
    convert(HUB, tmp_path / "model.gguf")
    told = json.loads(output(capsys, tmp_path / "model.gguf", "--json"))
    assert (told["flavour"], told["drafter"]["where"]) == ("mainline", "file")
    text = output(capsys, tmp_path / "model.gguf")
    assert f"\nflavour      mainline\ndrafter      MTP block in {tmp_path / 'mtp-model.gguf'}\n" in text
    assert re.search(r"\n  experts down +MXFP4 0-5, mtp\n", text)
    assert re.search(r"\n  attention +Q8_0 0-5, mtp\n", text)


def test_layers_as_text() -> None:
    assert contents.layers(["3", "0", "1", "mtp", "5", "4"]) == "0-1, 3-5, mtp"
    assert contents.layers(["7"]) == "7"
    assert contents.layers([""]) == ""


def test_drafters_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_hub(tmp_path / "hub", drafter="dspark")
    (single,) = (tmp_path / "hub").glob("*.safetensors")
    assert json.loads(output(capsys, single.parent, "--json"))["shards"] == 1
    convert(tmp_path / "hub", tmp_path / "model.gguf")
    convert(HUB, tmp_path / "other.gguf")
    dspark, mtp = tmp_path / "dspark-model.gguf", tmp_path / "mtp-other.gguf"
    told = json.loads(output(capsys, "--drafter-file", dspark, "--json"))
    assert (told["kind"], told["drafter"], told["architecture"], told["usable"]) == ("drafter", "dspark", "dflash", True)
    found = {field: told[field] for field in ("layers", "block_size", "target_layers", "noise_token", "markov_rank")}
    assert found == {"layers": 3, "block_size": 5, "target_layers": [1, 2, 3], "noise_token": 5, "markov_rank": 32}
    text = output(capsys, "--drafter-file", dspark)
    assert text.startswith(f"{dspark}: the DSpark drafter of a model, ")
    assert "\n  target layers    1, 2, 3\n" in text
    for arguments in ([mtp], ["--drafter-file", mtp]):
        told = json.loads(output(capsys, *arguments, "--json"))
        assert (told["drafter"], told["layers"], told["layer"], told["usable"]) == ("mtp", 1, 6, True)
    assert output(capsys, mtp).startswith(f"{mtp}: the MTP block of a model, ")
    assert output(capsys, GOLDEN / "mtp.gguf").count("architecture     deepseek4_mtp_support\n") == 1
    # Where a model is asked for, a DSpark drafter is refused as by every command.
    assert "'dflash' is a DSpark drafter, not a model" in refused(capsys, dspark)
    assert "neither an MTP block nor a DSpark drafter" in refused(capsys, "--drafter-file", tmp_path / "model.gguf")


def test_a_model_with_a_dspark_drafter(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_hub(tmp_path / "hub", drafter="dspark")
    numbers = {"stages": 3, "block_size": 5, "target_layers": [1, 2, 3], "noise_token": 5, "markov_rank": 32}
    told = json.loads(output(capsys, tmp_path / "hub", "--dense", "q8_0", "--json"))
    assert told["drafter"] == {"kind": "dspark", "where": "inside", "path": None, "reason": ""} | numbers
    (projection,) = (group for group in told["types"] if group["kind"] == "DSpark projection")
    assert (projection["names"], projection["types"]) == (["dspark.main_proj"], {"F8_E4M3": ""})
    planned, all_bytes = told["plan"]["classes"]["DSpark"], told["bytes"]
    assert (planned["token"], told["plan"]["classes"]["MTP"]["file"]) == (0, 0)
    # Two tables and at least what a stage has in float32, and less than the drafter and the head.
    assert 2 * 384 * 32 < planned["file"] < all_bytes
    assert 0 < told["plan"]["draft"] < planned["device"] + told["plan"]["classes"]["head"]["device"] + 4 * 384 * 32
    text = output(capsys, tmp_path / "hub")
    said = "DSpark inside: stages 3; block size 5; target layers 1, 2, 3; noise token 5; markov rank 32"
    assert f"\ndrafter      {said}\n" in text
    assert "\n  a block of DSpark drafts reads " in text
    stages = [(row["layers"], row["count"], row["rows"]) for row in told["decode_step"] if row["part"] == "dspark"]
    # Twelve blocks of five rows.
    assert stages == [("dspark", 3, 60)]
    assert re.search(r"\n  dspark +60 rows +3  ", text)
    assert re.search(r"\n  experts down +F4_E2M1 0-3, dspark\n", text)
    assert "\n  DSpark tables      BF16\n" in text
    for wanted in ("none", "ngram"):
        told = json.loads(output(capsys, tmp_path / "hub", "--drafter", wanted, "--json"))
        assert (told["drafter"]["kind"], told["drafter"]["where"], told["ignored"]) == (wanted, "", 0)
        assert told["plan"]["classes"]["DSpark"]["file"] == 0
    assert "drafter is mtp: its mtp.* tensors are a DSpark drafter" in refused(capsys, tmp_path / "hub", "--drafter", "mtp")


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


def test_a_file_beside_that_is_not_used(capsys: pytest.CaptureFixture[str], parts: tuple[Path, Path]) -> None:
    """The line about the drafter has the reason, and so has the object."""
    main, block = parts
    (main.parent / "mtp.gguf").touch()
    text = output(capsys, main)
    assert "\ndrafter      none: mtp.gguf, which lies beside it, cannot be used: the file is empty\n" in text
    assert "needs the model, too; give it as PATH" in refused(capsys, "--drafter-file", block, "--check")
    assert "dense: it is for a checkpoint directory" in refused(capsys, main, "--dense", "bf16")


def test_commands_load_the_mtp_file(parts: tuple[Path, Path]) -> None:
    main, block = parts
    model = models.open_model(options(main, block))
    assert (model.config.n_mtp, model.max_draft, model.no_mtp) == (1, 2, "")
    model = models.open_model(options(main))
    assert (model.config.n_mtp, model.max_draft, model.no_mtp) == (0, 0, mtp_file.NONE)
    assert model.with_max_draft(0).no_mtp == mtp_file.NONE
    with pytest.raises(InputError, match=f"{main}: mtp: {mtp_file.NONE}"):
        model.logits([1, 2, 3], mtp=True)


def test_decode_step_are_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = json.loads(output(capsys, "--dispatch", "--json"))["decode_step"]
    said = {"modules": "modules", "kernels": "kernels / modules"}
    text = output(capsys)
    assert [row["part"] for row in rows] == ["layers", "mtp", "head"]
    for row in rows:
        part = f"layers {row['layers']}" if row["part"] == "layers" else row["part"]
        line = f"{part} +64 rows +{row['count']}  {said[row['cuda']]} \\({re.escape(row['reason'])}\\)\n"
        assert re.search(line, text), line
    assert "dispatch" not in json.loads(output(capsys, "--json"))
    monkeypatch.setenv(OPT_OUT, "1")
    told = json.loads(output(capsys, "--dispatch", "--json"))["decode_step"]
    assert {(row["cuda"], row["reason"]) for row in told} == {("modules", f"{OPT_OUT}=1")}


def test_experts_of_a_prompt_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(output(capsys, "--dispatch", "--json"))["prompt_experts"]
    text = output(capsys, "--dispatch")
    assert [row["part"] for row in rows] == ["layers", "mtp"]
    for row in rows:
        part = f"layers {row['layers']}" if row["part"] == "layers" else row["part"]
        line = f"{part} +{row['count']}  every row / every row / every row \\({re.escape(row['reason'])}\\)\n"
        assert re.search(line, text), line


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
    header = mtp_file.open_alone(block)
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


def test_tensors_that_are_not_used_are_counted(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, parts: tuple[Path, Path]
) -> None:
    main, _ = parts
    path = main.with_name("strange.gguf")
    rewrite(main, path, "deepseek4", lambda name: True, add="strange.weight")
    note = "1 tensor is not used, strange.weight"
    assert f"\nnote         {note}\n" in output(capsys, path)
    told = json.loads(output(capsys, path, "--json"))
    assert (told["ignored"], told["note"]) == (1, note)
    assert f"\nnote: {note}\n" in output(capsys, path, "--check")
    assert json.loads(output(capsys, path, "--check", "--json"))["note"] == note
    assert "note" not in output(capsys, main)
    # Commands that load it say so on stderr, in a line.
    models.open_model(options(path))
    assert capsys.readouterr() == ("", f"ds4jax: {path}: {note}\n")
    models.open_model(options(main))
    assert (capsys.readouterr(), caplog.messages) == (("", ""), [])
    # From Python it is one in the log.
    ds4jax.load(path)
    ds4jax.load(main)
    assert caplog.messages == [f"{path}: {note}"]


def test_check_starts_no_device() -> None:
    program = (
        "from ds4jax.cli.main import main; from jax._src import xla_bridge\n"
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

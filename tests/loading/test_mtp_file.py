"""The MTP block in a separate file: found or named, and refused if it is something else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import SMALL, rewrite, write_small
from split_files import shards, write_set

from ds4jax.errors import InputError
from ds4jax.loading import open_checkpoint
from ds4jax.loading.mtp_file import ARCHITECTURE
from ds4jax.loading.mtp_names import drafter

MAIN = "deepseek4"


def is_mtp(name: str) -> bool:
    return name.startswith("mtp.")


def is_main(name: str) -> bool:
    return not is_mtp(name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with its MTP block inside."""
    path = tmp_path_factory.mktemp("whole") / "whole.gguf"
    write_small(path, quantize=True)
    return path


@pytest.fixture
def main(whole: Path, tmp_path: Path) -> Path:
    """The same model without it."""
    path = tmp_path / "model.gguf"
    rewrite(whole, path, MAIN, is_main)
    return path


def support(whole: Path, path: Path, architecture: str = ARCHITECTURE, **more: Any) -> Path:
    rewrite(whole, path, architecture, is_mtp, keys=False, **more)
    return path


@pytest.mark.parametrize("named", [False, True])
def test_found_beside_or_named(named: bool, whole: Path, main: Path, tmp_path: Path) -> None:
    folder = tmp_path / ("elsewhere" if named else ".")
    folder.mkdir(exist_ok=True)
    path = support(whole, folder / "Small-MTP-Q8.gguf")
    checkpoint = open_checkpoint(main, path if named else None)
    assert (checkpoint.config, checkpoint.drafter_path, checkpoint.no_mtp, checkpoint.ignored) == (SMALL, path, "", ())
    expected = {tensor.name: tensor.read() for tensor in open_checkpoint(whole).tensors}
    assert expected.keys() == {tensor.name for tensor in checkpoint.tensors}
    for tensor in checkpoint.tensors:
        if is_mtp(tensor.name):
            np.testing.assert_array_equal(*(np.asarray(getattr(v, "quants", v)) for v in (tensor.read(), expected[tensor.name])))


def test_a_dense_type_is_for_a_checkpoint_directory(main: Path) -> None:
    with pytest.raises(InputError, match=r"model\.gguf: dense: it is for a checkpoint directory; the matrices of a GGUF file"):
        open_checkpoint(main, dense="bf16")


def test_nothing_beside(main: Path) -> None:
    checkpoint = open_checkpoint(main)
    assert (checkpoint.config.n_mtp, checkpoint.drafter_path) == (0, None)
    assert "no MTP" in checkpoint.no_mtp


def test_what_is_not_a_support_file_is_left_alone(whole: Path, main: Path, tmp_path: Path) -> None:
    rewrite(whole, tmp_path / "other-mtp.gguf", MAIN, lambda name: True)
    support(whole, tmp_path / "prompts.gguf")
    support(whole, tmp_path / "dspark-mtp.gguf", add="mtp.2.markov_head.weight")
    assert open_checkpoint(main).drafter_path is None


def test_two_beside(whole: Path, main: Path, tmp_path: Path) -> None:
    first, second = (support(whole, tmp_path / name) for name in ("a-mtp.gguf", "mtp.gguf"))
    with pytest.raises(InputError, match=r"model\.gguf: mtp file: a-mtp\.gguf and mtp\.gguf both lie beside it"):
        open_checkpoint(main)
    assert open_checkpoint(main, second).drafter_path == second
    assert open_checkpoint(main, first).drafter_path == first


def test_ratios_of_the_main_layers_are_enough(whole: Path, main: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ds4jax.loading import gguf_config

    support(whole, tmp_path / "mtp.gguf")
    array = gguf_config._array
    monkeypatch.setattr(gguf_config, "_array", lambda *args: array(*args)[: SMALL.n_layers])
    assert open_checkpoint(main).config.compress_ratios == SMALL.compress_ratios


WRONG = {
    "another architecture": ({"architecture": "llama"}, "general.architecture: 'llama' is not an MTP file's"),
    "another's names": ({"architecture": MAIN}, "'deepseek4' is not an MTP file's; it must be 'deepseek4_mtp_support', or 'deep"),
    "DSpark": (
        {"add": "mtp.1.attn_norm.weight"},
        "dspark.block_size: this metadata key is missing; a DSpark drafter",
    ),
    "DSpark of its own kind": ({"architecture": "dspark", "add": "mtp.0.confidence_head.weight"}, "a DSpark drafter needs it"),
    "ds4's DSpark": ({"architecture": "deepseek4-dspark"}, "a DSpark drafter needs it"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refused_support_files(case: str, whole: Path, main: Path, tmp_path: Path) -> None:
    options, message = WRONG[case]
    path = support(whole, tmp_path / "given.gguf", **options)
    with pytest.raises(InputError) as error:
        open_checkpoint(main, path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_as_its_drafter(whole: Path, main: Path, tmp_path: Path) -> None:
    message = "drafter file: it is a whole model; give a file that holds a drafter alone"
    for path in (whole, main):
        with pytest.raises(InputError, match=rf"^{path}: {message}$"):
            open_checkpoint(main, path)
    _, second = write_set(tmp_path, shards(main, [5]), "set")
    with pytest.raises(InputError, match=rf"^{second}: drafter file: it is a shard of a model, 2 files in all; give a file that"):
        open_checkpoint(main, second)


def test_a_support_file_without_the_block(whole: Path, main: Path, tmp_path: Path) -> None:
    path = tmp_path / "given.gguf"
    rewrite(whole, path, ARCHITECTURE, lambda name: name == "mtp.0.norm.weight", keys=False)
    with pytest.raises(InputError, match=r"given\.gguf: mtp\.0\.e_proj\.weight: this tensor is missing"):
        open_checkpoint(main, path)
    rewrite(whole, path, ARCHITECTURE, lambda name: is_mtp(name) and "shexp" not in name, keys=False)
    with pytest.raises(InputError, match=r"given\.gguf: mtp\.0\.ffn_gate_shexp\.weight: this tensor is missing"):
        open_checkpoint(main, path)


FOREIGN = {
    "a head of another vocabulary": ({"add": "mtp.0.output.weight"}, "mtp.0.output.weight: dimensions [4], and [64, 640] in "),
    "an embedding of another one": ({"add": "token_embd.weight"}, "token_embd.weight: dimensions [4], and [64, 640] in "),
    "experts": ({"more": {"deepseek4.expert_count": 8}}, "deepseek4.expert_count: is 8, and 4 in model.gguf"),
    "vocabulary": ({"more": {"deepseek4.vocab_size": 641}}, "deepseek4.vocab_size: is 641, and 640 in model.gguf"),
    "under its own prefix": (
        {"more": {f"{ARCHITECTURE}.embedding_length": 128}},
        f"{ARCHITECTURE}.embedding_length: is 128, and 64 in model.gguf",
    ),
    "blocks": ({"more": {"deepseek4.nextn_predict_layers": 2}}, "deepseek4.nextn_predict_layers: is 2; one block can be used"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_the_mtp_file_of_another_model(case: str, whole: Path, main: Path, tmp_path: Path) -> None:
    """A named file is refused; a file in the model's folder is ignored, with the reason."""
    options, message = FOREIGN[case]
    path = support(whole, tmp_path / "mtp.gguf", **options)
    with pytest.raises(InputError) as error:
        open_checkpoint(main, path)
    assert str(error.value).startswith(f"{path}: {message}")
    checkpoint = open_checkpoint(main)
    assert (checkpoint.config.n_mtp, checkpoint.drafter_path) == (0, None)
    assert f"mtp.gguf, which lies beside it, belongs to other weights ({message}" in checkpoint.no_mtp
    assert checkpoint.note == f"no drafts: {checkpoint.no_mtp}"


def test_metadata_that_agrees(whole: Path, main: Path, tmp_path: Path) -> None:
    same: dict[str, int | list[int]] = {"deepseek4.expert_count": 4, "deepseek4.nextn_predict_layers": 1}
    # The file has one block, however many its model has layers.
    path = support(whole, tmp_path / "mtp.gguf", more=same | {"deepseek4.block_count": 1, "general.version": 7})
    assert open_checkpoint(main).drafter_path == path


def test_weights_with_the_ratios_of_a_dspark_drafter_are_not_paired(whole: Path, tmp_path: Path) -> None:
    model, path = tmp_path / "model.gguf", support(whole, tmp_path / "mtp.gguf")
    more: dict[str, int | list[int]] = {"deepseek4.attention.compress_ratios": [0, 4, 128, 0, 0, 0]}
    rewrite(whole, model, MAIN, is_main, more=more)
    says = "deepseek4.attention.compress_ratios: has 6 entries in model.gguf; 3 layers and an MTP block make 4"
    assert says in open_checkpoint(model).note
    given = open_checkpoint(model, path)
    assert given.note == f"WARNING: mtp.gguf was made for other weights ({says}); it is used because it was given"
    assert (given.config.n_mtp, given.config.mtp_ratio) == (1, 0)
    rewrite(whole, model, MAIN, lambda name: True, more=more)
    with pytest.raises(InputError, match=r"model\.gguf: deepseek4\.attention\.compress_ratios: 6 entries; 3 layers and an MTP"):
        open_checkpoint(model)


@pytest.mark.parametrize(
    ("keep", "add", "note"),
    [
        ("", "strange.weight", "1 tensor is not used, strange.weight"),
        ("", "blk.99.attn_norm.weight", "1 tensor is not used, blk.99.attn_norm.weight"),
        (
            "",
            "mtp.9.norm.weight",
            "33 tensors are not used, .* the first of them; no drafts: its mtp.* tensors are several",
        ),
        ("e_proj", "", "31 tensors are not used, .*; no drafts: its MTP block is incomplete: mtp.0.e_proj.weight is missing"),
        ("mtp", "blk.3.enorm.weight", "1 .* have no MTP block under mtp.0, though blk.3.enorm.weight looks like"),
        ("mtp", "", ""),
    ],
)
def test_what_is_not_used_is_counted(keep: str, add: str, note: str, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    rewrite(whole, path, MAIN, lambda name: not (keep and keep in name), add=add)
    checkpoint = open_checkpoint(path)
    assert re.match(note + ("" if note else "$"), checkpoint.note)
    assert "\n" not in checkpoint.note
    assert checkpoint.config.n_mtp == int(not keep and "mtp.9" not in add)
    assert ("no drafts: " in checkpoint.note) == bool(note and not checkpoint.config.n_mtp)


def test_compressors_that_the_metadata_has_no_use_for(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    rewrite(whole, path, MAIN, lambda name: True, more={"deepseek4.attention.compress_ratios": [0, 0, 0, 0]})
    message = r"compress_ratios: gives this layer 0, but the weights have blk\.[12]\.(attn|indexer)_"
    with pytest.raises(InputError, match=rf"model\.gguf: deepseek4\.attention\.{message}"):
        open_checkpoint(path)


def test_not_there_or_for_a_directory(whole: Path, main: Path, tmp_path: Path) -> None:
    path = support(whole, tmp_path / "given.gguf")
    with pytest.raises(InputError, match=r"missing\.gguf: no such file"):
        open_checkpoint(main, tmp_path / "missing.gguf")
    with pytest.raises(InputError, match=r"given\.gguf: drafter file: it goes with a GGUF model"):
        open_checkpoint(tmp_path, path)


def test_a_broken_dspark_file_beside_an_mtp_block(whole: Path, tmp_path: Path) -> None:
    """The block drafts, and the reason is told. By name the file is refused."""
    path = tmp_path / "model.gguf"
    rewrite(whole, path, MAIN, lambda name: True)
    side = support(whole, tmp_path / "dspark.gguf", architecture="deepseek4-dspark")
    message = "deepseek4.dspark.block_size: this metadata key is missing; a DSpark drafter needs it"
    checkpoint = open_checkpoint(path)
    assert (checkpoint.drafter, checkpoint.config.n_mtp, checkpoint.no_mtp) == ("mtp", 1, "")
    assert checkpoint.note == f"WARNING: dspark.gguf, which lies beside it, cannot be used: {message}"
    assert open_checkpoint(path, drafter="mtp").note == ""
    with pytest.raises(InputError, match=rf"^{path}: drafter is dspark: dspark\.gguf, which lies beside it, cannot be used: "):
        open_checkpoint(path, drafter="dspark")
    with pytest.raises(InputError, match=rf"^{side}: {re.escape(message)}$"):
        open_checkpoint(path, side)


@pytest.mark.parametrize("add", ["mtp.2.confidence_head.proj.weight", "mtp.0.main_proj.weight", "mtp.9.markov_head.markov_w1"])
def test_a_broken_dspark_drafter_inside(add: str, whole: Path, tmp_path: Path) -> None:
    """It is never passed over; without it the model loads."""
    path = tmp_path / "model.gguf"
    rewrite(whole, path, MAIN, lambda name: True, add=add)
    support(whole, tmp_path / "mtp.gguf")
    message = r"dspark\.block_size: this metadata key is missing; a DSpark drafter needs it; drafter none loads the model without"
    with pytest.raises(InputError, match=rf"model\.gguf: deepseek4\.{message}"):
        open_checkpoint(path)
    checkpoint = open_checkpoint(path, drafter="none")
    assert (checkpoint.config.n_mtp, checkpoint.drafter_path, checkpoint.drafter, checkpoint.note) == (0, None, "none", "")
    assert open_checkpoint(path, drafter="mtp").drafter_path == tmp_path / "mtp.gguf"


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["blk.0.attn_norm.weight"], ""),
        (["mtp.0.e_proj.weight", "mtp.0.norm.weight"], "mtp"),
        (["mtp.0.norm.weight"], ""),
        (["mtp.0.e_proj.weight", "mtp.1.e_proj.weight"], ""),
        (["mtp.10.norm.weight"], ""),
        (["mtp.0.main_proj.weight", "mtp.0.norm.weight"], "dspark"),
        (["mtp.0.main_norm.weight"], "dspark"),
        (["mtp.0.markov_head.markov_w1.weight"], "dspark"),
        (["mtp.dspark.weight"], "dspark"),
        (["blk.3.nextn.eh_proj.weight"], "mtp"),
        (["blk.3.nextn.e_proj.weight", "mtp.9.norm.weight"], "mtp"),
        (["blk.3.enorm.weight"], ""),
    ],
)
def test_kinds(names: list[str], kind: str) -> None:
    assert drafter(names) == kind

"""The MTP block in a file of its own: found or named, refused for what it is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf_files import SMALL, rewrite, write_small

from ds4jax.errors import InputError
from ds4jax.loading import open_checkpoint
from ds4jax.loading.mtp_file import ARCHITECTURE, drafter

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


def support(whole: Path, path: Path, architecture: str = ARCHITECTURE, add: str = "") -> Path:
    rewrite(whole, path, architecture, is_mtp, keys=False, add=add)
    return path


@pytest.mark.parametrize("named", [False, True])
def test_found_beside_or_named(named: bool, whole: Path, main: Path, tmp_path: Path) -> None:
    folder = tmp_path / ("elsewhere" if named else ".")
    folder.mkdir(exist_ok=True)
    path = support(whole, folder / "Small-MTP-Q8.gguf")
    checkpoint = open_checkpoint(main, path if named else None)
    assert (checkpoint.config, checkpoint.mtp_path, checkpoint.no_mtp, checkpoint.ignored) == (SMALL, path, "", ())
    expected = {tensor.name: tensor.read() for tensor in open_checkpoint(whole).tensors}
    assert expected.keys() == {tensor.name for tensor in checkpoint.tensors}
    for tensor in checkpoint.tensors:
        if is_mtp(tensor.name):
            np.testing.assert_array_equal(*(np.asarray(getattr(v, "quants", v)) for v in (tensor.read(), expected[tensor.name])))


def test_nothing_beside(main: Path) -> None:
    checkpoint = open_checkpoint(main)
    assert (checkpoint.config.n_mtp, checkpoint.mtp_path) == (0, None)
    assert "no MTP" in checkpoint.no_mtp


def test_what_is_not_a_support_file_is_left_alone(whole: Path, main: Path, tmp_path: Path) -> None:
    rewrite(whole, tmp_path / "other-mtp.gguf", MAIN, lambda name: True)
    support(whole, tmp_path / "prompts.gguf")
    support(whole, tmp_path / "dspark-mtp.gguf", add="mtp.2.markov_head.weight")
    assert open_checkpoint(main).mtp_path is None


def test_two_beside(whole: Path, main: Path, tmp_path: Path) -> None:
    first, second = (support(whole, tmp_path / name) for name in ("a-mtp.gguf", "mtp.gguf"))
    with pytest.raises(InputError, match=r"model\.gguf: mtp file: a-mtp\.gguf and mtp\.gguf both lie beside it"):
        open_checkpoint(main)
    assert open_checkpoint(main, second).mtp_path == second
    assert open_checkpoint(main, first).mtp_path == first


def test_ratios_of_the_main_layers_are_enough(whole: Path, main: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ds4jax.loading import gguf_config

    support(whole, tmp_path / "mtp.gguf")
    array = gguf_config._array
    monkeypatch.setattr(gguf_config, "_array", lambda *args: array(*args)[: SMALL.n_layers])
    assert open_checkpoint(main).config.compress_ratios == SMALL.compress_ratios


WRONG = {
    "another architecture": ({"architecture": "llama"}, "general.architecture: 'llama' is not an MTP file's"),
    "a whole model": ({"architecture": MAIN}, "general.architecture: 'deepseek4' is not an MTP file's"),
    "DSpark": ({"add": "mtp.1.attn_norm.weight"}, "mtp file: its mtp.* tensors are a DSpark drafter, which is not an MTP block"),
    "DSpark of its own kind": ({"architecture": "dspark", "add": "mtp.0.confidence_head.weight"}, "a DSpark drafter"),
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


def test_a_support_file_without_the_block(whole: Path, main: Path, tmp_path: Path) -> None:
    path = tmp_path / "given.gguf"
    rewrite(whole, path, ARCHITECTURE, lambda name: name == "mtp.0.norm.weight", keys=False)
    with pytest.raises(InputError, match=r"given\.gguf: mtp\.0\.e_proj\.weight: this tensor is missing"):
        open_checkpoint(main, path)
    rewrite(whole, path, ARCHITECTURE, lambda name: is_mtp(name) and "shexp" not in name, keys=False)
    with pytest.raises(InputError, match=r"given\.gguf: mtp\.0\.ffn_gate_shexp\.weight: this tensor is missing"):
        open_checkpoint(main, path)


def test_not_needed_or_not_there(whole: Path, main: Path, tmp_path: Path) -> None:
    path = support(whole, tmp_path / "given.gguf")
    with pytest.raises(InputError, match=r"given\.gguf: mtp file: not needed, since .*whole\.gguf holds an MTP block"):
        open_checkpoint(whole, path)
    with pytest.raises(InputError, match=r"missing\.gguf: no such file"):
        open_checkpoint(main, tmp_path / "missing.gguf")
    with pytest.raises(InputError, match=r"given\.gguf: mtp file: it goes with a GGUF model"):
        open_checkpoint(tmp_path, path)


def test_a_model_with_a_dspark_drafter_inside(whole: Path, tmp_path: Path) -> None:
    """The model itself is of use; drafting with it is refused, with the reason."""
    path = tmp_path / "model.gguf"
    rewrite(whole, path, MAIN, lambda name: True, add="mtp.2.norm.weight")
    support(whole, tmp_path / "mtp.gguf")
    checkpoint = open_checkpoint(path)
    assert (checkpoint.config.n_mtp, checkpoint.mtp_path) == (0, None)
    assert "DSpark drafter" in checkpoint.no_mtp
    assert "mtp.0.e_proj.weight" in checkpoint.ignored


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["blk.0.attn_norm.weight"], ""),
        (["mtp.0.e_proj.weight", "mtp.0.norm.weight"], "mtp"),
        (["mtp.0.norm.weight"], ""),
        (["mtp.0.e_proj.weight", "mtp.1.e_proj.weight"], "dspark"),
        (["mtp.10.norm.weight"], "dspark"),
        (["mtp.0.markov_head.markov_w1.weight"], "dspark"),
        (["mtp.dspark.weight"], "dspark"),
    ],
)
def test_kinds(names: list[str], kind: str) -> None:
    assert drafter(names) == kind

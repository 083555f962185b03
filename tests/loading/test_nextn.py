"""The MTP block as llama.cpp names it, inside a model and in a file of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf_files import SMALL, write_small
from nextn_files import COPIES, Stored, block, main_part, write
from split_files import shards, write_set

from ds4jax.errors import InputError
from ds4jax.loading import open_checkpoint
from ds4jax.loading.checkpoint import Checkpoint
from ds4jax.loading.gguf_header import Header, Shard, TensorInfo
from ds4jax.loading.lineage import other_copies
from ds4jax.loading.mtp_file import NONE_INSIDE
from ds4jax.loading.mtp_names import MtpBlock
from pallas_kernels.formats import Quantized

LAYERS = SMALL.n_layers
COUNTED = {"deepseek4.block_count": LAYERS + 1, "deepseek4.nextn_predict_layers": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with its block under `mtp.0.`."""
    path = tmp_path_factory.mktemp("whole") / "whole.gguf"
    write_small(path, quantize=True)
    return path


def inside(whole: Path, path: Path, more: dict[str, int] = COUNTED, *, drop: str = "", **options: bool | str) -> Path:
    """The model with its block under `blk.N.`, without the dropped tensors."""
    tensors = main_part(whole) | block(whole, LAYERS, **options)
    return write(path, whole, {name: one for name, one in tensors.items() if not drop or drop not in name}, more)


def alone(whole: Path, path: Path, layer: int = LAYERS, add: dict[str, Stored] | None = None, **more: str) -> Path:
    """The block in a file of its own, with copies of the model's tables; `more` are keys under `general.`."""
    copies = {name: one for name, one in main_part(whole).items() if name in COPIES}
    own = {f"general.{key}": value for key, value in more.items()}
    counted = {"deepseek4.block_count": layer + 1, "deepseek4.nextn_predict_layers": 1}
    return write(path, whole, copies | block(whole, layer, head="output") | (add or {}), counted | own)


def model(whole: Path, path: Path, **more: str) -> Path:
    """The model without its block."""
    own = {f"general.{key}": value for key, value in more.items()}
    return write(path, whole, main_part(whole), own | {"deepseek4.nextn_predict_layers": 0})


def values(checkpoint: Checkpoint, *names: str) -> list[np.ndarray]:
    """Parameters as float32."""
    found = {tensor.name: tensor for tensor in checkpoint.tensors if tensor.name in names}
    read = [found[name].read() for name in names]
    return [np.asarray(one.dequantize() if isinstance(one, Quantized) else one).astype(np.float32) for one in read]


BLOCK = (
    "mtp.0.e_proj.weight",
    "mtp.0.h_proj.weight",
    "mtp.0.norm.weight",
    "mtp.0.hc_head_fn",
    "mtp.0.attn.wkv.weight",
    "hc_head_fn",
)


def assert_same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("counted", [True, False])
def test_inside_a_model(counted: bool, whole: Path, tmp_path: Path) -> None:
    """The block is no layer, whether `block_count` counts it or not, and collapses its streams by the model's head."""
    path = inside(whole, tmp_path / "model.gguf", COUNTED if counted else {"deepseek4.nextn_predict_layers": 1})
    checkpoint = open_checkpoint(path)
    assert (checkpoint.config, checkpoint.note, checkpoint.drafter_path) == (SMALL, "", None)
    e, h, norm, _, wkv, head = values(open_checkpoint(whole), *BLOCK)
    assert_same(values(checkpoint, *BLOCK), [e, h, norm, head, wkv, head])
    assert {tensor.name for tensor in checkpoint.tensors} == {tensor.name for tensor in open_checkpoint(whole).tensors}


@pytest.mark.parametrize("early", [False, True])
def test_with_a_head_of_its_own(early: bool, whole: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(inside(whole, tmp_path / "model.gguf", early=early, head="nextn"))
    assert checkpoint.config == SMALL
    assert_same(values(checkpoint, *BLOCK), values(open_checkpoint(whole), *BLOCK))


def test_without_a_norm_of_its_own(whole: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(inside(whole, tmp_path / "model.gguf", drop="shared_head_norm"))
    assert_same(*(values(checkpoint, name) for name in ("mtp.0.norm.weight", "norm.weight")))


@pytest.mark.parametrize("name", ["nextn.hnorm.weight", "nextn.eh_proj.weight", "ffn_up_exps.weight"])
def test_an_incomplete_block(name: str, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"model\.gguf: blk\.{LAYERS}\.{name}: this tensor is missing"):
        open_checkpoint(inside(whole, tmp_path / "model.gguf", drop=f"blk.{LAYERS}.{name}"))


def test_a_block_that_only_the_metadata_have(whole: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", whole, main_part(whole), COUNTED)
    with pytest.raises(InputError, match=r"nextn_predict_layers: is 1 and deepseek4\.block_count 4, but blk\.3\.\* is missing"):
        open_checkpoint(path)
    assert open_checkpoint(write(path, whole, main_part(whole), {"deepseek4.nextn_predict_layers": 1})).config.n_mtp == 0


def test_a_block_without_its_projections_is_no_layer(whole: Path, tmp_path: Path) -> None:
    more = {**COUNTED, "deepseek4.attention.compress_ratios": list(SMALL.compress_ratios)}
    with pytest.raises(InputError, match=r"blk\.3\.nextn\.eh_proj\.weight: this tensor is missing"):
        open_checkpoint(inside(whole, tmp_path / "model.gguf", more, drop="nextn"))


@pytest.mark.parametrize(
    ("layer", "count", "message"),
    [
        (LAYERS, LAYERS + 2, r"block_count: is 5, but the MTP block is blk\.3"),
        (LAYERS + 2, LAYERS, r"block_count: is 3, but the MTP block is blk\.5"),
    ],
)
def test_a_block_in_another_place(layer: int, count: int, message: str, whole: Path, tmp_path: Path) -> None:
    tensors = main_part(whole) | block(whole, layer)
    path = write(tmp_path / "model.gguf", whole, tensors, {"deepseek4.block_count": count})
    with pytest.raises(InputError, match=message):
        open_checkpoint(path)


def test_two_blocks(whole: Path, tmp_path: Path) -> None:
    tensors = main_part(whole) | block(whole, LAYERS) | block(whole, LAYERS + 1)
    path = write(tmp_path / "model.gguf", whole, tensors, COUNTED)
    with pytest.raises(InputError, match=r"blk\.4\.nextn\.\w+\.weight: a second MTP block beside blk\.3"):
        open_checkpoint(path)


@pytest.mark.parametrize("named", [False, True])
def test_in_a_file_of_its_own(named: bool, whole: Path, tmp_path: Path) -> None:
    """Its `output_hc_*` is the block's head and does not replace the model's; copies of tables are not counted as unused."""
    path = model(whole, tmp_path / "model.gguf")
    folder = tmp_path / ("elsewhere" if named else ".")
    folder.mkdir(exist_ok=True)
    side = alone(whole, folder / "mtp-model.gguf")
    checkpoint = open_checkpoint(path, side if named else None)
    assert (checkpoint.config, checkpoint.drafter_path, checkpoint.note) == (SMALL, side, "")
    assert_same(values(checkpoint, *BLOCK), values(open_checkpoint(whole), *BLOCK))


def test_it_is_no_model(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"mtp-model\.gguf: blk\.3\.nextn: an MTP block is all that it holds; give the model"):
        open_checkpoint(alone(whole, tmp_path / "mtp-model.gguf"))


def test_a_split_side_file(whole: Path, tmp_path: Path) -> None:
    first, second = write_set(tmp_path, shards(alone(whole, tmp_path / "whole.gguf"), [5]), "mtp-model")
    (tmp_path / "whole.gguf").unlink()
    for path in (tmp_path / "model.gguf", tmp_path / "model-of-another-name.gguf"):
        checkpoint = open_checkpoint(model(whole, path))
        assert (checkpoint.drafter_path, checkpoint.files) == (first, (path, first, second))


WRONG: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "layers": (lambda whole, path: alone(whole, path, LAYERS + 1), "blk.4.nextn: model.gguf has 3 layers"),
    "vocabulary": (
        lambda whole, path: alone(whole, path, add={"token_embd.weight": main_part(whole)["blk.1.attn_norm.weight"]}),
        "token_embd.weight: dimensions [64], and [64, 640] in model.gguf",
    ),
    "shapes": (
        lambda whole, path: alone(whole, path, add={"blk.3.attn_norm.weight": main_part(whole)["blk.1.attn_q_a_norm.weight"]}),
        "blk.3.attn_norm.weight: dimensions [32]; the metadata asks for [64]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_does_not_fit(case: str, whole: Path, tmp_path: Path) -> None:
    make, message = WRONG[case]
    path, side = model(whole, tmp_path / "model.gguf"), make(whole, tmp_path / "mtp-model.gguf")
    with pytest.raises(InputError) as error:
        open_checkpoint(path, side)
    assert str(error.value) == f"{side}: {message}"
    checkpoint = open_checkpoint(path)
    assert checkpoint.note == f"no drafts: mtp-model.gguf, which lies beside it, belongs to other weights ({message})"
    assert checkpoint.config.n_mtp == 0


def test_a_file_of_another_lineage(whole: Path, tmp_path: Path) -> None:
    """Not paired when it lies beside the model; used with a warning when it is given."""
    path = model(whole, tmp_path / "model.gguf", name="Small Flash 0731")
    side = alone(whole, tmp_path / "mtp.gguf", name="Small Flash MTP")
    message = "general.name: its weights are of the first release, and of 0731 in model.gguf"
    checkpoint = open_checkpoint(path)
    assert (checkpoint.config.n_mtp, checkpoint.note) == (
        0,
        f"no drafts: mtp.gguf, which lies beside it, belongs to other weights ({message})",
    )
    given = open_checkpoint(path, side)
    assert (given.config.n_mtp, given.drafter_path) == (1, side)
    assert given.note == f"WARNING: mtp.gguf was made for other weights ({message}); it is used because it was given"


@pytest.mark.parametrize("name", COPIES)
def test_a_file_whose_copies_have_other_values(name: str, whole: Path, tmp_path: Path) -> None:
    """Shapes and metadata agree, yet it was made for other weights."""
    path = model(whole, tmp_path / "model.gguf")
    data, kind = main_part(whole)[name]
    side = alone(whole, tmp_path / "mtp.gguf", add={name: (data[::-1], kind)})
    checkpoint = open_checkpoint(path)
    wrong = f"{name}: its values are not those of model.gguf"
    assert (checkpoint.config.n_mtp, checkpoint.drafter_path) == (0, None)
    assert f"belongs to other weights ({wrong})" in checkpoint.note
    given = open_checkpoint(path, side)
    assert given.drafter_path == side
    assert given.note == f"WARNING: mtp.gguf was made for other weights ({wrong}); it is used because it was given"


def test_copies_that_only_round_otherwise(whole: Path, tmp_path: Path) -> None:
    """Programs round a value between two steps of Q8_0 up or down. Copies of another type are not compared."""
    path = model(whole, tmp_path / "model.gguf")
    data, kind = main_part(whole)["output.weight"]
    blocks = data.reshape(-1, 34).view(np.int8).copy()
    blocks[::3, 2:] -= np.sign(blocks[::3, 2:])
    side = tmp_path / "mtp.gguf"
    for changed, expected in ((blocks, side), (-blocks, None)):
        alone(whole, side, add={"output.weight": (changed.view(np.uint8).reshape(data.shape), kind)})
        assert open_checkpoint(path).drafter_path == expected
    rows = np.zeros((SMALL.vocab_size, SMALL.dim), np.float32)
    alone(whole, side, add={"output.weight": (rows, GGMLQuantizationType.F32)})
    assert open_checkpoint(path).drafter_path == side


def test_the_ends_of_large_copies_are_compared(tmp_path: Path) -> None:
    ours, name = np.zeros(1 << 18, np.uint8), "token_embd.weight"
    for place, differs in ((0, True), (70_000, False), (ours.size - 1, True)):
        theirs = ours.copy()
        theirs[place] = 1
        table = {name: TensorInfo(name, "F32", (ours.size // 4,), 0, ours.size)}
        one, other = (Header(Path("model.gguf"), {}, table, (Shard(tmp_path, data),)) for data in (ours, theirs))
        assert bool(other_copies(one, MtpBlock(other, 3))) == differs


def test_the_block_inside_wins_over_a_file_beside_it(whole: Path, tmp_path: Path) -> None:
    path, side = inside(whole, tmp_path / "model.gguf"), alone(whole, tmp_path / "mtp-model.gguf")
    checkpoint = open_checkpoint(path)
    assert (checkpoint.drafter_path, checkpoint.note) == (None, "")
    given = open_checkpoint(path, side)
    assert given.drafter_path == side
    assert given.note.startswith("WARNING: the MTP block inside the model is not used, because mtp-model.gguf was given; ")
    assert_same(values(given, *BLOCK), values(open_checkpoint(whole), *BLOCK))


def test_the_file_that_is_named_after_the_model(whole: Path, tmp_path: Path) -> None:
    path, other = model(whole, tmp_path / "model.gguf"), model(whole, tmp_path / "third.gguf")
    side = alone(whole, tmp_path / "mtp-model.gguf")
    alone(whole, tmp_path / "mtp-other.gguf")
    assert open_checkpoint(path).drafter_path == side
    with pytest.raises(InputError, match=r"third\.gguf: mtp file: mtp-model\.gguf and mtp-other\.gguf both lie beside it"):
        open_checkpoint(other)


def test_a_dspark_drafter_is_named(whole: Path, tmp_path: Path) -> None:
    path = model(whole, tmp_path / "model.gguf")
    side = write(tmp_path / "dspark-model.gguf", whole, block(whole, 0), {}, architecture="dflash")
    what = "dflash.block_size: this metadata key is missing; a DSpark drafter needs it"
    assert open_checkpoint(path).note == f"no drafts: dspark-model.gguf, which lies beside it, cannot be used: {what}"
    with pytest.raises(InputError, match=rf"^{side}: {what}$"):
        open_checkpoint(path, side)
    with pytest.raises(InputError, match=r"not a model; give the model, and the drafter beside it; `ds4jax inspect --drafter"):
        open_checkpoint(side)


def test_a_broken_file_beside_the_model_does_not_stop_it(whole: Path, tmp_path: Path) -> None:
    path = model(whole, tmp_path / "model.gguf")
    (tmp_path / "mtp.gguf").write_bytes(alone(whole, tmp_path / "made.gguf").read_bytes()[:5000])
    checkpoint = open_checkpoint(path)
    assert checkpoint.no_mtp.startswith("mtp.gguf, which lies beside it, cannot be used: ")
    assert NONE_INSIDE not in checkpoint.no_mtp

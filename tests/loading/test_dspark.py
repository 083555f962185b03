"""DSpark drafters: one drafter in three forms, how it is paired with a model, and what is refused."""

from __future__ import annotations

import json
import lzma
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from dspark_files import SHARED, Drafters, unpack
from gguf_files import rewrite
from hub_files import read_raw, write_raw
from nextn_files import Stored, write
from numerics import GOLDEN
from split_files import shards, write_set

import ds4jax
from ds4jax.config import Config
from ds4jax.decode.drafters.dspark import DSparkDrafter
from ds4jax.decode.drafters.mtp import MTPDrafter
from ds4jax.decode.drafters.named import name_of
from ds4jax.decode.drafters.second_opinion import SecondOpinion
from ds4jax.errors import InputError
from ds4jax.loading import hub, open_checkpoint
from ds4jax.loading.checkpoint import Checkpoint
from ds4jax.loading.convert import convert
from ds4jax.loading.gguf_names import slots
from ds4jax.model.parameters import shapes
from ds4jax.random_models.checkpoint import checkpoint as random_checkpoint
from ds4jax.random_models.checkpoint import config_of
from pallas_kernels.formats import Quantized

NUMBERS = {
    "n_mtp": 0,
    "n_dspark": 3,
    "dspark_block": 5,
    "dspark_layers": (3, 4, 5),
    "dspark_noise_id": 509,
    "dspark_rank": 32,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drafters]:
    found: dict[Config, dict[str, tuple[int, ...]]] = {}

    def shapes_once(config: Config) -> dict[str, tuple[int, ...]]:
        """Tracing the model takes a second."""
        return found.setdefault(config, shapes(config))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "shapes", shapes_once)
        yield unpack(tmp_path_factory.mktemp("dspark"))


def values(checkpoint: Checkpoint, prefix: str = "dspark.") -> dict[str, np.ndarray]:
    """Parameters as the loader reads them, in float32. The `gguf` package dequantises: a program for each shape takes long."""
    found = {}
    for tensor in checkpoint.tensors:
        if tensor.name.startswith(prefix):
            value = tensor.read()
            if isinstance(value, Quantized):
                found[tensor.name] = gguf.quants.dequantize(value.to_bytes(), gguf.GGMLQuantizationType[type(value).__name__])
            else:
                found[tensor.name] = np.asarray(value).astype(np.float32)
    return found


def assert_same(one: Checkpoint, other: Checkpoint, prefix: str = "dspark.") -> None:
    assert one.config == other.config
    ours, theirs = values(one, prefix), values(other, prefix)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], strict=True, err_msg=name)


def tensors(path: Path) -> dict[str, Stored]:
    return {one.name: (one.data, one.tensor_type) for one in gguf.GGUFReader(path).tensors}


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_three_forms_of_one_drafter(files: Drafters) -> None:
    directory = open_checkpoint(files.hub)
    fields = {name: getattr(directory.config, name) for name in NUMBERS}
    assert (fields, directory.drafter, directory.note, directory.ignored) == (NUMBERS, "dspark", "", ())
    for side in (files.antirez, files.dflash):
        opened = open_checkpoint(files.main, side)
        assert (opened.drafter, opened.drafter_path, opened.note, opened.ignored) == ("dspark", side, "", ())
        assert {tensor.name: tensor.shape for tensor in opened.tensors} == shapes(opened.config)
        assert_same(opened, directory)


@pytest.mark.skipif(not SHARED.exists(), reason="golden_dspark lies beside the checkout only where it was shared")
def test_the_whole_golden_model(tmp_path: Path) -> None:
    """As above with the files as they are, and all parameters of the model, too."""
    main = tmp_path / "main.gguf"
    main.write_bytes(lzma.decompress((SHARED / "main.gguf.xz").read_bytes()))
    directory = open_checkpoint(SHARED / "hub")
    for name in ("antirez.gguf", "dflash.gguf"):
        opened = open_checkpoint(main, SHARED / name)
        assert opened.note == ""
        assert_same(opened, directory, "")


def test_the_tables_of_names_agree() -> None:
    """What is read of a header has the shapes of the model's parameters."""
    config = config_of("small-0731-q2")
    assert {slot.name: slot.shape for slot in slots(config)} == shapes(config)
    opened = random_checkpoint(config, "small-0731-q2")
    assert opened.drafter == "dspark"
    assert {tensor.stored for tensor in opened.tensors if "stages.2.ffn.experts" in tensor.name} == {"IQ2_XXS", "Q2_K"}


@pytest.mark.parametrize("form", ["antirez", "dflash"])
def test_found_beside_and_split(form: str, files: Drafters, tmp_path: Path) -> None:
    main, source = tmp_path / "model.gguf", getattr(files, form)
    main.symlink_to(files.main)
    expected = open_checkpoint(files.main, source)
    # The first shard may hold metadata alone, as unsloth's do.
    first, *others = write_set(tmp_path, shards(source, [0, 40]), f"{form}-dspark")
    for given in (None, first, others[0]):
        opened = open_checkpoint(main, given)
        assert (opened.config, opened.drafter, opened.drafter_path) == (expected.config, "dspark", first)
        assert [tensor.name for tensor in opened.tensors] == [tensor.name for tensor in expected.tensors]
        assert set(opened.files) == {main, first, *others}


@pytest.mark.parametrize("kind", ["Q8_0", "F16", "Q5_1", "IQ4_NL"])
def test_any_type_in_any_matrix(kind: str, files: Drafters, tmp_path: Path) -> None:
    stored = gguf.GGMLQuantizationType[kind]
    path, made = tmp_path / "dspark.gguf", {}
    for name, (data, old) in tensors(files.dflash).items():
        shape = gguf.quant_shape_from_byte_shape(data.shape, old) if data.dtype == np.uint8 else data.shape
        made[name] = (data, old)
        if len(shape) > 1:
            block, nbytes = gguf.GGML_QUANT_SIZES[stored]
            zeros = np.zeros((*shape[:-1], shape[-1] // block * nbytes), np.uint8)
            made[name] = (zeros if block > 1 else np.zeros(shape, np.float16), stored)
    write(path, files.dflash, made, {}, architecture="dflash")
    opened = {tensor.name: tensor for tensor in open_checkpoint(files.main, path).tensors}
    for name in ("markov_w1", "markov_w2", "confidence", "main_proj", "stages.1.attn.wo_a", "stages.0.ffn.experts.w2"):
        assert opened[f"dspark.{name}.weight"].stored == kind


def test_a_last_dimension_of_one_may_be_left_out(files: Drafters, tmp_path: Path) -> None:
    path, stored = tmp_path / "dspark.gguf", tensors(files.dflash)
    data, kind = stored["conf_proj.weight"]
    write(path, files.dflash, stored | {"conf_proj.weight": (data.reshape(-1), kind)}, {}, architecture="dflash")
    confidence = next(one for one in open_checkpoint(files.main, path).tensors if one.name == "dspark.confidence.weight")
    assert confidence.read().shape == confidence.shape == (1, 160)


W2 = "mtp.2.markov_head.markov_w2.weight"
F64 = (np.zeros((512, 32)), gguf.GGMLQuantizationType.F64)
SHORT = (np.zeros((511, 32), np.float32), gguf.GGMLQuantizationType.F32)
PREFIX = "deepseek4.dspark"
BROKEN_ANTIREZ = {
    "no second table": ({W2: None}, {}, f"{W2}: this tensor is missing"),
    "no first table": ({W2.replace("w2", "w1"): None}, {}, f"{W2.replace('w2', 'w1')}: this tensor is missing"),
    "a norm": ({"mtp.1.attn_norm.weight": None}, {}, "mtp.1.attn_norm.weight: this tensor is missing"),
    "type": ({W2: F64}, {}, f"{W2}: type F64 is not supported for this tensor"),
    "shape": ({W2: SHORT}, {}, f"{W2}: dimensions [32, 511]; the metadata asks for [32, 512]"),
    "rank": ({}, {f"{PREFIX}.markov_rank": 16}, "markov_w1.weight: dimensions [32, 512]; the metadata asks for [16, 512]"),
    "layer": ({}, {f"{PREFIX}.target_layer_ids": [3, 4, 6]}, "dspark_layers is [3, 4, 6]; it must name layers below"),
    "no tap": (
        {},
        {f"{PREFIX}.target_layer_ids": [4, 5]},
        "main_proj.weight: dimensions [384, 128]; the metadata asks for [2",
    ),
    "noise": ({}, {f"{PREFIX}.noise_token_id": 512}, "dspark_noise_id is 512; it must be below vocab_size (512)"),
    "stages": ({}, {f"{PREFIX}.stage_count": 2}, f"{PREFIX}.stage_count: is 2, and its tensors make 3 stages"),
}
BROKEN_DFLASH = {
    "no table": ({"markov_w1.weight": None}, {}, "markov_w1.weight: this tensor is missing; a DSpark drafter needs it"),
    "confidence": ({"conf_proj.weight": None}, {}, "conf_proj.weight: this tensor is missing"),
    "blocks": ({}, {"dflash.block_count": 4}, "dflash.block_count: is 4, and its tensors make 3 stages"),
    "layers": ({}, {"dflash.target_layers": [0, 5, 6]}, "dspark_layers is [-1, 4, 5]; it must name layers below n_layers (6)"),
    "ratios": ({}, {"dflash.attention.compress_ratios": [0, 4, 0]}, "the stages of a DSpark drafter have no compression"),
    "experts": ({}, {"dflash.expert_count": 4}, "dflash.expert_count: is 4, and 8 in model.gguf"),
    "vocabulary": ({}, {"tokenizer.ggml.tokens": ["a", "b"]}, "tokenizer.ggml.tokens: 2 entries, and 512 in model.gguf"),
}


def broken(source: Path, path: Path, changes: dict[str, Stored | None], more: dict[str, Any], architecture: str) -> Path:
    made = {name: tensor for name, tensor in (tensors(source) | changes).items() if tensor is not None}
    return write(path, source, made, more, architecture=architecture)


@pytest.mark.parametrize("form", ["antirez", "dflash"])
def test_broken_files_are_refused(form: str, files: Drafters, tmp_path: Path) -> None:
    cases, architecture = {"antirez": (BROKEN_ANTIREZ, "deepseek4-dspark"), "dflash": (BROKEN_DFLASH, "dflash")}[form]
    main = tmp_path / "model.gguf"
    main.symlink_to(files.main)
    for changes, more, message in cases.values():
        path = broken(getattr(files, form), tmp_path / "dspark.gguf", changes, more, architecture)
        told = refused(main, path)
        assert told.startswith(f"{path}: "), told
        assert message in told
        # Beside the model it is no reason to stop, but it is named.
        beside = open_checkpoint(main)
        assert (beside.drafter, beside.config.n_dspark) == ("none", 0)
        assert message in beside.note
        assert message in refused(main, drafter="dspark")


def test_a_broken_directory_is_refused(files: Drafters, tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    shutil.copytree(files.hub, folder)
    raw, last = json.loads((folder / "config.json").read_text()), folder / "model-00005-of-00005.safetensors"
    for key, value, message in (
        ("dspark_markov_rank", 16, "proj.weight: has shape [1, 160]; config.json makes it [1, 144]"),
        ("dspark_block_size", None, "config.json: dspark_block_size: is None; the DSpark drafter of these weights needs"),
        ("dspark_target_layer_ids", [3, 4, 9], "config.json: dspark_target_layer_ids: is 9; "),
        ("compress_ratios", raw["compress_ratios"][:7], "compress_ratios: has 7 entries; 6 layers and 3 DSpark stages make 9"),
    ):
        (folder / "config.json").write_text(json.dumps(raw | {key: value}))
        assert message in refused(folder)
    (folder / "config.json").write_text(json.dumps(raw))
    stored, name = read_raw(last), "mtp.2.markov_head.markov_w2.weight"
    write_raw(last, stored | {name: ("F16", [512, 32], bytes(512 * 64))})
    assert f"{last}: {name}: has type F16; supported here are F8_E4M3, I8, BF16, F32" in refused(folder)
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for missing in (name, "mtp.0.main_proj.weight", "mtp.1.attn_norm.weight"):
        rest = {one: tensor for one, tensor in read_raw(files.hub / places[missing]).items() if one != missing}
        shutil.copytree(files.hub, folder, dirs_exist_ok=True)
        write_raw(folder / places[missing], rest)
        kept = {one: place for one, place in places.items() if one != missing}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": kept}))
        assert f"{missing}: missing" in refused(folder)
        assert open_checkpoint(folder, drafter="none").note == ""


def test_other_weights_are_paired_by_hand_alone(files: Drafters, tmp_path: Path) -> None:
    main, side = tmp_path / "model.gguf", tmp_path / "dspark.gguf"
    shutil.copy(files.dflash, side)
    ratios: dict[str, int | list[int]] = {"deepseek4.attention.compress_ratios": [0, 0, 4, 16, 4, 16, 0]}
    rewrite(files.main, main, "deepseek4", lambda name: True, more=ratios)
    says = "compress_ratios: has 7 entries in model.gguf; 6 layers and 3 DSpark stages make 9, the last 3 of them 0"
    beside = open_checkpoint(main)
    assert (beside.drafter, beside.drafter_path) == ("none", None)
    assert f"dspark.gguf, which lies beside it, belongs to other weights (deepseek4.attention.{says})" in beside.no_mtp
    given = open_checkpoint(main, side)
    assert (given.drafter, given.config.n_dspark) == ("dspark", 3)
    expected = f"WARNING: dspark.gguf was made for other weights (deepseek4.attention.{says}); it is used because it was given"
    assert given.note == expected
    # Without entries beyond the layers, nothing is known.
    rewrite(files.main, main, "deepseek4", lambda name: True, more={"deepseek4.attention.compress_ratios": [0, 0, 4, 16, 4, 16]})
    assert open_checkpoint(main).drafter_path == side
    # A release that only one of them names.
    write(side, files.dflash, tensors(files.dflash), {"general.name": "DeepSeek V4 Flash 0731"}, architecture="dflash")
    write(main, files.main, tensors(files.main), {"general.name": "DeepSeek V4 Flash", "deepseek4.vocab_size": 512})
    assert "general.name: its weights are of 0731, and of the first release in model.gguf" in open_checkpoint(main).note


@pytest.fixture(scope="module")
def both(files: Drafters, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with an MTP file and a DSpark file beside it, which may both be its own."""
    folder = tmp_path_factory.mktemp("both")
    # The name is that of the drafter's weights.
    shutil.copytree(GOLDEN / "hub", folder / "ds4jax-0731")
    convert(folder / "ds4jax-0731", folder / "model.gguf", dense="bf16")
    shutil.copy(files.antirez, folder / "dspark-model.gguf")
    rewrite(
        folder / "model.gguf",
        folder / "made.gguf",
        "deepseek4",
        lambda name: True,
        more={"deepseek4.attention.compress_ratios": [0, 0, 4, 16, 4, 16]},
    )
    (folder / "made.gguf").replace(folder / "model.gguf")
    return folder / "model.gguf"


@pytest.mark.parametrize(
    ("wanted", "kind", "name"),
    [
        ("auto", "dspark", "dspark-model.gguf"),
        ("dspark", "dspark", "dspark-model.gguf"),
        ("mtp", "mtp", "mtp-model.gguf"),
        ("ngram", "ngram", None),
        ("none", "none", None),
    ],
)
def test_the_drafter_that_is_asked_for(wanted: str, kind: str, name: str | None, both: Path) -> None:
    opened = open_checkpoint(both, drafter=wanted)
    assert (opened.drafter, opened.note) == (kind, "")
    assert opened.drafter_path == (both.with_name(name) if name else None)
    assert (opened.config.n_mtp, opened.config.n_dspark) == (int(kind == "mtp"), 3 * (kind == "dspark"))
    own = {tensor.name.partition(".")[0] for tensor in opened.tensors} & {"mtp", "dspark"}
    assert own == ({kind} if name else set())


def test_a_drafter_that_is_not_there(files: Drafters, both: Path) -> None:
    assert refused(files.main, drafter="dspark") == f"{files.main}: drafter is dspark: these weights have no DSpark drafter"
    assert refused(files.main, drafter="mtp") == f"{files.main}: drafter is mtp: these weights have no MTP block"
    reason = "its mtp.* tensors are a DSpark drafter, which is not an MTP block"
    assert refused(files.hub, drafter="mtp") == f"{files.hub}: drafter is mtp: {reason}"
    side = both.with_name("mtp-model.gguf")
    assert refused(both, side, drafter="dspark") == f"{side}: drafter file: it holds an MTP block, and drafter is dspark"
    assert refused(both, side, drafter="none").startswith(f"{side}: drafter file: drafter is none, which reads no weights")
    assert "drafter is 'medusa'; it must be auto, mtp, dspark, ngram, mtp+ngram, dspark+ngram, none" in refused(
        both, drafter="medusa"
    )


def test_a_directory_without_its_drafter(files: Drafters) -> None:
    for wanted in ("none", "ngram"):
        opened = open_checkpoint(files.hub, drafter=wanted)
        assert (opened.drafter, opened.config.n_dspark, opened.ignored, opened.note) == (wanted, 0, (), "")
    model = ds4jax.load(drafter="ngram")
    assert (model.drafter_name, model.config.n_mtp) == ("ngram", 0)


@pytest.mark.parametrize(("first", "drafter"), [("mtp", MTPDrafter()), ("dspark", DSparkDrafter())])
def test_n_grams_as_a_second_opinion_have_a_name(first: str, drafter: Any) -> None:
    model, alone = ds4jax.load(drafter=f"{first}+ngram"), ds4jax.load(drafter=first)
    assert (model.drafter_name, model.drafter(None)) == (f"{first}+ngram", SecondOpinion(drafter))
    assert name_of(SecondOpinion(drafter)) == model.drafter_name
    assert (model.max_draft, model.config) == (alone.max_draft, alone.config)


def test_a_second_opinion_needs_the_first(files: Drafters) -> None:
    assert refused(files.main, drafter="mtp+ngram") == f"{files.main}: drafter is mtp: these weights have no MTP block"


@pytest.mark.parametrize("flavour", ["mainline", "antirez"])
def test_conversions_load_back(flavour: str, files: Drafters, tmp_path: Path) -> None:
    out, other = tmp_path / "a" / "out.gguf", tmp_path / "b" / "out.gguf"
    out.parent.mkdir()
    other.parent.mkdir()
    convert(files.hub, out, flavour=flavour, dense="bf16")
    opened = open_checkpoint(out)
    assert (opened.drafter, opened.drafter_path, opened.note) == ("dspark", out.with_name("dspark-out.gguf"), "")
    expected = open_checkpoint(files.hub)
    assert opened.config == expected.config
    # The other flavour copies all tensors, and a directory holds the same values again.
    plan = convert(out, other, flavour="antirez" if flavour == "mainline" else "mainline")
    assert "the DSpark drafter is taken from dspark-out.gguf" in plan.note
    again = open_checkpoint(other)
    assert (again.config, again.drafter, again.note) == (expected.config, "dspark", "")
    convert(other, tmp_path / "hub", flavour="hub")
    back = open_checkpoint(tmp_path / "hub")
    assert (back.config, back.drafter, back.note) == (expected.config, "dspark", "")
    for name in ("main_proj.weight", "markov_w1.weight", "confidence.weight", "stages.2.ffn.experts.w2.weight", "hc_head_fn"):
        found = [next(one for one in each.tensors if one.name == f"dspark.{name}") for each in (expected, back)]
        np.testing.assert_array_equal(*(np.asarray(one.read()) for one in found), strict=True, err_msg=name)


def test_a_drafter_inside_the_model(files: Drafters, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    more = {
        f"{PREFIX}.{key}": value for key, value in (("block_size", 5), ("noise_token_id", 509), ("target_layer_ids", [3, 4, 5]))
    }
    write(path, files.main, tensors(files.main) | tensors(files.antirez), more | {"deepseek4.vocab_size": 512})
    opened = open_checkpoint(path)
    assert (opened.drafter, opened.drafter_path, opened.note) == ("dspark", None, "")
    assert opened.config == open_checkpoint(files.hub).config
    assert open_checkpoint(path, drafter="none").ignored == ()

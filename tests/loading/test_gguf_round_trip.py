"""Write, open, read: values equal to the `gguf` package's, names and shapes equal to the model's."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import SMALL, random_tensors, rewrite, vocabulary, write_small
from numerics import assert_bits_equal
from quantized import as_float, form, random_blocks

import ds4jax
from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.language_model import LanguageModel
from ds4jax.loading import open_checkpoint
from ds4jax.loading.gguf_names import slots
from ds4jax.loading.gguf_values import encode
from ds4jax.loading.gguf_write import write_gguf
from ds4jax.model.parameters import build, shapes
from pallas_kernels.formats import FORMATS, Q8_0, Quantized

# One file of each mixture that a writer may choose.
OPTIONS = {
    "float": {},
    "as published": {"quantize": True},
    "quantised embedding": {"quantize": True, "embedding": "Q8_0", "small": "F32"},
    "bfloat16": {"embedding": "BF16", "small": "BF16"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_values_equal_the_gguf_packages(options: dict, tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    write_small(path, **options)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    gguf_names = {slot.name: slot.gguf_name for slot in slots(SMALL)}
    checkpoint = open_checkpoint(path)
    assert {tensor.name for tensor in checkpoint.tensors} == gguf_names.keys()
    for tensor in checkpoint.tensors:
        theirs = stored[gguf_names[tensor.name]]
        value = tensor.read()
        assert (tensor.stored, tensor.nbytes) == (theirs.tensor_type.name, theirs.n_bytes)
        assert form(value) == tensor.form == tensor.stored
        assert value.nbytes == tensor.device_nbytes
        found = as_float(value) if isinstance(value, Q8_0) else value
        assert found.shape == tensor.shape
        expected = theirs.data if tensor.stored == "I32" else gguf.quants.dequantize(theirs.data, theirs.tensor_type)
        np.testing.assert_array_equal(np.asarray(found).astype(expected.dtype), expected.reshape(tensor.shape))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_stored_values_are_the_given_ones(options: dict, tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    given = write_small(path, **options)
    for tensor in open_checkpoint(path).tensors:
        value, expected = tensor.read(), given[tensor.name]
        found = np.asarray(as_float(value) if isinstance(value, Q8_0) else value).astype(expected.dtype)
        # Half a step of the type, relative to the largest value; for Q8_0 also that of its float16 scale.
        bound = {"Q8_0": 1 / 254 + 2.0**-11, "F16": 2.0**-11, "BF16": 2.0**-8}.get(tensor.stored, 0)
        assert np.abs(found - expected).max() <= bound * np.abs(expected).max(), tensor.name


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.long
def test_halves_compute_as_the_float32_values_that_they_are(strict: bool, tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    write_small(path, quantize=True)
    model = ds4jax.load(path)
    narrow = {tensor.name: tensor.read() for tensor in open_checkpoint(path).tensors}
    halves = {name for name, value in narrow.items() if isinstance(value, jax.Array) and value.dtype == jnp.float16}
    assert {"embed.weight", "hc_head_fn", "layers.1.ffn.gate.weight", "layers.1.attn.compressor.ape"} < halves
    assert {"layers.1.attn.compressor.wkv.weight", "layers.1.attn.indexer.wq_b.weight", "mtp.0.hc_attn_fn"} < halves
    wide = {name: jnp.asarray(np.asarray(value, np.float32)) if name in halves else value for name, value in narrow.items()}
    wider = LanguageModel(build(model.config, wide.items()), None)
    ids = np.random.default_rng(0).integers(0, SMALL.vocab_size, 24)
    found, expected = (one.logits(ids, decode_from=20, mtp=True, strict=strict) for one in (model, wider))
    for name in ("logits", "mtp_logits"):
        assert_bits_equal(found[name], expected[name])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_values_stay_when_the_file_changes(options: dict, tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    write_small(path, **options)
    opened, values = open_checkpoint(path), {tensor.name: tensor.read() for tensor in open_checkpoint(path).tensors}
    before = {name: [np.array(leaf) for leaf in jax.tree.leaves(value)] for name, value in values.items()}
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    for tensor in opened.tensors:
        for now, then in zip(jax.tree.leaves(values[tensor.name]), before[tensor.name], strict=True):
            assert_bits_equal(now, then)
    # The file is read where it lies, so that a view of it would have changed.
    assert not np.asarray(next(tensor.read() for tensor in opened.tensors if tensor.name == "norm.weight")).any()


def test_a_model_given_as_q8_0_and_bfloat16_is_stored_as_it_is(tmp_path: Path) -> None:
    def narrow(name: str, value: np.ndarray) -> jax.Array | Q8_0 | np.ndarray:
        if "experts" in name:
            return Q8_0.quantize(value)
        return jnp.asarray(value.astype(jnp.bfloat16)) if ".attn.wq_" in name else value

    given = {name: narrow(name, value) for name, value in random_tensors(SMALL).items()}
    path = tmp_path / "small.gguf"
    write_gguf(path, SMALL, given, **vocabulary())
    for tensor in open_checkpoint(path).tensors:
        expected, found = given[tensor.name], tensor.read()
        if isinstance(expected, Q8_0 | jax.Array):
            assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), found, expected))


MIXED = dataclasses.replace(SMALL, dim=256, moe_dim=256)
EXPERTS = {
    "layers.0": ("IQ2_XXS", "Q2_K"),
    "layers.1": ("Q4_K", "Q4_K"),
    "layers.2": ("MXFP4", "Q8_0"),
    "mtp.0": ("Q8_0", "IQ2_XXS"),
}


def test_every_layer_may_have_expert_types_of_its_own(tmp_path: Path) -> None:
    """Mixed files: stored as given, read with the same planes, and with the `gguf` package's values."""

    def quantized(name: str, value: np.ndarray) -> np.ndarray | Quantized:
        layer, experts, matrix = name.partition(".ffn.experts.")
        if not experts:
            return value
        format = FORMATS[EXPERTS[layer][matrix == "w2.weight"]]
        return format.from_bytes(random_blocks(format, value.shape))

    given = {name: quantized(name, value) for name, value in random_tensors(MIXED).items()}
    path = tmp_path / "mixed.gguf"
    write_gguf(path, MIXED, given)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    gguf_names = {slot.name: slot.gguf_name for slot in slots(MIXED)}
    seen = set()
    for tensor in open_checkpoint(path).tensors:
        expected = given[tensor.name]
        if not isinstance(expected, Quantized):
            continue
        seen.add(tensor.stored)
        value, theirs = tensor.read(), stored[gguf_names[tensor.name]]
        assert isinstance(value, type(expected))
        assert (tensor.stored, tensor.nbytes, tensor.device_nbytes) == (theirs.tensor_type.name, theirs.n_bytes, value.nbytes)
        jax.tree.map(assert_bits_equal, value, expected)
        dequantized = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
        assert_bits_equal(as_float(value), dequantized.reshape(tensor.shape))
    assert seen == {kind for pair in EXPERTS.values() for kind in pair}


def test_a_type_that_a_parameter_never_has(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hc_head_fn: cannot be stored as I32; it must be Q4_0 or .* or F32"):
        write_gguf(tmp_path / "mixed.gguf", MIXED, random_tensors(MIXED), small="I32")


def test_a_quantised_value_is_not_stored_as_something_else() -> None:
    value = FORMATS["Q4_K"].from_bytes(random_blocks(FORMATS["Q4_K"], (32, 256)))
    for stored in ("Q8_0", "F32"):
        with pytest.raises(ValueError, match=rf"layers\.1\.attn\.wkv\.weight: given as Q4_K, to be stored as {stored}"):
            encode(value, stored, "layers.1.attn.wkv.weight")


@pytest.mark.parametrize("config", [SMALL, dataclasses.replace(SMALL, n_mtp=0, compress_ratios=(128, 0, 4), o_groups=1)])
def test_shapes_are_the_models(config: Config) -> None:
    assert {slot.name: slot.shape for slot in slots(config)} == shapes(config)


def test_config_tokenizer_and_metadata_return(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, hc_eps=3e-7, route_scale=1.7, swiglu_limit=7.3, eos_id=2, beta_fast=31.5)
    path = tmp_path / "small.gguf"
    write_small(path, config, metadata={"general.name": "small", "ds4jax.steps": 50, "ds4jax.loss": 1.25, "ds4jax.done": True})
    checkpoint = open_checkpoint(path)
    assert checkpoint.config == config
    assert (checkpoint.kind, checkpoint.path, checkpoint.ignored) == ("gguf", path, ())
    names = ("general.name", "ds4jax.steps", "ds4jax.loss", "ds4jax.done", "ds4jax.qat")
    assert [checkpoint.metadata[name] for name in names] == ["small", 50, 1.25, True, False]
    tokenizer = checkpoint.tokenizer
    assert tokenizer is not None
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (640, 0, 2)


def test_without_tokenizer_and_mtp(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, n_mtp=0)
    path = tmp_path / "small.gguf"
    write_gguf(path, config, random_tensors(config))
    checkpoint = open_checkpoint(path)
    assert checkpoint.tokenizer is None
    assert checkpoint.config == config
    build(config, ((tensor.name, tensor.read()) for tensor in checkpoint.tensors))


def test_tensors_come_in_file_order_and_strangers_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    write_small(path)
    rewrite(path, tmp_path / "other.gguf", "deepseek4", lambda name: True, add="blk.9.stranger.weight")
    checkpoint, first = open_checkpoint(tmp_path / "other.gguf"), open_checkpoint(path)
    assert checkpoint.ignored == ("blk.9.stranger.weight",)
    assert [tensor.name for tensor in checkpoint.tensors] == [tensor.name for tensor in first.tensors][::-1]
    assert checkpoint.config == first.config


def remove(tensors: dict[str, np.ndarray]) -> None:
    del tensors["layers.1.attn.wkv.weight"]


def add(tensors: dict[str, np.ndarray]) -> None:
    tensors["layers.1.attn.other"] = np.zeros(1, np.float32)


def reshape(tensors: dict[str, np.ndarray]) -> None:
    tensors["layers.1.attn.wkv.weight"] = tensors["layers.1.attn.wkv.weight"].T


def overflow(tensors: dict[str, np.ndarray]) -> None:
    tensors["layers.1.ffn.gate.weight"] = tensors["layers.1.ffn.gate.weight"] * np.float32(1e6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove, r"layers\.1\.attn\.wkv\.weight: no value"),
        (add, r"layers\.1\.attn\.other: the model has no such"),
        (reshape, r"layers\.1\.attn\.wkv\.weight: shape \[64, 32\]"),
        (overflow, r"layers\.1\.ffn\.gate\.weight: value \[0, 0\] is not finite"),
    ],
)
def test_writer_refuses(change: Callable[[dict[str, np.ndarray]], None], message: str, tmp_path: Path) -> None:
    tensors = random_tensors(SMALL)
    change(tensors)
    with pytest.raises(ValueError, match=message):
        write_gguf(tmp_path / "small.gguf", SMALL, tensors)
    assert os.listdir(tmp_path) == []


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "small.gguf"
    path.write_bytes(b"before")

    def fail(self: gguf.GGUFWriter) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fail)
    with pytest.raises(InputError, match=r"small\.gguf: cannot be written: No space left"):
        write_small(path)
    assert os.listdir(tmp_path) == ["small.gguf"]
    assert path.read_bytes() == b"before"
    with pytest.raises(InputError, match="cannot be written: Not a directory"):
        write_small(path / "below.gguf")

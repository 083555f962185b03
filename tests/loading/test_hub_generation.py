"""Hub checkpoints for generation: FP4 experts become MXFP4 exactly, dense matrices the requested type."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from hub_files import Raw, published_storage, read_raw, write_raw
from numerics import GOLDEN, arrays, assert_bits_equal, assert_close
from quantized import as_float, form

from ds4jax.errors import InputError
from ds4jax.language_model import LanguageModel
from ds4jax.loading import hub_read, hub_values
from ds4jax.loading.checkpoint import Checkpoint
from ds4jax.loading.gguf_names import DENSE, EXPERTS, slots
from ds4jax.loading.hub import open_hub
from ds4jax.model.parameters import build, shapes
from pallas_kernels.formats import MXFP4, Q8_0, Quantized

HUB = GOLDEN / "hub"
LINEAR, ROUTER, NORM = "layers.0.attn.wkv.weight", "layers.3.ffn.gate.weight", "layers.2.attn_norm.weight"
STACK, EXPERT = "layers.3.ffn.experts.w{}.weight", "layers.3.ffn.experts.5.w{}.{}"
FORMS = {"q8_0": "Q8_0", "bf16": "BF16", "f32": "F32"}


@functools.cache
def golden_raw() -> Raw:
    return {name: tensor for file in sorted(HUB.glob("*.safetensors")) for name, tensor in read_raw(file).items()}


def changed(folder: Path, changes: dict[str, tuple[str, list[int], bytes] | None]) -> Path:
    """The golden checkpoint as one file, with tensors replaced or (None) left out."""
    shutil.copy(HUB / "config.json", folder)
    tensors = {name: tensor for name, tensor in (golden_raw() | changes).items() if tensor is not None}
    write_raw(folder / "model.safetensors", tensors)
    return folder


def read(checkpoint: Checkpoint, name: str) -> Quantized | np.ndarray:
    value = next(tensor for tensor in checkpoint.tensors if tensor.name == name).read()
    return value if isinstance(value, Quantized) else np.asarray(value)


def expected(name: str) -> np.ndarray:
    """A golden weight by its canonical name."""
    head, experts, tail = name.partition(".ffn.experts.")
    if not experts:
        return arrays("weights")[name]
    return np.stack([arrays("weights")[f"{head}{experts}{expert}.{tail}"] for expert in range(8)])


@pytest.mark.parametrize("dense", FORMS)
def test_every_golden_tensor(dense: str) -> None:
    checkpoint = open_hub(HUB, dense=dense)
    kinds = {slot.name: slot.kind for slot in slots(checkpoint.config)}
    assert {tensor.name: tensor.shape for tensor in checkpoint.tensors} == shapes(checkpoint.config)
    for tensor in checkpoint.tensors:
        value, golden = tensor.read(), expected(tensor.name)
        assert (form(value), value.nbytes) == (tensor.form, tensor.device_nbytes), tensor.name
        if kinds[tensor.name] is EXPERTS:
            assert isinstance(value, MXFP4), tensor.name
            np.testing.assert_array_equal(np.asarray(as_float(value)), golden, err_msg=tensor.name, strict=True)
        elif kinds[tensor.name] is DENSE and dense == "q8_0":
            assert isinstance(value, Q8_0), tensor.name
            assert_bits_equal(value.to_bytes(), Q8_0.encode(golden))
        else:
            is_matrix = tensor.name.endswith(".weight") and len(tensor.shape) > 1
            float_type = jnp.bfloat16 if is_matrix and dense != "f32" else jnp.float32
            assert value.dtype == (jnp.int32 if "tid2eid" in tensor.name else float_type), tensor.name
            np.testing.assert_array_equal(np.asarray(value).astype(golden.dtype), golden, err_msg=tensor.name, strict=True)


def test_experts_are_the_bits_of_the_files_and_ggml_reads_the_same() -> None:
    value = read(open_hub(HUB, dense="q8_0"), STACK.format(2))
    raw = value.to_bytes()
    decoded = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.MXFP4)
    np.testing.assert_array_equal(decoded, expected(STACK.format(2)), strict=True)
    blocks = raw.reshape(8, 128, 2, 17)
    for expert in range(8):
        codes, scales = (golden_raw()[f"layers.3.ffn.experts.{expert}.w2.{kind}"][2] for kind in ("weight", "scale"))
        assert blocks[expert, :, :, 0].tobytes() == scales
        halves = blocks[expert, :, :, 1:]
        in_order = np.concatenate([halves & 15, halves >> 4], axis=-1).reshape(128, 64)
        np.testing.assert_array_equal(in_order[:, ::2] | in_order[:, 1::2] << 4, np.frombuffer(codes, np.uint8).reshape(128, 32))


def test_every_pair_of_codes_and_every_scale() -> None:
    codes = np.random.default_rng(0).permutation(np.tile(np.arange(256, dtype=np.uint8), 253 * 16 // 256 + 1))[: 253 * 16]
    codes, scales = codes.reshape(253, 16), np.arange(253, dtype=np.uint8)[:, None]
    blocks = hub_values.to_mxfp4(codes, scales)
    # Adding 0 turns −0 into 0, which is how ggml and this format spell code 8.
    expected_values = hub_values.from_fp4(codes, scales) + np.float32(0)
    assert_bits_equal(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.MXFP4), expected_values)
    # A device may flush what is below float32's normal range.
    assert_bits_equal(np.asarray(as_float(MXFP4.from_bytes(blocks)))[2:], expected_values[2:])


@pytest.mark.parametrize("dense", [None, "q8_0", "bf16"])
def test_a_few_rows_at_a_time_are_the_whole(dense: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    names = (LINEAR, "embed.weight", "layers.0.attn.wq_b.weight", "layers.1.ffn.gate.tid2eid", STACK.format(1), NORM)
    whole = {name: read(open_hub(HUB, dense=dense), name) for name in names}
    monkeypatch.setattr(hub_read, "_VALUES", 1)
    checkpoint = open_hub(HUB, dense=dense)
    for name, value in whole.items():
        piecewise = read(checkpoint, name)
        if isinstance(value, Quantized):
            value, piecewise = value.to_bytes(), piecewise.to_bytes()
        assert_bits_equal(piecewise, value)


def test_refuses_other_types() -> None:
    with pytest.raises(InputError, match="dense is 'f16'; it must be q8_0, bf16, f32"):
        open_hub(HUB, dense="f16")


def test_float32_matrices_stay_float32_where_they_are_small(tmp_path: Path) -> None:
    changes = {ROUTER: ("F32", [8, 128], arrays("weights")[ROUTER].tobytes())}
    checkpoint = open_hub(changed(tmp_path, changes), dense="bf16")
    np.testing.assert_array_equal(read(checkpoint, ROUTER), arrays("weights")[ROUTER], strict=True)
    assert read(checkpoint, LINEAR).dtype == jnp.bfloat16


@pytest.mark.parametrize("matrix", [1, 2, 3])
def test_experts_that_are_not_all_fp4(tmp_path: Path, matrix: int) -> None:
    """Become dense ones, gate and up together; the others of the layer stay."""
    shape = [128, 64] if matrix == 2 else [64, 128]
    changes = {
        EXPERT.format(matrix, "weight"): ("F8_E4M3", shape, bytes([0x38]) * 128 * 64),
        EXPERT.format(matrix, "scale"): ("F8_E8M0", [1, 1], bytes([127 - 6])),
    }
    checkpoint = open_hub(changed(tmp_path, changes), dense="q8_0")
    dense = {2} if matrix == 2 else {1, 3}
    for number in (1, 2, 3):
        value, stack = read(checkpoint, STACK.format(number)), expected(STACK.format(number)).copy()
        if number == matrix:
            stack[5] = 2**-6
        assert type(value) is (Q8_0 if number in dense else MXFP4)
        assert_bits_equal(value.to_bytes(), Q8_0.encode(stack) if number in dense else value.to_bytes())
        if number not in dense:
            np.testing.assert_array_equal(np.asarray(as_float(value)), stack)


@pytest.mark.parametrize("exponent", [253, 254, 255])
def test_refuses_experts_that_are_not_finite(tmp_path: Path, exponent: int) -> None:
    scales = bytearray(golden_raw()[EXPERT.format(2, "scale")][2])
    scales[100] = exponent
    directory = changed(tmp_path, {EXPERT.format(2, "scale"): ("F8_E8M0", [128, 2], bytes(scales))})
    with pytest.raises(InputError, match=rf"model\.safetensors: {EXPERT.format(2, 'weight')}: holds values that are not finite"):
        read(open_hub(directory, dense="bf16"), STACK.format(2))


@pytest.mark.parametrize(("dense", "value"), [("q8_0", 1e9), ("bf16", 3.4e38)])
def test_refuses_values_that_the_type_cannot_hold(tmp_path: Path, dense: str, value: float) -> None:
    large = np.full((96, 128), value, np.float32)
    changes = {LINEAR: ("F32", [96, 128], large.tobytes()), LINEAR.replace("weight", "scale"): None}
    directory = changed(tmp_path, changes)
    with pytest.raises(InputError, match=f"{LINEAR}: holds values too large for {FORMS[dense]}; keep dense matrices as f32"):
        read(open_hub(directory, dense=dense), LINEAR)
    assert_bits_equal(read(open_hub(directory, dense="f32"), LINEAR), large)


def test_rows_that_blocks_do_not_divide(tmp_path: Path) -> None:
    config = dataclasses.replace(open_hub(HUB).config, q_lora_rank=48)
    sizes = {"F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "BF16": 2, "F32": 4, "I64": 8}
    tensors = {
        part: (dtype, list(size), bytes(math.prod(size) * sizes[dtype]))
        for name, shape in shapes(config).items()
        for part, (dtype, size, _) in published_storage(name, shape).items()
    }
    write_raw(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps(json.loads((HUB / "config.json").read_text()) | {"q_lora_rank": 48}))
    with pytest.raises(InputError, match=r"wq_b\.weight: rows of 48 values; Q8_0 needs a multiple of 32"):
        open_hub(tmp_path, dense="q8_0")
    assert read(open_hub(tmp_path, dense="bf16"), "layers.0.attn.wq_b.weight").shape == (384, 48)


@pytest.mark.long
def test_logits_with_mxfp4_experts() -> None:
    """Exact experts and float32 for the rest give the golden logits."""
    checkpoint = open_hub(HUB, dense="f32")
    config = dataclasses.replace(checkpoint.config, qat=False)
    model = LanguageModel(build(config, ((tensor.name, tensor.read()) for tensor in checkpoint.tensors)), None)
    golden = arrays("golden")
    length = int(golden["short_len"])
    rows = golden["short_positions"]
    assert_close(model.logits(golden["ids"][:length], strict=True)["logits"][rows], golden["short_logits"])

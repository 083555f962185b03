"""Metadata and tensor table must agree: one change to a valid file at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import SMALL, write_small

from ds4jax.errors import InputError
from ds4jax.loading.gguf_config import metadata, read_config
from ds4jax.loading.gguf_header import Header, Shard, TensorInfo, Value, read_header
from ds4jax.loading.gguf_match import match
from ds4jax.loading.gguf_names import SMALL as SMALL_MATRIX
from ds4jax.loading.gguf_names import VECTOR, slots
from ds4jax.loading.gguf_values import reading
from ds4jax.text.tokenizer import BOS, Tokenizer
from pallas_kernels.formats import FORMATS

Open = Callable[[], Header]


@pytest.fixture
def header(tmp_path: Path) -> Header:
    """A header that the test may change."""
    path = tmp_path / "small.gguf"
    write_small(path, quantize=True)
    return read_header(path)


def values(kind: str, *numbers: Any) -> Value:
    return Value(f"{kind}[]", np.array(numbers, {"i32": np.int32, "u32": np.uint32, "f32": np.float32, "f64": np.float64}[kind]))


ACCEPTED = {
    "original_context": ("rope.scaling.original_context_length", Value("u64", 64), 64),
    "max_context": ("context_length", Value("u64", 2048), 2048),
    "rope_factor": ("rope.scaling.factor", Value("u32", 16), 16.0),
    "beta_fast": ("rope.scaling.yarn_beta_fast", Value("i32", 32), 32.0),
    "beta_slow": ("rope.scaling.yarn_beta_slow", Value("f64", 1.5), 1.5),
    "compress_ratios": ("attention.compress_ratios", values("u32", 0, 4, 128, 0), (0, 4, 128, 0)),
    "swiglu_limit": ("swiglu_clamp_exp", values("f64", 9.5, 9.5, 9.5, 9.5), 9.5),
    "norm_eps": ("attention.layer_norm_rms_epsilon", Value("f32", float(np.float32(1e-6))), 1e-6),
}


@pytest.mark.parametrize("field", ACCEPTED)
def test_accepted_types(field: str, header: Header) -> None:
    key, value, expected = ACCEPTED[field]
    header.metadata["deepseek4." + key] = value
    found = getattr(read_config(header), field)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize("key", [key for key, _, _ in metadata(SMALL) if key.startswith("deepseek4.")])
def test_a_missing_key_is_named(key: str, header: Header) -> None:
    del header.metadata[key]
    optional = ("expert_group_count", "expert_group_used_count", "rope.scaling.type", "nextn_predict_layers", "vocab_size")
    if key.removeprefix("deepseek4.") in optional:
        assert read_config(header) == SMALL
    else:
        with pytest.raises(InputError, match=f"{key}: this metadata key is missing"):
            read_config(header)


def test_without_yarn_keys_the_file_is_an_early_one(header: Header) -> None:
    del header.metadata["deepseek4.rope.scaling.yarn_beta_slow"]
    with pytest.raises(
        InputError, match=r"missing; the file was converted before the fix of 2026-08-06 .*26673.*download it again"
    ):
        read_config(header)


# What llama.cpp's converter writes and this model does not need, besides arithmetic that it has.
NEUTRAL = {
    "rope.scaling.type": Value("str", "yarn"),
    "rope.scaling.attn_factor": Value("f32", 1.0),
    "expert_gating_func": Value("u32", 4),
    "expert_group_count": Value("u32", 1),
    "leading_dense_block_count": Value("u32", 0),
    "logit_scale": Value("f32", 0.0),
    "swiglu_clamp_exp": Value("f32", 10.0),
    "swiglu_clamp_shexp": values("f32", 10, 10, 10),
    "embedding_length_out": Value("u32", 256),
    "something.new": Value("str", "of a later converter"),
}


@pytest.mark.parametrize("key", NEUTRAL)
def test_keys_that_ask_for_nothing_else(key: str, header: Header) -> None:
    header.metadata["deepseek4." + key] = NEUTRAL[key]
    assert read_config(header) == SMALL


REFUSED = [
    ("embedding_length", Value("f32", 64.0), "embedding_length: stored as f32; it must be u32"),
    ("embedding_length", Value("u32", 0), r"embedding_length: is 0"),
    ("hyper_connection.epsilon", Value("u32", 1), "hyper_connection.epsilon: stored as u32"),
    ("hyper_connection.epsilon", Value("f32", float("nan")), "hyper_connection.epsilon: nan is not finite"),
    ("rope.scaling.factor", Value("f32", float("inf")), "rope.scaling.factor: inf is not finite"),
    ("rope.scaling.factor", Value("bool", True), "rope.scaling.factor: stored as bool"),
    ("attention.sliding_window", Value("u32", 8193), "attention.sliding_window: is 8193; at most 8192 is supported"),
    ("context_length", Value("u64", 2**40), "context_length: is 1099511627776; at most 16777216 is supported"),
    ("hyper_connection.sinkhorn_iterations", Value("u32", 2**31), "sinkhorn_iterations: is 2147483648; at most 1024"),
    ("attention.head_count_kv", Value("u32", 2), "attention.head_count_kv: 2 is not supported; it must be 1"),
    ("attention.value_length", Value("u32", 16), "attention.value_length: 16 is not supported; it must be 32"),
    ("expert_shared_count", Value("u32", 2), "expert_shared_count: 2 is not supported"),
    ("expert_weights_norm", Value("bool", False), "expert_weights_norm: False is not supported"),
    ("expert_group_count", Value("u32", 4), "expert_group_count: 4 is not supported"),
    ("expert_gating_func", Value("u32", 2), "expert_gating_func: 2 is not supported; it must be 4"),
    ("expert_gating_func", values("u32", 4), r"expert_gating_func: u32\[\] of 1 is not supported"),
    ("rope.scaling.type", Value("str", "linear"), "rope.scaling.type: linear is not supported; it must be yarn"),
    ("rope.scaling.attn_factor", Value("f32", float("nan")), "rope.scaling.attn_factor: nan is not supported"),
    ("final_logit_softcapping", Value("f32", 30.0), "final_logit_softcapping: 30.0 is not supported"),
    ("leading_dense_block_count", Value("u32", 1), "leading_dense_block_count: 1 is not supported"),
    ("vocab_size", Value("u32", 641), "tokenizer.ggml.tokens: 640 entries, but deepseek4.vocab_size is 641"),
    ("attention.output_group_count", Value("u32", 3), "attention.output_group_count: is 3, more than n_heads"),
    ("attention.compress_ratios", values("i32", 0, 4, 128), "attention.compress_ratios: 3 entries"),
    ("attention.compress_ratios", values("f32", 0, 4, 128, 0), r"attention.compress_ratios: stored as f32\[\]"),
    ("attention.compress_ratios", values("i32", 0, -4, 128, 0), "attention.compress_ratios: holds -4"),
    ("swiglu_clamp_exp", values("f32", 10, 10), "swiglu_clamp_exp: 2 entries"),
    ("swiglu_clamp_exp", values("f32", 10, 9, 10), "swiglu_clamp_exp: it must be one finite value"),
    ("swiglu_clamp_exp", values("f32", *3 * [float("nan")]), "swiglu_clamp_exp: it must be one finite value"),
    ("swiglu_clamp_exp", values("f32", -1, -1, -1), "swiglu_clamp_exp: is -1"),
    ("swiglu_clamp_exp", Value("f32", float("inf")), "swiglu_clamp_exp: it must be one finite value"),
    ("swiglu_clamp_shexp", values("f32", 10, 10), "swiglu_clamp_shexp: 2 entries"),
    ("swiglu_clamp_shexp", values("f32", 7, 7, 7), "swiglu_clamp_shexp: is 7.0, and deepseek4.swiglu_clamp_exp 10.0"),
]


@pytest.mark.parametrize(("key", "value", "message"), REFUSED)
def test_refused_values(key: str, value: Value, message: str, header: Header) -> None:
    header.metadata["deepseek4." + key] = value
    with pytest.raises(InputError, match=message) as error:
        read_config(header)
    assert str(error.value).startswith((f"{header.path}: deepseek4.", f"{header.path}: tokenizer."))


def test_without_a_vocab_size_tokens_and_embedding_say_it(header: Header) -> None:
    del header.metadata["deepseek4.vocab_size"]
    assert read_config(header) == SMALL
    header.metadata["tokenizer.ggml.tokens"].value.pop()
    with pytest.raises(InputError, match=r"tokenizer\.ggml\.tokens: 639 entries, but token_embd\.weight has 640 rows"):
        read_config(header)
    del header.metadata["tokenizer.ggml.tokens"]
    with pytest.raises(InputError, match=r"vocab_size: this metadata key is missing, and so is tokenizer\.ggml\.tokens"):
        read_config(header)


@pytest.mark.parametrize("ratios", [(0, 4, 128), (0, 4, 128, 0), (0, 4, 128, 0, 0, 0)])
def test_any_number_of_ratios_beyond_the_layers(ratios: tuple[int, ...], header: Header) -> None:
    """Without an MTP block: the hub's list has an entry for it, or three for a DSpark drafter's stages."""
    del header.tensors["mtp.0.e_proj.weight"]
    header.metadata["deepseek4.attention.compress_ratios"] = values("i32", *ratios)
    config = read_config(header)
    assert (config.layer_ratios, config.n_mtp) == ((0, 4, 128), 0)


def test_architecture(header: Header) -> None:
    header.metadata["general.architecture"] = Value("str", "llama\n")
    with pytest.raises(InputError, match=r"general\.architecture: .*llama.* is not supported; it must be 'deepseek4'"):
        read_config(header)
    del header.metadata["general.architecture"]
    with pytest.raises(InputError, match=r"general\.architecture: this metadata key is missing"):
        read_config(header)


def test_qat_is_on_unless_the_file_says_otherwise(header: Header) -> None:
    assert read_config(header).qat is False
    del header.metadata["ds4jax.qat"]
    assert read_config(header).qat is True
    header.metadata["ds4jax.qat"] = Value("u32", 1)
    with pytest.raises(InputError, match=r"ds4jax\.qat: stored as u32"):
        read_config(header)


def test_special_ids_fall_back_to_the_literal_tokens(header: Header) -> None:
    for which in ("bos", "eos"):
        del header.metadata[f"tokenizer.ggml.{which}_token_id"]
    config = read_config(header)
    assert (config.bos_id, config.eos_id) == (0, 1)
    header.metadata["tokenizer.ggml.tokens"].value[0] = "other"
    with pytest.raises(InputError, match=rf"bos_token_id: missing, and the vocabulary has no {BOS}"):
        read_config(header)
    header.metadata["tokenizer.ggml.bos_token_id"] = Value("u32", 640)
    with pytest.raises(InputError, match="bos_token_id: it must be an integer below 640"):
        read_config(header)


def test_the_mtp_block_is_seen_by_its_tensors(header: Header) -> None:
    del header.tensors["mtp.0.e_proj.weight"]
    config = read_config(header)
    assert config.n_mtp == 0
    _, ignored = match(header, config)
    assert "mtp.0.h_proj.weight" in ignored


def retyped(header: Header, name: str, kind: str) -> None:
    info = header.tensors[name]
    header.tensors[name] = TensorInfo(name, kind, info.shape, info.offset, info.nbytes)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("blk.1.attn_kv.weight", "I32"),
        ("output.weight", "I8"),
        ("token_embd.weight", "TQ1_0"),
        ("blk.1.attn_norm.weight", "Q8_0"),
        ("blk.1.attn_compressor_ape.weight", "F64"),
        ("blk.1.exp_probs_b.bias", "Q4_K"),
        ("blk.0.ffn_gate_tid2eid.weight", "F32"),
        ("blk.1.ffn_down_exps.weight", "NVFP4"),
        ("mtp.0.e_proj.weight", "I32"),
    ],
)
def test_types_that_a_tensor_never_has(name: str, kind: str, header: Header) -> None:
    retyped(header, name, kind)
    with pytest.raises(InputError, match=rf"{name}: type {kind} is not supported for this tensor"):
        match(header, SMALL)


@pytest.mark.parametrize("kind", [*FORMATS, "F16", "BF16", "F32"])
def test_every_matrix_may_have_every_type(kind: str, header: Header) -> None:
    """Small matrices are held as numbers; those of one launch have one type, float32 where the file's differ."""
    matrices = {slot.name: slot for slot in slots(SMALL) if "F16" in slot.types and slot.kind is not VECTOR}
    for slot in matrices.values():
        retyped(header, slot.gguf_name, kind)
    # Widths do not matter here.
    found, ignored = match(header, SMALL)
    assert ignored == ()
    for one in found:
        if one.slot.name in matrices:
            fits = one.slot.kind is not SMALL_MATRIX and one.has_whole_blocks
            assert one.form == (kind if fits or kind not in FORMATS else "F32"), one.slot.name


def test_mixed_compressor_types_are_held_as_float32(header: Header) -> None:
    before = {one.slot.name: one.form for one in match(header, SMALL)[0]}
    retyped(header, "blk.1.attn_compressor_kv.weight", "BF16")
    after = {one.slot.name: one.form for one in match(header, SMALL)[0]}
    changed = {name for name, form in after.items() if form != before[name]}
    assert changed == {
        "layers.1.attn.compressor.wkv.weight",
        "layers.1.attn.compressor.wgate.weight",
        "layers.1.attn.indexer.wq_b.weight",
        "layers.1.attn.indexer.weights_proj.weight",
        "layers.1.attn.indexer.compressor.wkv.weight",
        "layers.1.attn.indexer.compressor.wgate.weight",
    }
    assert {after[name] for name in changed} == {"F32"}


def test_gate_and_up_may_have_unlike_types(header: Header) -> None:
    retyped(header, "blk.1.ffn_up_exps.weight", "MXFP4")
    forms = {one.slot.name: one.form for one in match(header, SMALL)[0]}
    assert [forms[f"layers.1.ffn.experts.{name}.weight"] for name in ("w1", "w3", "w2")] == ["Q8_0", "MXFP4", "Q8_0"]


def test_values_are_checked_when_read(header: Header) -> None:
    copy = Header(header.path, header.metadata, header.tensors, (Shard(header.path, header.shards[0].data.copy()),))

    def broken(name: str, index: int, value: np.generic) -> None:
        raw = copy.raw(copy.tensors[name])
        raw[index : index + value.nbytes] = np.frombuffer(value.tobytes(), np.uint8)
        with pytest.raises(InputError) as error:
            reading(copy, copy.tensors[name], SMALL.n_experts).value()
        messages.append(str(error.value).removeprefix(f"{header.path}: "))

    messages: list[str] = []
    broken("blk.1.attn_kv.weight", 34 * 5, np.float16("-inf"))
    broken("blk.1.attn_norm.weight", 4 * 3, np.float32("nan"))
    broken("token_embd.weight", 2 * (64 * 7 + 2), np.float16("nan"))
    broken("blk.0.ffn_gate_tid2eid.weight", 4 * 9, np.int32(4))
    broken("blk.0.ffn_gate_tid2eid.weight", 4 * 9, np.int32(-1))
    assert messages == [
        "blk.1.attn_kv.weight: the scale of block 5 is not finite",
        "blk.1.attn_norm.weight: value [3] is not finite",
        "token_embd.weight: value [7, 2] is not finite",
        "blk.0.ffn_gate_tid2eid.weight: names expert 4; the model has 4",
        "blk.0.ffn_gate_tid2eid.weight: names expert -1; the model has 4",
    ]


TOKENIZER = [
    ("tokenizer.ggml.model", "llama", "tokenizer.ggml.model: 'llama' is not supported; it must be 'gpt2'"),
    ("tokenizer.ggml.pre", np.zeros((3), np.int32), "tokenizer.ggml.pre: .* is not supported; it must be 'joyai-llm'"),
    ("tokenizer.ggml.tokens", np.zeros((640), np.int32), "tokenizer.ggml.tokens: it must be an array of strings"),
    ("tokenizer.ggml.tokens", [str(i) for i in range(639)], "tokenizer.ggml.tokens: 639 entries for a vocab_size of 640"),
    ("tokenizer.ggml.tokens", [str(i) for i in range(640)], "tokenizer.ggml.tokens: 246 of the 256 bytes have no token"),
    ("tokenizer.ggml.tokens", ["a"] * 640, "tokenizer.ggml.tokens: an entry is empty or appears twice"),
    ("tokenizer.ggml.merges", ["t h", "nothing"], r"tokenizer.ggml.merges\[1\]: 'nothing' does not join"),
    ("tokenizer.ggml.merges", ["t \n"], r"tokenizer.ggml.merges\[0\]: 't \\n' does not join"),
    ("tokenizer.ggml.merges", None, "tokenizer.ggml.merges: missing"),
    ("tokenizer.ggml.token_type", np.zeros((3), np.int32), "tokenizer.ggml.token_type: it must hold one integer for each"),
    ("tokenizer.ggml.token_type", ["a"] * 640, "tokenizer.ggml.token_type: it must hold one integer for each"),
]


@pytest.mark.parametrize(("key", "value", "message"), TOKENIZER)
def test_refused_tokenizers(key: str, value: Any, message: str, header: Header) -> None:
    plain = {name: value.value for name, value in header.metadata.items()} | {key: value}
    with pytest.raises(InputError, match=message) as error:
        Tokenizer.from_gguf(plain, header.path)
    assert "\n" not in str(error.value)

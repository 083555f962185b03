"""The gate: which calls run by kernels, and the reason of each refusal."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from ds4jax.cache import state as caches
from ds4jax.cache.state import Rows
from ds4jax.config import Config
from ds4jax.model import paths
from ds4jax.model.decode_kernels import weights_of
from ds4jax.model.parameters import build
from ds4jax.model.transformer import Transformer
from ds4jax.random_models import checkpoint as synthetic
from ds4jax.random_models import layouts
from pallas_kernels.core.dispatch import OPT_OUT
from pallas_kernels.core.limits import MAX_ROWS, STEP_ROWS
from pallas_kernels.formats import IQ2_XXS, MXFP4, Q2_K, Q4_K, Q6_K, Q8_0, Quantized
from pallas_kernels.formats.iq3_s import IQ3_S

# One layer of each kind.
KINDS = dataclasses.replace(layouts.SMALL_Q2, n_layers=3, n_hash_layers=1, compress_ratios=(0, 4, 128, 0))


@functools.cache
def abstract(config: Config = KINDS) -> Transformer:
    """The model with shapes and types for values."""
    tensors = synthetic.checkpoint(config, "small-q2").tensors
    return build(config, ((tensor.name, jax.eval_shape(tensor.read)) for tensor in tensors))


def chunk(count: int, sequences: int = 1, **fields: Any) -> Rows:
    """Rows with shapes and types for values: cases are made wherever tests are collected."""
    rows = jax.eval_shape(lambda: Rows.following(jnp.zeros(sequences, jnp.int32), count, count, slot=sequences - 1))
    return dataclasses.replace(rows, **fields)


def step(sequences: int, width: int) -> Rows:
    return jax.eval_shape(lambda: Rows.step(jnp.zeros(sequences, jnp.int32), width, jnp.ones(sequences, jnp.int32)))


@pytest.mark.parametrize(
    ("rows", "slack", "ring", "reason"),
    [
        (chunk(3), 3, True, None),
        (chunk(MAX_ROWS), MAX_ROWS, True, None),
        (chunk(MAX_ROWS + 1), MAX_ROWS + 1, True, "a chunk of a prompt"),
        (chunk(3, strict=True), 3, True, "strict"),
        (chunk(3), 2, True, "the rings have no room for the rows"),
        (chunk(3), 3, False, "the rings have no room for the rows"),
        (step(4, 2), 2, True, None),
        (step(4, 2), 1, True, "the rings have no room for the rows"),
        (step(3, 3), 3, True, None),
        (step(1, MAX_ROWS + 1), MAX_ROWS + 1, True, None),
        (step(STEP_ROWS, 1), 1, True, None),
        (step(STEP_ROWS // 2 + 1, 2), 2, True, "more than 64 rows"),
    ],
)
def test_decode_step(rows: Rows, slack: int, ring: bool, reason: str | None) -> None:
    held = caches.empty(KINDS, 64, sequences=rows.start.shape[0], slack=slack, ring=ring).layers
    blocks = map(weights_of, [*abstract().layers, *abstract().mtp])
    assert paths.why_not_step(KINDS, blocks, rows, held) == reason


def number(*shape: int, dtype: Any = jnp.float16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def stored(format: type[Quantized], *shape: int) -> Any:
    *lead, k = shape
    return jax.eval_shape(format.split, jax.ShapeDtypeStruct((*lead, k // format.BLOCK, format.BLOCK_BYTES), jnp.uint8))


EXPERTS, STORED, PLAIN = number(8, 256, 256), stored(Q8_0, 256, 256), stored(IQ3_S, 256, 256)
REASONS = {
    "any format": ({}, {"attn.wq_a": stored(Q4_K, 64, 256), "ffn.shared_experts.w1": stored(MXFP4, 256, 256)}, None),
    "no kernel": ({}, {"attn.wq_a": PLAIN}, "attn.wq_a is IQ3_S, which has no kernel"),
    "gate and up": (
        {},
        {"ffn.experts.w3": stored(Q4_K, 8, 256, 256)},
        "gate and up experts are of two types, IQ2_XXS and Q4_K",
    ),
    "width": ({"dim": 768}, {}, "dim is 768, not a power of two"),
    "streams": ({"hc_mult": 2}, {}, "hc_mult is 2, not 4"),
    "narrow": ({"dim": 128}, {}, "dim is 128, not a multiple of 256"),
    "dense": ({}, {"attn.wq_b": number(512, 64)}, "attn.wq_b is float16, which has no kernel"),
    "shared": ({}, {"ffn.shared_experts.w2": number(256, 256)}, "ffn.shared_experts.w2 is float16, which has no kernel"),
    "experts": ({}, {"ffn.experts.w2": EXPERTS}, "ffn.experts.w2 is float16, which has no kernel"),
    "compressor": ({}, {"attn.compressor.wkv": STORED}, "a compressor, indexer or router weight is quantised"),
    "two types": (
        {},
        {"attn.compressor.wkv": number(256, 256, dtype=jnp.float32)},
        "compressor and indexer weights are of two float types",
    ),
    "router": ({}, {"ffn.gate": STORED}, "a compressor, indexer or router weight is quantised"),
}


@pytest.mark.parametrize("name", REASONS)
def test_block(name: str) -> None:
    fields, weights, reason = REASONS[name]
    own = weights_of(abstract().layers[1])
    assert paths.why_not_block(KINDS, own) is None
    assert set(weights) <= set(own)
    assert paths.why_not_block(dataclasses.replace(KINDS, **fields), {**own, **weights}) == reason


def test_one_block_decides_for_all_blocks_of_a_call() -> None:
    own, rows, held = weights_of(abstract().layers[1]), chunk(1), caches.empty(KINDS, 64).layers
    assert paths.why_not_step(KINDS, [own, own], rows, held) is None
    reason = "ffn.experts.w1 is float16, which has no kernel"
    assert paths.why_not_step(KINDS, [own, {**own, "ffn.experts.w1": EXPERTS}], rows, held) == reason


@pytest.mark.parametrize(
    ("fields", "head", "rows", "strict", "reason"),
    [
        ({}, STORED, 64, False, None),
        ({}, stored(Q4_K, 256, 256), 8, False, None),
        ({}, PLAIN, 1, False, "head is IQ3_S, which has no kernel"),
        ({}, STORED, 65, False, "more than 64 rows"),
        ({}, STORED, 1, True, "strict"),
        ({}, number(256, 256), 1, False, "head is float16, which has no kernel"),
        ({"hc_mult": 2}, STORED, 1, False, "hc_mult is 2, not 4"),
        ({"dim": 768}, STORED, 1, False, "dim is 768, not a power of two"),
    ],
)
def test_head(fields: dict, head: Any, rows: int, strict: bool, reason: str | None) -> None:
    assert paths.why_not_head(dataclasses.replace(KINDS, **fields), head, rows, strict=strict) == reason


@pytest.mark.parametrize(
    ("rows", "dtype", "fields", "reason"),
    [
        (chunk(9), jnp.bfloat16, {}, None),
        (chunk(9), jnp.float32, {}, "float32 weights"),
        (chunk(8), jnp.bfloat16, {}, "a decode step"),
        (step(1, 9), jnp.bfloat16, {}, "a decode step"),
        (chunk(9, strict=True), jnp.bfloat16, {}, "strict"),
        (chunk(9, sequences=2), jnp.bfloat16, {}, None),
        (step(3, 3), jnp.bfloat16, {}, "a decode step"),
        (dataclasses.replace(step(3, 3), decoding=False), jnp.bfloat16, {}, "rows of several sequences"),
        (chunk(9), jnp.bfloat16, {"head_dim": 72}, "head_dim is 72, not a multiple of 16"),
        (chunk(9), jnp.bfloat16, {"index_heads": 6}, "index_heads is 6, not a power of two"),
    ],
)
def test_prefill_attention(rows: Rows, dtype: Any, fields: dict, reason: str | None) -> None:
    config, weight = dataclasses.replace(KINDS, **fields), number(64, 64, dtype=dtype)
    assert paths.why_not_prefill_attention(config, rows, weight) == reason


@pytest.mark.parametrize(
    ("rows", "dtype", "fields", "reason"),
    [
        (chunk(9), jnp.bfloat16, {}, None),
        (chunk(9, sequences=2), jnp.bfloat16, {}, None),
        (chunk(9), jnp.float32, {}, "float32 weights"),
        (chunk(9, strict=True), jnp.bfloat16, {}, "strict"),
        (step(3, 3), jnp.bfloat16, {}, "a decode step"),
        (chunk(9), jnp.bfloat16, {"hc_mult": 2}, "hc_mult is 2, not 4"),
    ],
)
def test_prefill_streams(rows: Rows, dtype: Any, fields: dict, reason: str | None) -> None:
    config, weight = dataclasses.replace(KINDS, **fields), number(64, 64, dtype=dtype)
    assert paths.why_not_prefill_streams(config, rows, weight) == reason


@pytest.mark.parametrize(
    ("decoding", "strict", "stack", "fields", "reason"),
    [
        (False, False, STORED, {}, None),
        (False, True, STORED, {}, "strict"),
        (True, False, STORED, {}, "a decode step"),
        (False, False, PLAIN, {}, "ffn.experts.w1 is IQ3_S, which has no kernel"),
        (False, False, EXPERTS, {}, "ffn.experts.w1 is float16, which has no kernel"),
        (False, False, STORED, {"moe_dim": 96}, "a width of 96 does not divide into tiles"),
    ],
)
def test_grouped_experts(decoding: bool, strict: bool, stack: Any, fields: dict, reason: str | None) -> None:
    config = dataclasses.replace(KINDS, **fields)
    assert paths.why_not_grouped_experts(config, [stack] * 3, decoding=decoding, strict=strict) == reason


@pytest.mark.parametrize(
    ("device", "formats", "fields", "reason"),
    [
        ("NVIDIA H200", (IQ2_XXS, IQ2_XXS, Q2_K), {}, None),
        ("NVIDIA GH200 480GB", (Q2_K, Q2_K, Q2_K), {}, None),
        ("NVIDIA A100-SXM4-80GB", (IQ2_XXS, IQ2_XXS, Q2_K), {}, "NVIDIA A100-SXM4-80GB is not a Hopper GPU"),
        ("NVIDIA GB200", (IQ2_XXS, IQ2_XXS, Q2_K), {}, "NVIDIA GB200 is not a Hopper GPU"),
        ("cpu", (IQ2_XXS, IQ2_XXS, Q2_K), {}, "cpu is not a Hopper GPU"),
        ("NVIDIA H200", (IQ2_XXS, IQ2_XXS, Q8_0), {}, "ffn.experts.w2 is Q8_0, which the products do not decode"),
        ("NVIDIA H200", (Q4_K, Q4_K, Q6_K), {}, "ffn.experts.w2 is Q6_K, which the products do not decode"),
        ("NVIDIA H200", (IQ2_XXS, Q2_K, Q2_K), {}, "gate and up experts are of two types, IQ2_XXS and Q2_K"),
        ("NVIDIA H200", (IQ2_XXS, IQ2_XXS, Q2_K), {"moe_dim": 384}, "moe_dim is 384, not a multiple of 256"),
    ],
)
def test_stored_experts(device: str, formats: tuple, fields: dict, reason: str | None) -> None:
    config, stacks = dataclasses.replace(KINDS, **fields), [stored(format, 4, 256, 256) for format in formats]
    assert paths.why_not_stored_experts(config, stacks, device) == reason


def test_the_opt_out_is_the_reason_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OPT_OUT, "1")
    assert {
        paths.why_not_block(KINDS, weights_of(abstract().layers[0])),
        paths.why_not_step(KINDS, [weights_of(abstract().layers[0])], chunk(1), caches.empty(KINDS, 64).layers),
        paths.why_not_head(KINDS, STORED, 1, strict=False),
        paths.why_not_sampling(strict=False),
        paths.why_not_prefill_attention(KINDS, chunk(9), number(64, 64)),
        paths.why_not_grouped_experts(KINDS, [STORED] * 3, decoding=False, strict=False),
    } == {f"{OPT_OUT}=1"}

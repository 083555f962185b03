"""A model whose matrices are of many formats, as files for one card have them: decode kernels, strict mode, MTP block."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import executed_calls, lowered_for_cuda
from flax import nnx
from model.test_decode_kernels import assert_same
from quantized import as_float, random_blocks

from ds4jax.bench.programs import randomised
from ds4jax.cache import state as caches
from ds4jax.cache.state import Rows
from ds4jax.model import decode_kernels, paths
from ds4jax.model.parameters import Value, build
from ds4jax.model.transformer import Transformer
from ds4jax.random_models import checkpoint as synthetic
from ds4jax.random_models.layouts import SMALL_Q2
from pallas_kernels.experts import swiglu
from pallas_kernels.formats import FORMATS, MXFP4, Quantized
from pallas_kernels.linear import activation_k, lane_matmul, q8_matmul

# A layer and an MTP block without compressed rows. Widths hold blocks of 256 everywhere.
CONFIG = dataclasses.replace(SMALL_Q2, n_layers=1, n_hash_layers=0, compress_ratios=(0, 0), q_lora_rank=256, o_lora_rank=128)
# Other matrices are as in the q2 file.
TYPES = {
    "layers.0.attn.wq_a": "Q5_K",
    "layers.0.attn.wq_b": "Q2_K",
    "layers.0.attn.wo_a": "IQ2_XXS",
    "layers.0.attn.wo_b": "MXFP4",
    "layers.0.ffn.shared_experts.w1": "Q5_K",
    "layers.0.ffn.shared_experts.w3": "Q4_K",
    "layers.0.ffn.shared_experts.w2": "Q6_K",
    "layers.0.ffn.experts.w1": "MXFP4",
    "layers.0.ffn.experts.w3": "MXFP4",
    "layers.0.ffn.experts.w2": "Q4_K",
    "embed": "Q4_K",
    "head": "Q4_K",
}
# Also formats without a kernel, and gate and up of unlike types.
EVERYWHERE = TYPES | {
    "layers.0.attn.wkv": "IQ3_S",
    "layers.0.ffn.experts.w3": "Q4_K",
    "head": "Q6_K",
    "embed": "Q5_1",
    "mtp.0.e_proj": "Q4_K",
    "mtp.0.h_proj": "IQ4_NL",
}
ROWS = 3


@functools.cache
def unit(format: type[Quantized]) -> float:
    """Standard deviation of weights whose scales have that of 1."""
    return float(np.std(as_float(format.from_bytes(random_blocks(format, (64, 256), least=0, most=1)))))


def stored(format: type[Quantized], shape: tuple[int, ...], seed: int) -> Quantized:
    """Random blocks with a standard deviation of about K^-0.5."""
    raw = random_blocks(format, shape, seed, least=0, most=1).reshape(-1, format.BLOCK_BYTES)
    for place in format.FLOAT16:
        scales = raw[:, place : place + 2].copy().view(np.float16).astype(np.float32) * (shape[-1] ** -0.5 / unit(format))
        raw[:, place : place + 2] = scales.astype(np.float16).view(np.uint8)
    if format is MXFP4:
        # Twice a code is about 6, and K^-0.5 is 1/16.
        raw[:, 0] = 121
    return format.from_bytes(raw.reshape(*shape[:-1], -1))


def values(types: dict[str, str]) -> dict[str, Value]:
    """Parameters of the small q2 model, some of them in other formats."""
    found = {}
    for seed, tensor in enumerate(synthetic.checkpoint(CONFIG, "small-q2").tensors):
        name = types.get(tensor.name.removesuffix(".weight"))
        found[tensor.name] = stored(FORMATS[name], tensor.shape, seed) if name else tensor.read()
    assert set(types) <= {name.removesuffix(".weight") for name in found}
    return found


@functools.cache
def model() -> Transformer:
    return build(CONFIG, values(TYPES).items())


def step() -> tuple[Rows, jax.Array, Any]:
    rows = Rows.following(jnp.int32(31), 1, 1)
    held = randomised(caches.empty(CONFIG, 64, slack=1).layers, "mixed")
    h_TND = synthetic.spread_numbers((1, CONFIG.hc_mult, CONFIG.dim), jnp.dtype("float32"), 1.0, jnp.uint32(5))
    return rows, h_TND, held


@pytest.mark.slow
def test_the_decode_kernels_equal_the_modules() -> None:
    [block], (rows, h_TND, held), ids = list(model().layers), step(), jnp.array([3], jnp.int32)
    assert paths.why_not_step(CONFIG, [decode_kernels.weights_of(block)], rows, held) is None

    @jax.jit
    def modules(h_TND: jax.Array, held: Any) -> Any:
        h_TND, cache = block(h_TND, ids, rows, held[0])
        return h_TND, (cache,)

    with jax.default_matmul_precision("highest"):
        streams, made, _ = decode_kernels.layers(CONFIG, [block], h_TND, ids, rows, held, interpret=True)
        assert_same(streams, made, *modules(h_TND, held))


@pytest.mark.long
def test_the_head_s_kernels_equal_the_module() -> None:
    whole, (_, h_TND, _) = model(), step()
    head = whole.head.weight.get_value()
    assert paths.why_not_head(CONFIG, head, 1, strict=False) is None
    parameters = {name: getattr(whole, f"hc_head_{name}").get_value() for name in ("fn", "scale", "base")}
    with jax.default_matmul_precision("highest"):
        made = decode_kernels.logits(CONFIG, head, whole.norm.weight.get_value(), **parameters, h_TND=h_TND, interpret=True)
        expected = jax.jit(whole.logits)(h_TND)
    np.testing.assert_allclose(made, expected, rtol=0, atol=3e-6 * float(jnp.abs(expected).max()))


@pytest.mark.long
def test_strict_is_the_model_of_the_dequantised_weights() -> None:
    """Streams and logits, the model's and the MTP block's; formats without a kernel too, and gate and up of unlike types."""
    found = values(EVERYWHERE)
    dequantised = {name: as_float(value) if isinstance(value, Quantized) else value for name, value in found.items()}
    ids = (jnp.arange(ROWS, dtype=jnp.int32) * 97) % CONFIG.vocab_size

    @functools.partial(jax.jit, static_argnums=0)
    def run(graph: nnx.GraphDef, weights: nnx.State) -> tuple[jax.Array, ...]:
        whole, cache = nnx.merge(graph, weights), caches.empty(CONFIG, 64)
        rows = dataclasses.replace(Rows.following(jnp.int32(0), ROWS, ROWS), strict=True)
        h_TND, _ = whole.streams(ids, rows, cache)
        drafted_TND, _ = whole.mtp_streams(h_TND, ids, rows, caches.empty_mtp(CONFIG, 64))
        return h_TND, whole.logits(h_TND, strict=True), whole.mtp_logits(drafted_TND, strict=True)

    outputs = [run(*nnx.split(build(CONFIG, one.items()))) for one in (found, dequantised)]
    for made, expected in zip(*outputs, strict=True):
        np.testing.assert_allclose(made, expected, rtol=0, atol=3e-5 * float(jnp.abs(expected).max()))
    [block] = nnx.merge(*nnx.split(build(CONFIG, found.items()))).layers
    assert paths.why_not_block(CONFIG, decode_kernels.weights_of(block)) == "attn.wkv is IQ3_S, which has no kernel"


def test_a_step_lowers_for_cuda() -> None:
    """Products of unlike formats share a launch; only values that come from other launches are quantised in one of their own."""
    graph, weights = nnx.split(model())
    rows, h_TND, held = step()

    def layers(weights: nnx.State, h_TND: jax.Array, held: Any) -> Any:
        blocks = list(nnx.merge(graph, weights).layers)
        return decode_kernels.layers(CONFIG, blocks, h_TND, jnp.zeros(1, jnp.int32), rows, held)

    text = lowered_for_cuda(jax.jit(layers), weights, h_TND, held)
    # q_a, q_b, o_a, o_b, shared gate, up and down; kv alone is Q8_0. The queries of q_b and the rows of o_a are in blocks of 256.
    expected = {lane_matmul.NAME: 7, q8_matmul.NAME: 1, activation_k.NAME: 2, "q8_activation": 1, swiglu.NAME: 1}
    assert {name: executed_calls(text, name) for name in expected} == expected

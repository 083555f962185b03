"""Every component array of golden set a, within the tolerance of its README."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numerics import arrays, assert_bits_equal, assert_component, component, golden_config, golden_model, golden_transformer

from ds4jax.cache import state as caches
from ds4jax.cache.capacity import capacity_for, chunks, padded
from ds4jax.cache.state import Rows
from ds4jax.config import Config
from ds4jax.decode.scoring import extend
from ds4jax.model.rope import inverse_frequencies, rotate
from ds4jax.model.tape import into
from pallas_kernels.attention.meaning import attend
from pallas_kernels.core import rounding
from pallas_kernels.experts.meaning import swiglu
from pallas_kernels.hyper_connections import meaning as hc


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def jitted(module: nnx.Module) -> Callable:
    """A module's call as one compiled function, which compiles faster than op by op."""
    graph, weights = nnx.split(module)
    call = jax.jit(lambda weights, *args: nnx.merge(graph, weights)(*args))
    return functools.partial(call, weights)


@functools.cache
def run_attention(prefix: str, qat: bool = False) -> tuple[jax.Array, caches.LayerCache, dict[str, jax.Array]]:
    """Attention of one layer for a golden input from position 0, with its intermediates."""
    golden = component(prefix)
    layer, length = int(golden["layer"]), len(golden["x"])
    graph, weights = nnx.split(golden_transformer(qat).layers[layer].attn)

    @jax.jit
    def attention(weights: nnx.State, x_TD: jax.Array) -> tuple[jax.Array, caches.LayerCache, dict[str, jax.Array]]:
        tape: dict[str, jax.Array] = {}
        rows = Rows.following(jnp.int32(0), length, length)
        cache = caches.empty(golden_config(qat), length).layers[layer]
        return *nnx.merge(graph, weights)(x_TD, rows, cache, into(tape)), tape

    return attention(weights, jnp.asarray(golden["x"]))


@pytest.mark.parametrize("ratio", [0, 4, 16])
def test_attention(ratio):
    golden = component(f"attn_r{ratio}")
    y_TD, _, _ = run_attention(f"attn_r{ratio}")
    assert_component(y_TD[golden["positions"]], golden["y"])


@pytest.mark.parametrize("ratio", [4, 16])
def test_compressor(ratio):
    golden = component(f"comp_r{ratio}")
    count = len(golden["out"])
    _, cache, tape = run_attention(f"attn_r{ratio}")
    assert_component(tape["compressor.pooled"][:count], golden["pooled"])
    assert_component(tape["compressor.normed"][:count], golden["normed"])
    assert_component(cache.compressor.rows[0, :count], golden["out"])
    _, cache, _ = run_attention(f"attn_r{ratio}", qat=True)
    assert_component(cache.compressor.rows[0, :count], golden["out_qat"])


def test_indexer():
    golden = component("indexer")
    blocks = golden["compressed_k"].shape[0]
    _, cache, tape = run_attention("attn_r4")
    assert_component(tape["q_low"], golden["qr"])
    assert_component(rounding.hadamard(cache.indexer.rows[0, :blocks]), golden["compressed_k"])
    assert_component(tape["indexer.score"][:, :blocks], golden["score"])
    np.testing.assert_array_equal(selected(tape), golden["topk_sorted"])


def test_indexer_with_rounding():
    golden = component("indexer")
    blocks = golden["compressed_k"].shape[0]
    _, cache, tape = run_attention("attn_r4", qat=True)
    assert_component(cache.indexer.rows[0, :blocks], golden["compressed_k_qat"])
    assert_component(tape["indexer.score"][:, :blocks], golden["score_qat"])
    rows = np.setdiff1d(np.arange(len(golden["topk_sorted_qat"])), golden["tie_rows_qat"])
    np.testing.assert_array_equal(selected(tape)[rows], golden["topk_sorted_qat"][rows])


def selected(tape: dict[str, jax.Array]) -> np.ndarray:
    """Chosen blocks as the golden set writes them: ascending, -1 for none."""
    return np.sort(np.asarray(tape["indexer.selected"]), axis=1)


@functools.cache
def prefilled(length: int) -> caches.Cache:
    """The cache after a prefill of golden ids, by a program of `LanguageModel.logits`."""
    model = golden_model()
    capacity = capacity_for(length, model.config.max_context)
    cache, mtp = caches.empty(model.config, capacity), caches.empty_mtp(model.config, capacity)
    [(start, width, count)] = chunks(length, length)
    ids = padded(arrays("golden")["ids"][:length], start, width)
    asked = (model.graph, model.arrays, cache, mtp, ids, ids, jnp.int32(count), jnp.int32(count))
    return extend(*asked, strict=False, want_logits=True)[0]


@pytest.mark.parametrize("ratio", [4, 16])
def test_state_after_prefill(ratio):
    golden = component(f"state_r{ratio}")
    length, layer = int(golden["prompt_len"]), int(golden["layer"])
    state = prefilled(length).layers[layer]
    window = ring_in_order(state.window, length, len(golden["window_kv"]))
    assert_component(window, np.roll(golden["window_kv"], -(length % len(golden["window_kv"])), axis=0))
    count = len(golden["compressed_kv"])
    assert_component(state.compressor.rows[0, :count], golden["compressed_kv"])
    check_pending(state.compressor, golden, "", length, ratio)
    if ratio == 4:
        assert_component(state.indexer.rows[0, :count], unrotated_keys(golden["indexer_compressed_kv"]))
        check_pending(state.indexer, golden, "indexer_", length, ratio)


def unrotated_keys(keys: np.ndarray) -> np.ndarray:
    """Golden keys have a Hadamard transform, its own inverse; this model omits it where nothing is rounded."""
    return np.asarray(rounding.hadamard(jnp.asarray(keys)))


def ring_in_order(ring: jax.Array, length: int, count: int) -> np.ndarray:
    """The last `count` rows of a ring, oldest first."""
    return np.asarray(ring)[0, np.arange(length - count, length) % ring.shape[1]]


def check_pending(state: caches.CompressorCache, golden: dict[str, np.ndarray], prefix: str, length: int, ratio: int) -> None:
    """The reference stores the unfinished block's inputs (ratio 4: after the previous block's); the ring has the same rows."""
    kv, score = golden[f"{prefix}pending_kv"], golden[f"{prefix}pending_score"]
    first, offset = length - length % ratio, 4 if ratio == 4 else 0
    for position in range(first, length):
        slot = position % state.values.shape[1]
        assert_component(state.values[0, slot], kv[offset + position - first])
        assert_component(state.gates[0, slot], score[offset + position - first])
    for position in range(first - 4, first) if ratio == 4 else ():
        slot, half = position % state.values.shape[1], kv.shape[1] // 2
        assert_component(state.values[0, slot, :half], kv[position - first + 4, :half])
        assert_component(state.gates[0, slot, :half], score[position - first + 4, :half])


@pytest.mark.parametrize("kind", ["hash", "score"])
def test_routing_and_experts(kind):
    golden = component(f"gate_{kind}")
    x_TD, ids_T = jnp.asarray(golden["x"]), jnp.asarray(golden["ids"])
    moe = jitted(golden_transformer().layers[int(golden["layer"])].ffn)
    chosen, weights = jitted(golden_transformer().layers[int(golden["layer"])].ffn.gate)(x_TD, ids_T)
    order, expected = np.argsort(chosen, axis=1), np.argsort(golden["indices"], axis=1)
    np.testing.assert_array_equal(np.sort(chosen, axis=1), np.sort(golden["indices"], axis=1))
    assert_component(np.take_along_axis(np.asarray(weights), order, 1), np.take_along_axis(golden["weights"], expected, 1))
    y = component(f"moe_{kind}")["y"]
    assert_component(moe(x_TD, ids_T), y)
    assert_component(jnp.concatenate([moe(x_TD[i : i + 4], ids_T[i : i + 4]) for i in range(0, len(y), 4)]), y)


def test_one_expert():
    golden = component("expert")
    experts, e = golden_transformer().layers[int(golden["layer"])].ffn.experts, int(golden["index"])
    x = jnp.asarray(golden["x"])
    gate = x @ experts.w1.weight.get_value()[e].T
    up = x @ experts.w3.weight.get_value()[e].T
    assert_component(gate, golden["gate_pre"])
    assert_component(up, golden["up_pre"])
    assert_component(swiglu(gate, up, experts.config.swiglu_limit) @ experts.w2.weight.get_value()[e].T, golden["y"])
    chosen = jnp.full((len(x), 1), e, jnp.int32)
    weighted = jitted(experts)(x, chosen, jnp.asarray(golden["route_weight"])[:, None])
    assert_component(weighted, golden["y_weighted"])


def test_gate_is_clamped_from_above_only():
    gate, up = jnp.float32([-30.0, 30.0, 1.0, 1.0]), jnp.float32([1.0, 1.0, 30.0, -30.0])
    silu = lambda z: z / (1 + np.exp(-z))  # noqa: E731
    expected = np.float32([silu(-30.0), silu(10.0), 10 * silu(1.0), -10 * silu(1.0)])
    np.testing.assert_allclose(swiglu(gate, up, 10.0), expected, rtol=1e-5)


def test_hyper_connections():
    golden, model = component("hc"), golden_transformer()
    config, block, h = model.config, model.layers[int(golden["layer"])], jnp.asarray(golden["x"])
    mixes = hc.mixes(h, block.hc_attn_fn.get_value(), config.norm_eps)
    assert_component(mixes, golden["mixes"])
    rounds = {"n": config.hc_mult, "iterations": config.hc_iters, "eps": config.hc_eps}
    pre, post, comb = hc.split(mixes, block.hc_attn_scale.get_value(), block.hc_attn_base.get_value(), **rounds)
    assert_component(pre, golden["pre"])
    assert_component(post, golden["post"])
    assert_component(comb, golden["comb"])
    assert_component(hc.collapse(h, pre), golden["collapsed"])
    assert_component(hc.write_back(jnp.asarray(golden["sub"]), h, post, comb), golden["out"])
    head = [p.get_value() for p in (model.hc_head_fn, model.hc_head_scale, model.hc_head_base)]
    assert_component(hc.head(h, *head, eps=config.hc_eps, norm_eps=config.norm_eps), golden["head_out"])


def test_sparse_attention():
    golden = component("sparse_attn")
    index, rows = golden["idx"], jnp.asarray(golden["kv"])
    segment = (rows[np.maximum(index, 0)], jnp.asarray(index >= 0))
    out, _ = attend(jnp.asarray(golden["q"]), [segment], jnp.asarray(golden["sink"]), float(golden["scale"]))
    assert_component(out, golden["out"])


def test_attention_is_the_same_for_gathered_and_masked_rows():
    golden = component("sparse_attn")
    index, rows = golden["idx"], jnp.asarray(golden["kv"])
    chosen = np.zeros((len(index), len(rows)), bool)
    for query, row in zip(*np.nonzero(index >= 0), strict=True):
        chosen[query, index[query, row]] = True
    out, _ = attend(jnp.asarray(golden["q"]), [(rows, jnp.asarray(chosen))], jnp.asarray(golden["sink"]), float(golden["scale"]))
    assert_component(out, golden["out"])


@pytest.mark.parametrize("kind", ["main", "compress"])
def test_rotary_positions(kind):
    golden, config = component("rope"), golden_config()
    frequencies = inverse_frequencies(config, compressed=kind == "compress")
    assert_bits_equal(frequencies, golden[f"{kind}_inv_freq"])
    position, x = jnp.asarray(golden["positions"]), jnp.asarray(golden[f"{kind}_x"])
    assert_component(rotate(x, position, frequencies), golden[f"{kind}_fwd"])
    assert_component(rotate(x, position, frequencies, inverse=True), golden[f"{kind}_inv"])
    unit = jnp.zeros((len(position), 2 * len(frequencies)), jnp.float32).at[:, 0::2].set(1.0)
    rotated = rotate(unit, position, frequencies)
    assert_component(rotated[:, 0::2], golden[f"{kind}_cos"])
    assert_component(rotated[:, 1::2], golden[f"{kind}_sin"])


@pytest.mark.parametrize("kind", ["main", "compress"])
def test_frequencies_of_v4_flash(kind):
    golden = component("rope")[f"v4flash_{kind}_inv_freq"]
    assert_bits_equal(inverse_frequencies(Config(), compressed=kind == "compress"), golden)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("fp8_block64", functools.partial(rounding.fp8_rows, block=64)),
        ("fp8_block128", functools.partial(rounding.fp8_rows, block=128)),
        ("fp4_block32", rounding.fp4_rows),
    ],
)
def test_simulated_rounding(name, function):
    golden = component("quant")
    np.testing.assert_array_equal(jax.jit(function)(jnp.asarray(golden["x"])), golden[name])


def test_hadamard():
    golden = component("quant")
    assert_component(rounding.hadamard(jnp.asarray(golden["x"])), golden["hadamard128"])

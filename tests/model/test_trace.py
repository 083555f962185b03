"""Contents of a trace: golden numbers, probabilities that sum to one, and the model's own logits."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from numerics import arrays, assert_close, assert_component, component, golden_model, short_model

from ds4jax import InputError
from ds4jax.evaluation.trace import LAYER, MODEL, Trace, explain
from pallas_kernels.core import rounding
from pallas_kernels.hyper_connections import meaning as hc

# Every trace is a program of its own.
pytestmark = pytest.mark.long

# The layer of the short model with an indexer.
RATIO_4 = 1


@functools.cache
def traced(length: int) -> Trace:
    return golden_model().trace(arrays("golden")["ids"][:length])


@functools.cache
def of_short(length: int) -> Trace:
    """For what holds of any model."""
    return short_model().trace(arrays("golden")["ids"][:length])


@pytest.mark.slow
def test_streams_after_every_block() -> None:
    golden = arrays("golden")
    rows, trace = golden["short_positions"], traced(int(golden["short_len"]))
    streams = [trace["embedded"], *trace.over_layers("streams").values()]
    assert_close(np.stack([h[rows] for h in streams]), golden["short_hidden"])
    assert_close(trace["logits"][rows], golden["short_logits"])


@pytest.mark.parametrize("ratio", [0, 4, 16])
def test_attention(ratio: int) -> None:
    golden = component(f"attn_r{ratio}")
    layer = traced(len(golden["x"])).layer(int(golden["layer"]))
    assert_component(layer["attn_in"], golden["x"])
    assert_component(layer["attn_out"][golden["positions"]], golden["y"])


@pytest.mark.parametrize("ratio", [4, 16])
def test_compressed_rows(ratio: int) -> None:
    golden = component(f"comp_r{ratio}")
    layer = traced(40).layer(int(component(f"attn_r{ratio}")["layer"]))
    for name, expected in (("pooled", "pooled"), ("normed", "normed"), ("rows", "out")):
        assert_component(layer[f"attn.compressor.{name}"], golden[expected])


def test_indexer() -> None:
    golden = component("indexer")
    layer = traced(40).layer(int(component("attn_r4")["layer"]))
    assert_component(layer["attn.q_low"], golden["qr"])
    assert_component(layer["attn.indexer.score"], golden["score"])
    keys = jax.jit(rounding.hadamard)(layer["attn.indexer.compressor.rows"])
    assert_component(keys, golden["compressed_k"])
    np.testing.assert_array_equal(np.sort(layer["attn.indexer.selected"], axis=1), golden["topk_sorted"])


@pytest.mark.parametrize("kind", ["hash", "score"])
def test_expert_choices(kind: str) -> None:
    golden = component(f"gate_{kind}")
    layer = traced(16).layer(int(golden["layer"]))
    assert_component(layer["ffn_in"], golden["x"])
    assert_component(layer["ffn_out"], component(f"moe_{kind}")["y"])
    order, expected = np.argsort(layer["ffn.chosen"], axis=1), np.argsort(golden["indices"], axis=1)
    assert_component(np.take_along_axis(layer["ffn.chosen"], order, 1), np.take_along_axis(golden["indices"], expected, 1))
    assert_component(np.take_along_axis(layer["ffn.weights"], order, 1), np.take_along_axis(golden["weights"], expected, 1))


def test_mixing_matrices() -> None:
    """Golden components have random streams, so a trace is compared by the golden streams before and after a layer."""
    golden = arrays("golden")
    rows, trace = golden["short_positions"], traced(int(golden["short_len"]))
    for index in trace.over_layers("streams"):
        layer, streams = trace.layer(index), golden["short_hidden"][index]
        for part in ("attn", "ffn"):
            post, comb, out = (layer[name][rows] for name in (f"hc_{part}_post", f"hc_{part}_comb", f"{part}_out"))
            streams = hc.write_back(out, streams, post, comb)
            np.testing.assert_allclose(comb.sum(axis=1), 1, atol=1e-4)
            np.testing.assert_allclose(comb.sum(axis=2), 1, atol=1e-2)
        assert_close(streams, golden["short_hidden"][index + 1])


def test_window_rows() -> None:
    golden = component("state_r4")
    length, window = int(golden["prompt_len"]), len(golden["window_kv"])
    rows = traced(length).layer(int(golden["layer"]))["attn.kv"][-window:]
    assert_component(rows, np.roll(golden["window_kv"], -(length % window), axis=0))


@pytest.mark.slow
def test_mtp_block() -> None:
    golden = arrays("golden")
    trace = golden_model().trace(golden["ids"], only="mtp")
    assert_close(trace["mtp.0.input"][-4:], golden["mtp_block_in_last4"])
    assert_close(trace["mtp.0.streams"][-4:], golden["mtp_block_out_last4"])
    assert_close(trace["mtp.0.logits"], golden["mtp_logits"])


def test_attention_weights_sum_to_one() -> None:
    trace = of_short(40)
    for index, ratio in enumerate(trace.ratios):
        layer = trace.layer(index)
        parts = [layer["attn.sink_weights"], layer["attn.window_weights"].sum(-1)]
        if ratio:
            parts.append(layer["attn.compressed_weights"].sum(-1))
        assert all((part >= 0).all() for part in parts)
        np.testing.assert_allclose(sum(parts), 1, atol=1e-5)
        later = np.triu(np.ones((40, 40), bool), 1)
        assert not layer["attn.window_weights"].transpose(0, 2, 1)[later].any()


def test_attention_is_paid_to_selected_rows_alone() -> None:
    layer = of_short(40).layer(RATIO_4)
    chosen = layer["attn.indexer.selected"]
    for t, weights in enumerate(layer["attn.compressed_weights"].max(axis=1)):
        assert set(np.flatnonzero(weights)) <= set(chosen[t][chosen[t] >= 0].tolist())


@pytest.mark.parametrize("length", [1, 3, 64, pytest.param(65, marks=pytest.mark.slow)])
def test_shapes_and_names(length: int) -> None:
    """A trace has no padding, and exactly the documented names."""
    trace = of_short(length)
    config = short_model().config
    letters = {"N": config.hc_mult, "D": config.dim, "H": config.n_heads, "Q": config.head_dim, "E": config.n_experts}
    letters |= {"V": config.vocab_size}
    for name, array in trace.items():
        axes, _ = explain(name)
        rows = length - 1 if name.startswith("mtp") else length
        assert array.ndim == len(axes), name
        for axis, size in zip(axes, array.shape, strict=True):
            assert size == (letters | {"T": rows}).get(axis, size), (name, axis)
        assert array.dtype == (np.int32 if name.endswith(("chosen", "selected")) else np.float32)
    kinds = {name.split(".", 2)[-1] for name in trace if name not in MODEL}
    assert kinds == set(LAYER)
    assert set(MODEL) < set(trace)
    assert trace[f"layers.{RATIO_4}.attn.compressor.rows"].shape[0] == length // 4


@pytest.mark.slow
def test_padding_changes_no_choice() -> None:
    """65 rows run in a wider program than 64; the choices of the first 64 are equal."""
    short, long = of_short(64), of_short(65)
    for name in short:
        if name.endswith("chosen") and not name.startswith("mtp"):
            np.testing.assert_array_equal(short[name], long[name][:64])


def test_only() -> None:
    model, ids = short_model(), arrays("golden")["ids"][:3]
    assert set(model.trace(ids, only="layers.1")) == {name for name in of_short(3) if name.startswith("layers.1.")}
    assert set(model.trace(ids, only=["*.streams", "logits"])) == {n for n in of_short(3) if n.endswith("streams")} | {"logits"}
    with pytest.raises(InputError, match=r"^trace: no name is or begins with layers\.9; "):
        model.trace(ids, only="layers.9")
    with pytest.raises(InputError, match="^prompt is empty"):
        model.trace([])


def test_printed() -> None:
    lines = str(of_short(3)).splitlines()
    assert lines[0] == repr(of_short(3)) == f"Trace of 3 tokens, {len(of_short(3))} arrays"
    assert [line for line in lines if line.startswith("layers.i.attn.sink_weights")] != []
    assert all("layers 1" in line for line in lines if ".indexer." in line)

"""What a trace shows: golden numbers, sums that must be one, and the same as the model itself computes."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from numerics import arrays, assert_close, assert_component, component, golden_model

from ds4jax import InputError
from ds4jax.model import fake_quant
from ds4jax.model import hyper_connections as hc
from ds4jax.trace import LAYER, WHOLE, Trace, explain


@functools.cache
def traced(length: int) -> Trace:
    return golden_model().trace(arrays("golden")["ids"][:length])


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
    keys = jax.jit(fake_quant.hadamard)(layer["attn.indexer.compressor.rows"])
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
    """The golden component has random streams, which no trace meets; from the golden streams before a layer to those after it
    there is one way, and it leads through all of a layer's mixing."""
    golden = arrays("golden")
    rows, trace = golden["short_positions"], traced(int(golden["short_len"]))
    for index in trace.over_layers("streams"):
        layer, streams = trace.layer(index), golden["short_hidden"][index]
        for part in ("attn", "ffn"):
            post, comb, out = (layer[name][rows] for name in (f"hc_{part}_post", f"hc_{part}_comb", f"{part}_out"))
            streams = hc.expand(out, streams, post, comb)
            np.testing.assert_allclose(comb.sum(axis=1), 1, atol=1e-4)
            np.testing.assert_allclose(comb.sum(axis=2), 1, atol=1e-2)
        assert_close(streams, golden["short_hidden"][index + 1])


def test_window_rows() -> None:
    golden = component("state_r4")
    length, window = int(golden["prompt_len"]), len(golden["window_kv"])
    rows = traced(length).layer(int(golden["layer"]))["attn.kv"][-window:]
    assert_component(rows, np.roll(golden["window_kv"], -(length % window), axis=0))


def test_mtp_block() -> None:
    golden = arrays("golden")
    trace = golden_model().trace(golden["ids"], only="mtp")
    assert_close(trace["mtp.0.input"][-4:], golden["mtp_block_in_last4"])
    assert_close(trace["mtp.0.streams"][-4:], golden["mtp_block_out_last4"])
    assert_close(trace["mtp.0.logits"], golden["mtp_logits"])


def test_attention_weights_sum_to_one() -> None:
    trace = traced(40)
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
    layer = traced(40).layer(int(component("attn_r4")["layer"]))
    chosen = layer["attn.indexer.selected"]
    for t, weights in enumerate(layer["attn.compressed_weights"].max(axis=1)):
        assert set(np.flatnonzero(weights)) <= set(chosen[t][chosen[t] >= 0].tolist())


@pytest.mark.parametrize("length", [1, 3, 64, 65])
def test_shapes_and_names(length: int) -> None:
    """Nothing of the padding is left, every name is documented, and every documented name is there."""
    trace = traced(length)
    config = golden_model().config
    letters = {"N": config.hc_mult, "D": config.dim, "H": config.n_heads, "Q": config.head_dim, "E": config.n_experts}
    letters |= {"V": config.vocab_size}
    for name, array in trace.items():
        axes, _ = explain(name)
        rows = length - 1 if name.startswith("mtp") else length
        assert array.ndim == len(axes), name
        for axis, size in zip(axes, array.shape, strict=True):
            assert size == (letters | {"T": rows}).get(axis, size), (name, axis)
        assert array.dtype == (np.int32 if name.endswith(("chosen", "selected")) else np.float32)
    kinds = {name.split(".", 2)[-1] for name in trace if name not in WHOLE}
    assert kinds == set(LAYER)
    assert set(WHOLE) < set(trace)
    assert trace["layers.2.attn.compressor.rows"].shape[0] == length // config.layer_ratios[2]


def test_padding_changes_no_choice() -> None:
    """65 rows run in a wider program than 64; what the first 64 choose is the same."""
    short, long = traced(64), traced(65)
    for name in short:
        if name.endswith("chosen") and not name.startswith("mtp"):
            np.testing.assert_array_equal(short[name], long[name][:64])


def test_only() -> None:
    model, ids = golden_model(), arrays("golden")["ids"][:3]
    assert set(model.trace(ids, only="layers.1")) == {name for name in traced(3) if name.startswith("layers.1.")}
    assert set(model.trace(ids, only=["*.streams", "logits"])) == {n for n in traced(3) if n.endswith("streams")} | {"logits"}
    with pytest.raises(InputError, match=r"^trace: no name is or begins with layers\.9; "):
        model.trace(ids, only="layers.9")
    with pytest.raises(InputError, match="^prompt is empty"):
        model.trace([])


def test_printed() -> None:
    lines = str(traced(3)).splitlines()
    assert lines[0] == repr(traced(3)) == f"Trace of 3 tokens, {len(traced(3))} arrays"
    assert [line for line in lines if line.startswith("layers.i.attn.sink_weights")] != []
    assert all("layers 2, 4" in line for line in lines if ".indexer." in line)

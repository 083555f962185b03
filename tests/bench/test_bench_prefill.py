"""`bench prefill`: a whole run with a toy, the least times, and what cannot be measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from ds4jax.bench import prefill, prefill_floor, prefill_report
from ds4jax.cli import main as cli
from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.random_models import checkpoint as synthetic
from pallas_kernels.experts import prefill as grouped
from pallas_kernels.linear import dequantise


@pytest.mark.long
def test_prefill(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prefill, "LOOKED_AT", (32,))
    files = ["--json", str(tmp_path / "prefill.json"), "--plot", str(tmp_path / "prefill.png")]
    options = ["--synthetic", "small-q2", "--layers", "2", "--tokens", "16,64", "--chunk", "32", *files]
    assert cli.main(["bench", "prefill", *options]) == 0
    content = json.loads((tmp_path / "prefill.json").read_text())
    short, two = content["rows"]
    assert (short["calls"], short["reused"]) == ([[32, 16]], 0)
    assert (two["calls"], two["reused"]) == ([[32, 32], [32, 32]], 64)
    assert all(len(row[name]) == prefill.RUNS for row in content["rows"] for name in ("cold_ms", "warm_ms"))
    assert all(row["tokens_per_second"] > 0 for row in content["rows"])
    assert content["slice"]
    [call] = content["calls"]
    assert (content["widths"], call["width"], call["kernels"], call["experts"]) == ([32], 32, [], None)
    assert call["ms_per_layer"] == pytest.approx(call["ms"], rel=1e-2)
    assert (tmp_path / "prefill.png").stat().st_size > 1000
    out = " ".join(capsys.readouterr().out.split())
    assert "a SLICE of 2 of 6 layers" in out
    assert "2×32" in out
    assert "a call of 32 rows: " in out


def test_the_least_work() -> None:
    config = dataclasses.replace(Config(), n_mtp=0)
    tensors = synthetic.checkpoint(config, "flash-q2").tensors
    one, many = (prefill_floor.work(config, tensors, rows) for rows in (1, 4096))
    experts = sum(tensor.device_nbytes for tensor in tensors if ".experts.w" in tensor.name and ".42." not in tensor.name)
    assert many[0] - one[0] == pytest.approx(experts * (1 - config.n_active / config.n_experts), rel=1e-3)
    # Of 42 layers 52 TFLOP in the experts and 49 in the dense products; 9 in attention and index.
    assert many[1] == pytest.approx(110e12, rel=0.02)
    assert prefill_floor.milliseconds(*many, copy_gbps=1e9) == pytest.approx(many[1] / prefill_floor.MATRIX_FLOPS * 1e3)
    assert prefill_floor.milliseconds(*one, copy_gbps=4000) == pytest.approx(one[0] / 4e9)


def test_kernels_of_experts_are_known_by_name() -> None:
    names = (grouped.GATE_UP, grouped.DOWN, f"{dequantise.NAME}_q2_k")
    assert all(prefill.EXPERTS.search(name) for name in names)
    assert not any(prefill.EXPERTS.search(name) for name in ("attend_prefill", "gemm_fusion_dot_1", "hc_project"))


def test_calls_are_counted_by_width() -> None:
    assert prefill_report.by_width([[8192, 8192], [8192, 8192], [64, 3]]) == "2×8192 + 64"


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(InputError, match="tokens is 1048576"):
        prefill.Options("small-q2", tokens=(1 << 20,))


def test_the_published_layout_keeps_the_experts_bits() -> None:
    config = synthetic.config_of("mxfp4-layout", 3)
    forms = {tensor.name: tensor.form for tensor in synthetic.checkpoint(config, "mxfp4-layout").tensors}
    assert {forms[f"layers.2.ffn.experts.w{i}.weight"] for i in (1, 2, 3)} == {"MXFP4"}
    assert forms["layers.2.hc_attn_fn"] == "F32"
    assert forms["layers.2.ffn.gate.weight"] == "BF16"
    assert forms["layers.2.attn.wq_b.weight"] == "Q8_0"

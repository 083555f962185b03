"""`ds4jax bench decode`: random weights, counts of bytes and kernels, what is written, and a whole run of a small slice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantized import as_float

from ds4jax import runtime
from ds4jax.bench import decode, decode_report, environment, profile, traffic
from ds4jax.bench import suite as module
from ds4jax.bench.programs import SAMPLED
from ds4jax.cli import main as cli
from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.loading import plan as plans
from ds4jax.loading.gguf_names import slots
from ds4jax.loading.plan import plan
from ds4jax.random_models import checkpoint as synthetic
from pallas_kernels.core import launch as bundle
from pallas_kernels.experts.decode import gate_up_part
from pallas_kernels.formats import BLOCK, HALF, IQ2_S, IQ2_XXS, IQ3_XXS, MXFP4, Q2_K, Q4_K, Q5_K, Q6_K, Q8_0, Quantized
from pallas_kernels.linear.activation import Activation
from pallas_kernels.linear.lane_row import quantize_for
from pallas_kernels.linear.q8_matmul import Tile, q8_part
from pallas_kernels.tuning.shapes import FLASH

SMALL = synthetic.config_of("small-q2")
TYPES = {
    "layers.0.ffn.experts.w1.weight": IQ2_XXS,
    "layers.0.ffn.experts.w2.weight": Q2_K,
    "mtp.0.ffn.experts.w3.weight": Q4_K,
    "layers.2.attn.wo_b.weight": Q8_0,
    "layers.2.hc_attn_fn": jnp.float16,
    "mtp.0.hc_attn_fn": jnp.float32,
    "layers.2.attn.indexer.weights_proj.weight": jnp.float16,
    "embed.weight": jnp.float16,
}
UD_TYPES = {
    "layers.0.ffn.experts.w2.weight": MXFP4,
    "layers.1.ffn.experts.w3.weight": IQ2_S,
    "layers.1.ffn.experts.w2.weight": IQ3_XXS,
    "layers.5.ffn.experts.w2.weight": MXFP4,
    "layers.2.attn.wq_a.weight": Q5_K,
    "layers.2.attn.wkv.weight": Q8_0,
    "layers.2.ffn.shared_experts.w1.weight": Q5_K,
    "layers.2.ffn.shared_experts.w2.weight": Q6_K,
    "mtp.0.ffn.experts.w1.weight": Q4_K,
    "embed.weight": Q4_K,
    "layers.2.attn.compressor.wkv.weight": jnp.float32,
    "layers.2.ffn.gate.weight": jnp.bfloat16,
}
# So few groups that the mean of their random minima is not near 0.
TINY = ("layers.2.attn.wq_a.weight",)


def test_types_of_ud_iq3_xxs() -> None:
    tensors = {tensor.name: tensor for tensor in synthetic.checkpoint(SMALL, "small-ud-iq3-xxs").tensors}
    for name, wanted in UD_TYPES.items():
        abstract = tensors[name].abstract
        assert (getattr(abstract, "dtype", None) if not isinstance(abstract, Quantized) else type(abstract)) == wanted, name
    assert tensors["layers.2.attn.compressor.wkv.weight"].stored == "Q8_0"


@pytest.mark.parametrize(
    ("layout", "name", "wanted"),
    [
        *(("small-q2", *one) for one in TYPES.items()),
        *(pytest.param("small-ud-iq3-xxs", *one, marks=pytest.mark.long) for one in UD_TYPES.items() if one[0] not in TINY),
    ],
)
def test_values_have_their_type_and_spread(layout: str, name: str, wanted: Any) -> None:
    slot = next(slot for slot in slots(SMALL) if slot.name == name)
    value, again = synthetic.value(SMALL, slot, layout), synthetic.value(SMALL, slot, layout)
    jax.tree.map(np.testing.assert_array_equal, value, again)
    if isinstance(value, jax.Array):
        assert value.dtype == wanted
    else:
        assert type(value) is wanted
        numbers = np.asarray(value.to_bytes()).reshape(-1, value.BLOCK_BYTES)
        assert not value.broken(numbers).any()
        value = as_float(value)
    assert value.shape == slot.shape
    spread = 1.0 if name == "embed.weight" else slot.shape[-1] ** -0.5
    values = np.asarray(value, np.float64)
    assert abs(values.mean()) < 0.05 * spread
    assert abs(values.std() / spread - 1) < 0.05


def test_expert_ids_are_distinct() -> None:
    slot = next(slot for slot in slots(SMALL) if slot.name.endswith("tid2eid"))
    ids = np.asarray(synthetic.value(SMALL, slot, "small-q2"))
    assert ids.shape == (SMALL.vocab_size, SMALL.n_active)
    assert (ids.min(), ids.max()) == (0, SMALL.n_experts - 1)
    assert all(len(set(row)) == SMALL.n_active for row in ids.tolist())


def test_layers_are_the_first_of_the_schedule() -> None:
    part = synthetic.config_of("flash-q2", 5)
    assert (part.n_layers, part.compress_ratios, part.n_hash_layers) == (5, (0, 0, 4, 128, 4, 0), 3)
    assert synthetic.config_of("flash-q2", 43) == synthetic.config_of("flash-q2")
    with pytest.raises(InputError, match="layers is 44; flash-q2 has 43"):
        synthetic.config_of("flash-q2", 44)


def test_a_checkpoint_counts_what_it_makes() -> None:
    for tensor in synthetic.checkpoint(synthetic.config_of("small-q2", 3), "small-q2").tensors:
        if tensor.name.startswith(("layers.2.attn", "mtp.0.ffn")):
            assert tensor.device_nbytes == tensor.read().nbytes


def test_bytes_of_a_step() -> None:
    """The figures of the published file, with 70 bytes for IQ2_XXS's 66 on the device."""
    config = synthetic.config_of("flash-q2")
    planned = plan(synthetic.checkpoint(config, "flash-q2"), 2048, max_draft=2)
    plain, one, two = (traffic.step_bytes(planned, config, depth) / 1e9 for depth in (0, 1, 2))
    assert plain == pytest.approx(9.559 + 0.068 + 0.039, abs=0.002)
    assert planned.draft / 1e9 == pytest.approx(0.834, abs=0.002)
    assert two - plain == pytest.approx(5.32, abs=0.01)
    assert [traffic.distinct_experts(config, rows) for rows in (1, 2, 3)] == pytest.approx([6, 11.86, 17.58], abs=0.01)


def test_bytes_of_ud_iq3_xxs() -> None:
    """The published file has 103 GB, without an MTP block."""
    config = synthetic.config_of("ud-iq3-xxs")
    tensors = [one for one in synthetic.checkpoint(config, "ud-iq3-xxs").tensors if not one.name.startswith("mtp.")]
    assert sum(one.nbytes for one in tensors) / 1e9 == pytest.approx(103, abs=1)
    assert sum(one.device_nbytes for one in tensors) / 1e9 == pytest.approx(104.94, abs=0.01)


def test_kernels_count_their_own_bytes() -> None:
    product, config = FLASH[1], Config()
    blocks = product.k // BLOCK
    x = Activation(jnp.zeros((2, 1, 2, blocks, HALF), jnp.int32), jnp.zeros((2, 1, blocks), jnp.float32))
    weight = jax.eval_shape(Q8_0.split, jax.ShapeDtypeStruct((*product.sizes, blocks, Q8_0.BLOCK_BYTES), jnp.uint8))
    part = q8_part(x, [weight], tile=Tile())
    assert part.traffic == product.weight_bytes
    numbers = (jnp.zeros((2, 6), dtype) for dtype in (jnp.int32, jnp.float32))
    shape = (config.n_experts, config.moe_dim, config.dim // 256, IQ2_XXS.BLOCK_BYTES)
    stack = jax.eval_shape(IQ2_XXS.split, jax.ShapeDtypeStruct(shape, jnp.uint8))
    rows = quantize_for(jnp.zeros((2, config.dim)), IQ2_XXS, interpret=True)
    assert gate_up_part(rows, *numbers, stack, stack, limit=10.0).traffic == 2 * 6 * 2 * 2048 * 4096 // 256 * 70


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What launches that were traced have noted."""
    for name, count in (("q8_share_warp", 30_000), ("router", 0)):
        monkeypatch.setitem(bundle.TRAFFIC, name, count)


@pytest.mark.usefixtures("counted")
def test_kernels_of_a_profile() -> None:
    ours = ["q8_share_warp", "q8_share_warp__3"]
    events = [(name, us) for ours_too in ours * 2 for name, us in (
        (ours_too, 60.0), ("loop_add_fusion_3", 10.0), ("router_1", 5.0), ("gemm_fusion_dot_1", 25.0)
    )]  # fmt: skip
    made = profile.rows(events, 2, 1000.0)
    assert [(row["name"], row["kind"]) for row in made] == [
        ("q8_share_warp", "weights"),
        ("gemm_fusion_dot_1", "library"),
        ("loop_add_fusion_3", "compiler"),
        ("router", "none"),
    ]
    first = made[0]
    assert (first["calls"], first["us"], first["share"]) == (2.0, 120.0, 0.6)
    assert first["bytes"] == 60_000
    assert first["fraction"] == pytest.approx(first["bytes"] / 120e3 / 1000, abs=1e-4)
    together = profile.summary(made, 4)
    assert (together["kernels"], together["kernels_per_layer"], together["kernel_ms"]) == (8.0, 2.0, 0.2)
    assert (together["no_weights"], together["no_weights_at_most"]) == (0.05, 0.15)


def content() -> dict[str, Any]:
    """A result as a GPU gives it, with made-up times."""
    where = {"program": "max_draft 0", "draft": 0}
    kernels = profile.rows([("q8_share_warp", 60.0), ("swiglu", 5.0)], 1, 4000.0)
    plain = decode._row(decode.Way("plain", decode.PLAIN, 0), [4.0, 5.0, 6.0], 10**10, 4000.0, None, None)
    way = decode.Way("draft 1 in max_draft 1", decode.Program(1), 1)
    drafted = decode._row(way, [7.0, 7.0, 8.0], 14 * 10**9, 4000.0, plain, None)
    way = decode.Way("draft 1 in max_draft 1, sampled", decode.Program(1), 1, SAMPLED)
    sampled = decode._row(way, [7.25, 7.25, 8.0], 14 * 10**9, 4000.0, plain, drafted)
    return {
        "device": "A [GPU]", "jax": "0.0", "copy_gbps": 4000.0, "layout": "flash-q2", "layers": 4, "slice": True,
        "whole_layers": 43, "context": 2048, "weight_bytes": 10**10, "build_seconds": 1.0, "peak_bytes": 2 * 10**10,
        "compiled": [{"program": "max_draft 0", "trace_seconds": 1.0, "compile_seconds": 2.0}],
        "rows": [plain, drafted, sampled],
        "calls": {"advance": [], "call_ms": 1.25, "step_ms": 4.4, "in_pieces": 215.0, "in_one_call": 220.0},
        "simulated": decode._simulated([plain, drafted, sampled], (0.5,)),
        "lossless": None,
        "profiles": [{**where, "steps": 1, **profile.summary(kernels, 4)}],
        "kernels": [{**where, **row} for row in kernels],
        "problems": [],
    }  # fmt: skip


def test_rows_and_simulated_figures() -> None:
    plain, drafted, sampled = content()["rows"]
    assert (plain["ms_per_step"], plain["tokens_per_second"], plain["fraction"]) == (5.0, 200.0, 0.5)
    assert drafted["tokens_per_second"] is None
    assert (drafted["extra_ms"], drafted["extra_floor_ms"], drafted["extra_over_floor"]) == (2.0, 1.0, 2.0)
    assert [row["sampled"] for row in (plain, drafted, sampled)] == [False, False, True]
    assert (sampled["over_greedy_ms"], "over_greedy_ms" in drafted) == (0.25, False)
    [told] = content()["simulated"]
    assert (told["simulated"], told["acceptance"], told["tokens_per_step"]) == (True, [0.5], 1.5)
    assert told["tokens_per_second"] == pytest.approx(1500 / 7, abs=0.01)


def test_what_people_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    decode_report.show(content())
    out = capsys.readouterr().out
    for words in (
        "a SLICE of 4 of 43 layers",
        "214.3 at 0.5",
        "simulated",
        "q8_share_warp",
        "reads no weights",
        "peak 20.0 GB",
        "a call costs 1.25 ms in addition to steps of 4.400 ms; 215.0 tokens/s in pieces of 8 tokens, 220.0 in one call",
    ):
        assert words in out
    decode_report.write_profile(tmp_path / "p.txt", content())
    assert "swiglu" in (tmp_path / "p.txt").read_text()
    decode_report.plot(tmp_path / "p.png", content())
    assert (tmp_path / "p.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--synthetic", "large"], "--synthetic: invalid choice: 'large'"),
        (["--synthetic", "small-q2", "--draft", "0,8"], "--draft: 8 is out of range"),
        (["--synthetic", "small-q2", "--layers", "0"], "--layers: 0 is out of range"),
        (["--synthetic", "small-q2", "--layers", "7"], "layers is 7; small-q2 has 6"),
        (["--synthetic", "small-q2", "--context", "4090"], "context is 4090 and steps 64; small-q2 ends at 4096"),
        (["--synthetic", "small-q2", "--acceptance", "0.5"], "acceptance has 1 shares; draft 2 needs 2"),
        (["--synthetic", "small-q2", "--acceptance", "1.5"], "--acceptance: 1.5 is out of range"),
        (["--synthetic", "small-q2", "--plot", "a.pdf"], "--plot: a.pdf: the figure is a PNG"),
        ([], "--synthetic"),
    ],
)
def test_bad_options(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "decode", *arguments])
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    assert says in err


def test_no_room_for_the_weights(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "free_bytes", lambda: 8_000_000_000)
    monkeypatch.setattr(synthetic, "value", lambda *_: pytest.fail("a tensor was made"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "decode", "--synthetic", "flash-q2"])
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    assert "flash-q2: memory: loading needs 94." in err
    assert "8.00 GB are free" in err


@pytest.mark.parametrize(("problems", "good"), [([], True), (["plain: values that are not finite"], False)])
def test_decode_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, problems: list[str], good: bool) -> None:
    asked = []

    def bench(options: decode.Options, note: Any) -> dict[str, Any]:
        asked.append(options)
        return content() | {"problems": problems}

    monkeypatch.setattr(runtime, "configure", lambda: None)
    monkeypatch.setattr(environment, "require_gpu", lambda: None)
    monkeypatch.setattr(decode, "bench", bench)
    assert module.decode_part(tmp_path, "a-gpu", lambda message: None) is good
    assert asked == [decode.Options("flash-q2", None, 2048, (0, 1, 2), True, 64, (0.79, 0.58))]
    names = ["a-gpu-decode-profile.txt", "a-gpu-decode.json", "a-gpu-decode.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.slow
def test_a_whole_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Without compressed layers but one, to compile little; every draft count stands once."""
    files = ["--json", str(tmp_path / "d.json"), "--plot", str(tmp_path / "d.png")]
    how = ["--layers", "3", "--context", "200", "--draft", "0,1", "--steps", "4", "--acceptance", "0.79"]
    assert cli.main(["bench", "decode", "--synthetic", "small-q2", *how, *files]) == 0
    told = json.loads((tmp_path / "d.json").read_text())
    assert (told["slice"], told["layers"], told["whole_layers"]) == (True, 3, 6)
    greedy = ["plain", "plain in max_draft 1", "draft 1 in max_draft 1"]
    sampled = [f"{name}, {kind}" for kind in ("sampled", "sampled, top-k 1") for name in greedy if name != "plain in max_draft 1"]
    assert [row["name"] for row in told["rows"]] == [*greedy, *sampled]
    assert all(row["ms_per_step"] > 0 and row["fraction"] is None for row in told["rows"])
    assert [row["simulated"] for row in told["simulated"]] == [True]
    calls = told["calls"]
    assert [row["tokens"] for row in calls["advance"]] == [1, 8, 32]
    assert 0 < calls["step_ms"] < calls["advance"][1]["ms"]
    assert min(calls["in_pieces"], calls["in_one_call"]) > 0
    lossless = told["lossless"]
    assert lossless["equal"]
    assert 0 < lossless["stood"][0] < lossless["tried"][0]
    assert (told["profiles"], told["kernels"], told["problems"], told["device"]) == ([], [], [], "cpu")
    assert (tmp_path / "d.png").stat().st_size > 1000
    assert "a SLICE of 3 of 6 layers" in capsys.readouterr().out

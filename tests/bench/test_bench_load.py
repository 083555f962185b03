"""`ds4jax bench load` and the suite's part of that name, on a file as small as they come."""

from __future__ import annotations

import collections
import json
import shutil
from pathlib import Path

import pytest

from ds4jax import runtime
from ds4jax.bench import environment, load, q2_file
from ds4jax.bench import suite as module
from ds4jax.cli import main as cli
from ds4jax.loading import open_checkpoint

SMALL = 20_000_000
CONTENT = {
    "device": "A GPU",
    "jax": "0",
    "bytes": 10**9,
    "tensors": 3,
    "runs": {"cat": [4.0], "put": [9.0], "load": [2.4]},
    "gbps": {"cat": 4.0, "put": 9.0, "load": 2.4},
    "slower": 4.0,
    "ratio": 0.6,
}


@pytest.mark.parametrize("nbytes", [1, 10**8, 435_000_000, 4 * 10**9])
def test_a_file_of_about_the_size_asked_for(nbytes: int) -> None:
    config = q2_file.config_of(nbytes)
    assert len(config.compress_ratios) == config.n_layers + 1
    assert 0.9 * max(nbytes, 29e6) < q2_file.stored_bytes(config) < 1.1 * max(nbytes, 29e6)


def test_a_file_has_the_published_types(tmp_path: Path) -> None:
    config = q2_file.config_of(SMALL)
    largest = q2_file.write_q2(tmp_path / "q2.gguf", config)
    tensors = open_checkpoint(tmp_path / "q2.gguf").tensors
    assert {tensor.stored for tensor in tensors} == {"IQ2_XXS", "Q2_K", "Q8_0", "F16", "F32", "I32"}
    assert sum(tensor.nbytes for tensor in tensors) == q2_file.stored_bytes(config)
    assert max(tensor.nbytes for tensor in tensors) == largest


@pytest.mark.long
def test_bench_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    apart = tmp_path_factory.mktemp("apart")
    monkeypatch.setattr("tempfile.tempdir", str(apart))
    assert cli.main(["bench", "load", "--bytes", str(SMALL), "--json", str(tmp_path / "load.json")]) == 0
    out, err = capsys.readouterr()
    told = json.loads((tmp_path / "load.json").read_text())
    assert err == ""
    assert told["bytes"] == pytest.approx(q2_file.stored_bytes(q2_file.config_of(SMALL)), rel=0.01)
    assert {len(rates) for rates in told["runs"].values()} == {load.RUNS}
    for way, rates in told["runs"].items():
        assert told["gbps"][way] == sorted(rates)[1] > 0
    assert told["slower"] == min(told["gbps"]["cat"], told["gbps"]["put"])
    # The file rounds rates to a thousandth.
    assert told["ratio"] == pytest.approx(told["gbps"]["load"] / told["slower"], rel=0.02, abs=1e-3)
    assert f"loading is at {told['ratio']:.2f} of the slower" in out
    assert not any(apart.iterdir())


def test_no_room_for_the_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    usage = collections.namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9))
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "load", "--bytes", "4e9"])
    assert ended.value.code == 2
    assert "1.0 GB free, 3.9 GB are needed; give fewer --bytes or another TMPDIR" in capsys.readouterr().err


@pytest.mark.parametrize(("ratio", "good"), [(0.6, True), (0.59, False)])
def test_load_part(
    ratio: float, good: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = []

    def measure(nbytes: int, note: object) -> dict:
        asked.append(nbytes)
        return CONTENT | {"ratio": ratio}

    monkeypatch.setattr(runtime, "configure", lambda: None)
    monkeypatch.setattr(environment, "require_gpu", lambda: None)
    monkeypatch.setattr(load, "measure", measure)
    assert module.PARTS["load"].measure is module.load_part
    assert module.load_part(tmp_path, "a-gpu", lambda message: None) is good
    assert asked == [4_000_000_000]
    assert json.loads((tmp_path / "a-gpu-load.json").read_text())["ratio"] == ratio
    assert (": reached\n" in capsys.readouterr().out) is good

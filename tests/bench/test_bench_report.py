"""The result file, the table and the picture."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
import pytest

from ds4jax.bench import environment, kernels, report
from pallas_kernels.tuning.shapes import FLASH


def content(**changes: Any) -> dict[str, Any]:
    """A result file with made-up times."""
    rows = []
    for product in FLASH[:3]:
        for m in (1, 4):
            row = kernels.row(product.key, product.name, "share_warp", m, [12.0 * m, 13.0 * m], product.traffic(m), 2790.0)
            rows.append({"weight_bytes": product.weight_bytes, **row})
    rows.append(kernels.row(FLASH[1].key, FLASH[1].name, "dot_bf16", 4, [100.0], 67_000_000, 2790.0))
    compared = {"shape": FLASH[1].key, "m": 3, "against": "each row alone", "differing": 0}
    made = report.document({"device": "A [GPU]", "jax": "0.0", "driver": None}, 2790.04, rows, [compared], [])
    return made | changes


def test_json_round_trip(tmp_path: Path) -> None:
    path, made = tmp_path / "results.json", content()
    report.write(path, made)
    assert json.loads(path.read_text()) == made
    assert list(made) == ["schema", "device", "jax", "driver", "copy_gbps", "rows", "bits", "problems"]
    assert (made["schema"], made["copy_gbps"]) == (1, 2790.0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def test_table_and_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    bad = {"shape": "8x64", "m": 2, "against": "a second run", "differing": 7}
    report.show(content(problems=["head: RuntimeError: [odd] trace"]))
    out = capsys.readouterr().out
    assert "A [GPU], jax 0.0, copy 2790 GB/s" in out
    [line] = [line for line in out.splitlines() if line.split()[:2] == ["q_b", "32768x1024"]]
    fractions = [f"{FLASH[1].traffic(m) / (12.5 * m) / 1e3 / 2790.0:.2f}" for m in (1, 4)]
    assert line.split()[2:] == ["12.5", fractions[0], "50.0", fractions[1]]
    assert "bits: 1 comparisons, 0 with differences" in out
    assert "32768x1024 M=4: 2.00 times as fast as jnp.dot bf16" in out
    assert "not measured: head: RuntimeError: [odd] trace" in out
    assert "  8x64 M=2, a second run: 7 values differ" in report.verdict(content(bits=[bad]))


def test_picture(tmp_path: Path) -> None:
    path = tmp_path / "roofline.png"
    report.plot(path, content())
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [entry.name for entry in tmp_path.iterdir()] == ["roofline.png"]


def test_kernels_sha256(root: Path, tmp_path: Path) -> None:
    names = sorted(os.path.join(folder, name) for folder, _, names in os.walk(root / "pallas_kernels") for name in names)
    joined = b"".join(Path(name).read_bytes() for name in names if name.endswith(".py"))
    assert environment.kernels_sha256() == environment.kernels_sha256() == hashlib.sha256(joined).hexdigest()
    (tmp_path / "inner").mkdir()
    for name, text in {"b.py": "2", "a.py": "1", "c.txt": "3", "inner/z.py": "4"}.items():
        (tmp_path / name).write_text(text)
    assert environment.kernels_sha256(tmp_path) == hashlib.sha256(b"124").hexdigest()


def test_describe() -> None:
    told = environment.describe()
    fields = ["device", "driver", "jax", "jaxlib", "python", "commit", "kernels_sha256", "command"]
    assert list(told) == fields
    assert (told["jax"], told["python"]) == (jax.__version__, platform.python_version())
    assert told["device"] == jax.devices()[0].device_kind
    json.dumps(told)


def test_commit_is_the_checkout_s_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert environment.commit() is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "one"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert environment.commit() == head
    (tmp_path / "file").write_text("2")
    assert environment.commit() == f"{head}-dirty"
    (tmp_path / "inside").mkdir()
    monkeypatch.setattr(environment, "ROOT", tmp_path / "inside")
    assert environment.commit() is None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["/opt/bin/ds4jax", "bench", "kernels", "--json", "/tmp/a/k.json"], "ds4jax bench kernels --json k.json"),
        (["/src/ds4jax/__main__.py", "bench", "kernels", "--json=/tmp/k.json"], "python -m ds4jax bench kernels --json=k.json"),
    ],
)
def test_command_line(arguments: list[str], told: str) -> None:
    assert environment.command_line(arguments) == told


def test_slug() -> None:
    assert environment.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_copy_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    from pallas_kernels.core import timing

    monkeypatch.setattr(environment, "COPY_FLOATS", 2**18)
    traces = iter([[("copy", 1.0 + i) for i in range(10)] + [("tiny", 0.1)], [("copy", 1.0)] * 9])
    monkeypatch.setattr(timing, "device_events", lambda run: next(traces))
    assert environment.copy_gbps() == pytest.approx(2 * 2**20 / 5.5 / 1e3)
    with pytest.raises(RuntimeError, match="9 kernels, expected 10"):
        environment.copy_gbps()

"""Results of `bench mesh`: which bits differ, and what the report, the picture and the profile say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ds4jax.bench import mesh, mesh_report

WHERE = {"layout": "small-q2", "exchange": "collective", "processes": 1}
DIGESTS = {"tokens_digest": "a", "step_digests": ["1", "2"]}


def row(devices: int, **other: Any) -> dict[str, Any]:
    """A row of a result."""
    return {**WHERE, "devices": devices, "piece": "plain", "name": "plain", **DIGESTS, **other}


def test_a_differing_step_is_found() -> None:
    found = mesh.compared([row(2, step_digests=["1", "3"]), row(1), row(2, processes=2, tokens_digest="b")])
    assert [(one["devices"], one["processes"], one["equal"], one["first_differing_step"]) for one in found] == [
        (2, 1, False, 1),
        (2, 2, True, None),
    ]
    assert [one["against_devices"] for one in found] == [1, 1]
    assert [one["equal_tokens"] for one in found] == [True, False]
    content = {"problems": [], "compared": found}
    assert not mesh.good(content)
    assert mesh.good(content | {"compared": found[1:]})
    assert not mesh.good(content | {"compared": [], "problems": ["it failed"]})


MODEL = {
    **WHERE, "devices": 2, "copy_gbps": 4000.0, "whole_layers": 43, "layers": 8, "weight_bytes": 10**10,
    "held_bytes": [6 * 10**9] * 2, "held_share": [0.6, 0.6], "made_peak_bytes": [6 * 10**9, 61 * 10**8], "made_seconds": 2.0,
}  # fmt: skip
TOTALS = {"program": "flash-q2, 2 devices: max_draft 0", "draft": 0, "kernels": 900.0, "kernel_ms": 5.0}
KERNEL = {"name": "ncclDevKernel_AllGather", "calls": 174.0, "us": 3000.0, "share": 0.6, "bytes": None, "fraction": None}


def content_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A result with one of everything."""
    kernel = {**KERNEL, "kind": "library", "program": TOTALS["program"], "draft": 0}
    gather = {**WHERE, "devices": 2, "name": "logits", "whole_bytes": 517_120, "us_per_gather": 20.0}
    return {
        "device": "A GPU", "jax": "1", "devices": 2, "rows": rows, "models": [MODEL], "problems": ["it failed"],
        "gathers": [gather, gather | {"whole_bytes": 2 * 517_120}],
        "profiled": [{"totals": {**TOTALS, "exchange_kernels": 174.0, "exchange_ms": 3.0}, "kernels": [kernel]}],
        "compared": mesh.compared(rows), "not_measured": [{**WHERE, "devices": 1, "reason": "it needs more"}],
    }  # fmt: skip


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(devices, ms_per_step=2.0, tokens_per_second=500.0) for devices in (1, 2)]
    simulated = {"simulated": True, "simulated_tokens_per_second": 800.0, "tokens_per_second": None}
    rows += [
        row(2, name="2 drafts of mtp", ms_per_step=3.0, **simulated),
        row(2, name="2 drafts", ms_per_step=3.0, tokens_per_second=None),
    ]
    rows += [row(2, processes=2, ms_per_step=4.0, tokens_per_second=250.0, step_digests=["1", "4"])]
    content = content_of(rows)
    mesh_report.show(content)
    out = capsys.readouterr().out
    for line in (
        "a gather by collective of 517,120 bytes (logits): 20.00 µs",
        "900 kernels a step, 5.000 ms, 174 of them exchanges, 3.000 ms",
        "at most 6.00 GB (0.600) on a device, peak 6.10 GB while they were made",
        "bits: 2 comparisons, 1 with differences",
        "DIFFERENT: small-q2, plain, 2 devices, 2 processes against 1 device: 1 of 2 steps, first 1",
        "not measured: small-q2, 1 device: it needs more",
        "problem: it failed",
        "a SLICE of 8 of 43 layers, not the model",
        "3.00 ms, 800.0 (simulated)",
    ):
        assert line in " ".join(out.split()), line
    mesh_report.plot(tmp_path / "mesh.png", content)
    assert (tmp_path / "mesh.png").read_bytes()[1:4] == b"PNG"
    mesh_report.write_profile(tmp_path / "profile.txt", content)
    assert "ncclDevKernel_AllGather" in (tmp_path / "profile.txt").read_text()
    empty = content_of([]) | {"gathers": [], "models": [], "profiled": []}
    mesh_report.show(empty)
    mesh_report.plot(tmp_path / "empty.png", empty)
    mesh_report.write_profile(tmp_path / "none.txt", empty)
    assert not (tmp_path / "none.txt").exists()

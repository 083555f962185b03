"""The bookkeeping of the kernel benchmark, with events and kernels that need no GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from ds4jax.bench import bits, kernels
from ds4jax.bench.kernels import Bench
from pallas_kernels.core import timing
from pallas_kernels.linear import activation
from pallas_kernels.linear.q8_matmul import Tile
from pallas_kernels.tuning import tune
from pallas_kernels.tuning.shapes import Product
from pallas_kernels.tuning.tune import Launch

PAIR = Product("pair", (8, 4), 64)
GROUPED = Product("grouped", (8,), 96, groups=2)


def test_events_go_to_the_program_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[tuple[str, float]] = []

    def program(us: float) -> Callable[[], None]:
        return lambda: running.extend([("copy", 9.0), ("q8_share_warp", us), ("q8_share_warp_1", us + 0.5)])

    def traced(run: Callable[[], object]) -> list[tuple[str, float]]:
        running.clear()
        run()
        return list(running)

    monkeypatch.setattr(timing, "device_events", traced)
    programs = [program(us) for us in (1.0, 2.0, 3.0)]
    assert timing.kernel_times(programs, "q8_share_warp", 2, repeats=2) == [[us, us + 0.5] * 2 for us in (1.0, 2.0, 3.0)]
    with pytest.raises(RuntimeError, match="holds 12 launches, expected 18"):
        timing.kernel_times(programs, "q8_share_warp", 3, repeats=2)


def test_times_are_named_by_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def kernel_times(runs: Sequence[Any], kernel: str, calls: int, repeats: int) -> list[list[float]]:
        assert (kernel, calls, repeats) == ("q8_share_warp", 2, 20)
        for run in runs:
            run()
        return [[float(m)] for m in seen]

    monkeypatch.setattr(timing, "kernel_times", kernel_times)
    data = tune.Data(PAIR, sets=2)
    launches = [Launch(PAIR, m, Tile()) for m in (4, 1, 2)]
    programs = {launch: lambda x, sets: seen.append(x.quants.shape[0]) for launch in launches}
    assert tune.times(programs, data) == {launch: [float(launch.m)] for launch in launches}
    assert seen == [4, 1, 2]


def test_kernels_of_a_call_are_summed() -> None:
    events = [("memset", 1.0), ("gemm", 20.0), ("memset", 2.0), ("gemm", 30.0)]
    assert kernels.per_call(events, 2) == [21.0, 32.0]
    for calls in (3, 8):
        with pytest.raises(RuntimeError, match=f"4 kernels for {calls} equal calls"):
            kernels.per_call(events, calls)


def test_row_arithmetic() -> None:
    row = kernels.row("8x64", "name", "share_warp", 3, [4.0, 2.0, 9.0], 6_000_000, 3000.0)
    assert (row["us"], row["gbps"], row["fraction"], row["samples"]) == (4.0, 1500.0, 0.5, [4.0, 2.0, 9.0])


def test_weights_rotate_over_more_than_any_cache() -> None:
    for product in tune.FLASH:
        assert tune.copies(product) >= 2
        assert tune.copies(product) * product.weight_bytes >= 300_000_000


def fake_programs(broken: dict[int, int]) -> dict[int, Any]:
    """Programs whose result in row i depends on row i alone, but for one bit of the rows that `broken` names by M."""

    def run(m: int, x: activation.Activation, sets: Sequence[Any]) -> list[list[np.ndarray]]:
        out = np.array(x.scales[:, 0, :])
        assert len(out) == m
        if m in broken:
            out[broken[m], 1] = np.nextafter(out[broken[m], 1], np.float32(np.inf))
        return [[out, -out] for _ in sets]

    return {m: functools.partial(run, m) for m in bits.EVERY_M}


def test_bits_that_differ_are_counted() -> None:
    data = tune.Data(PAIR, sets=3)
    whole = bits.check(PAIR, fake_programs({}), data)
    assert [row["m"] for row in whole] == [2, 3, 4, 5, 6, 7, 8, 1, 8]
    assert bits.equal(whole)
    bad = bits.check(PAIR, fake_programs({3: 2, 8: 7}), data)
    assert {row["m"]: row["differing"] for row in bad if row["differing"]} == {3: 6, 8: 6}
    assert not bits.equal(bad)
    assert not bits.equal([])
    zeros = [np.zeros(2, np.float32)], [np.array([0.0, -0.0], np.float32)]
    assert bits.differing(*zeros) == 1


@pytest.fixture
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted kernels on two sets of weights, and times that count the programs of a trace: 1, 2, 3, ... µs."""

    def kernel_times(runs: Sequence[Any], kernel: str, calls: int, repeats: int = 5) -> list[list[float]]:
        for run in runs:
            assert len(run()) == calls
        return [[float(i + 1)] * calls * repeats for i in range(len(runs))]

    monkeypatch.setattr(tune, "program", functools.partial(tune.program, interpret=True))
    monkeypatch.setattr(tune, "copies", lambda product: 2)
    monkeypatch.setattr(tune, "ROTATION_BYTES", 5000)
    monkeypatch.setattr(activation, "quantize", functools.partial(activation.quantize, interpret=True))
    monkeypatch.setattr(timing, "kernel_times", kernel_times)
    monkeypatch.setattr(timing, "device_events", lambda run: [("gemm", 2.0), ("add", 1.0)] * len(run()))
    monkeypatch.setattr(kernels, "DOT_BYTES", range(1_000, 10_000))
    monkeypatch.setattr(kernels, "ACTIVATION_CALLS", 2)
    monkeypatch.setattr(kernels, "ACTIVATION_WIDTHS", (64,))
    monkeypatch.setattr(bits, "EVERY_M", (1, 5, 8))


def test_each_number_of_rows_is_one_program_with_its_own_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "tile_for", lambda sizes, k, groups, m, device: Tile(groups, m))
    for product in (PAIR, GROUPED):
        launches = Bench((product,), (4, 12), 2.0, check_bits=True).launches(product)
        assert sorted(launch.m for launch in launches) == [*range(1, 9), 12]
        assert all(launch.tile == Tile(product.groups, launch.m) for launch in launches)
        assert [launch.m for launch in Bench((product,), (4, 12), 2.0, check_bits=False).launches(product)] == [4, 12]


@pytest.mark.usefixtures("no_gpu_needed")
@pytest.mark.slow
def test_a_whole_run() -> None:
    notes: list[str] = []
    found = Bench((PAIR, GROUPED), (1, 3, 12), 2.0, check_bits=True).run(notes.append)
    assert found.problems == []
    rows = {(row["shape"], row["kind"], row["m"]): row for row in found.rows}
    assert len(rows) == len(found.rows)
    # M = 1, 3 and 12 are timed in that order, then the other numbers of rows that only the bits need.
    for product in (PAIR, GROUPED):
        us = {m: rows[product.key, "share_warp", m]["us"] for m in (1, 3, 12)}
        assert us == {1: 1.0, 3: 2.0, 12: 3.0}
    assert rows[PAIR.key, "share_warp", 12]["gbps"] == round(PAIR.traffic(12) / 3.0 / 1e3, 1)
    assert [rows["activation 64", "activation", m]["us"] for m in (1, 2, 3, 4)] == [1.0, 2.0, 3.0, 4.0]
    assert {key for key in rows if key[1].startswith("dot")} == {
        (GROUPED.key, kind, m) for kind in ("dot_bf16", "dot_f16") for m in (1, 4)
    }
    assert rows[GROUPED.key, "dot_f16", 4]["us"] == 3.0
    assert bits.equal(found.bits)
    assert {row["shape"] for row in found.bits} == {PAIR.key, GROUPED.key, "activation 64"}
    assert notes[-1] == "grouped, dot_f16"


@pytest.mark.long
@pytest.mark.usefixtures("no_gpu_needed")
def test_a_part_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run: Callable[[], object]) -> list[tuple[str, float]]:
        raise RuntimeError("no trace\nand more")

    monkeypatch.setattr(timing, "device_events", fail)
    found = Bench((GROUPED,), (1,), 2.0, check_bits=False).run(lambda message: None)
    assert found.problems == [f"grouped, {kind}: RuntimeError: no trace" for kind in ("dot_bf16", "dot_f16")]
    assert {row["kind"] for row in found.rows} == {"share_warp", "activation"}
    assert found.bits == []

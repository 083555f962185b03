"""The benchmark of the expert kernels: what a program launches, and what is counted, without a GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from cuda import kernel_calls, lowered_for_cuda

from ds4jax.bench import experts
from ds4jax.bench.experts import Launch, Product
from pallas_kernels.core import timing
from pallas_kernels.experts.decode import DOWN, ExpertTile
from pallas_kernels.experts.many_rows import GATE_UP

SMALL = Product(DOWN, "Q2_K", experts=8, active=2, dim=512, hidden=256)


def test_no_expert_is_read_twice() -> None:
    for rows in (1, 3):
        chosen, share, [stack] = experts.arguments(Launch(SMALL, rows, ExpertTile()))
        assert chosen.shape == (SMALL.calls(rows), rows, 2)
        assert np.unique(chosen).size == chosen.size
        assert (share.shape, stack.shape) == ((rows, 2), (8, 512, 256))


@pytest.mark.parametrize("kernel", [GATE_UP, DOWN])
def test_a_program_launches_every_call(kernel: str) -> None:
    key = Launch(dataclasses.replace(SMALL, kernel=kernel), 1, ExpertTile())
    shapes = jax.eval_shape(lambda: experts.arguments(key))
    text = lowered_for_cuda(experts.program(key), *shapes)
    # Equal launches are one function of the program.
    assert kernel_calls(text, kernel) == 1
    assert len(jax.eval_shape(experts.program(key), *shapes)) == SMALL.calls(1) == 4


def test_rows_count_pairs_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel_times(runs: list[Any], kernel: str, calls: int, repeats: int) -> list[list[float]]:
        assert (kernel, calls) == (DOWN, 1)
        return [[2.0, 1.0, 9.0] for _ in runs]

    monkeypatch.setattr(timing, "kernel_times", kernel_times)
    [row] = experts.timed({Launch(SMALL, 3, ExpertTile()): lambda *arguments: None}, 1000.0)
    assert (row["pairs"], row["m"], row["us"]) == (6, 3, 2.0)
    assert row["weight_bytes"] == 6 * 512 * 256 // 256 * 84
    assert row["gbps"] == round(row["weight_bytes"] / 2.0 / 1e3, 1)


def test_the_formats_and_pairs_of_the_table() -> None:
    keys = experts.programs(experts.NAMES, experts.ROWS)
    assert {(key.product.kernel, key.product.name, key.rows * key.product.active) for key in keys} == {
        (kernel, name, pairs) for kernel in (GATE_UP, DOWN) for name in experts.NAMES for pairs in (6, 18, 48)
    }
    assert ExpertTile() in experts.TILES
    assert experts.traffic(Product(GATE_UP, "IQ2_S"), 1) == 6 * 2 * 2048 * 4096 // 256 * 82

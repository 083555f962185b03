"""Products of float16 weights on tensor cores: both kernels have the bits of one row alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.harness import check_lowers
from numerics import assert_bits_equal

from pallas_kernels.core import mma
from pallas_kernels.core.launch import launch
from pallas_kernels.linear import half_matmul
from pallas_kernels.linear.float_matmul import float_matmul
from pallas_kernels.linear.halves import LOW_SCALE, FloatRows, halves_of
from pallas_kernels.linear.matrices import NAME

# What one layer of V4-Flash asks for together: rows of each weight, and K.
FLASH = {
    "ratio 4": ((1024, 1024, 256, 256, 64), 4096),
    "ratio 128": ((512, 512), 4096),
    "router": ((256,), 4096),
    "indexer q_b": ((8192,), 1024),
}


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def few(x: jax.Array, weights: list[jax.Array], cut: tuple[int, int, int], monkeypatch: Any) -> list[jax.Array]:
    monkeypatch.setattr(half_matmul, "few_cut", lambda rows, heights, chunks: cut)
    return launch([half_matmul.few_part(FloatRows.of(x).halves, weights, interpret=True)], warps=1, interpret=True)[0]


def many(x: jax.Array, weights: list[jax.Array], cut: tuple[int, int], monkeypatch: Any) -> list[jax.Array]:
    monkeypatch.setattr(half_matmul, "many_cut", lambda rows, tiles, chunks: cut)
    part = half_matmul.many_part(FloatRows.of(x).halves, weights, interpret=True)
    return launch([part], warps=half_matmul.RESIDUES, interpret=True)[0][:-1]


def test_a_value_is_the_sum_of_its_halves():
    x = normal(0, 4096) * jnp.logspace(-6, 3, 4096)
    high, low = (np.asarray(half, np.float64) for half in halves_of(x))
    np.testing.assert_allclose(high + low / LOW_SCALE, np.asarray(x, np.float64), rtol=2.0**-22, atol=2.0**-36)


def test_where_a_lane_holds_a_tile():
    """As the docstring says: row g or 8 + g and columns 2·t and 2·t + 1 of each half."""
    rows, columns = (np.asarray(normal(seed, 2, 8, 32).astype(jnp.float16)) for seed in (0, 1))
    lanes = [jnp.asarray(half.reshape(32, 8)) for half in (*rows, *columns)]
    sums = np.asarray(mma.multiply_tile(*lanes, jnp.zeros((32, 8)), interpret=True)).reshape(8, 4, 2, 2, 2)
    exact = np.einsum("pgk,hck->gchp", rows.astype(np.float64), columns.astype(np.float64)).reshape(8, 4, 2, 2, 2)
    np.testing.assert_allclose(sums, exact.transpose(0, 1, 3, 4, 2), atol=1e-5)


@pytest.mark.parametrize(
    ("cut", "rows"),
    [
        ((2, 1, 2), 3),
        ((1,), 9),
        pytest.param((4, 2, 4), 4, marks=pytest.mark.long),
        pytest.param((2,), 20, marks=pytest.mark.long),
        pytest.param((4,), 33, marks=pytest.mark.slow),
    ],
)
def test_both_kernels_have_the_bits_of_a_row_alone(cut, rows, monkeypatch):
    """With K that is no multiple of what a warp takes at a time, and weights with odd rows."""
    x, weights = normal(0, rows, 320), [normal(n, n, 320).astype(jnp.float16) for n in (10, 17)]
    made = few(x, weights, cut, monkeypatch) if len(cut) == 3 else many(x, weights, (2, *cut), monkeypatch)
    for m in (0, 1, rows - 1):
        for together, alone in zip(made, few(x[m : m + 1], weights, (1, 2, 1), monkeypatch), strict=True):
            assert_bits_equal(together[m : m + 1], alone)


@pytest.mark.long
@pytest.mark.parametrize("rows", [1, 32, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FLASH)
def test_v4_flash_lowers(name, rows):
    sizes, k = FLASH[name]
    weights = [jax.ShapeDtypeStruct((n, k), jnp.float16) for n in sizes]
    check_lowers(jax.jit(float_matmul), (jax.ShapeDtypeStruct((rows, k), jnp.float32), weights), {NAME: 1})


@pytest.mark.gpu
@pytest.mark.parametrize("name", FLASH)
def test_many_rows_on_the_gpu(name):
    sizes, k = FLASH[name]
    x, weights = normal(0, 33, k), [normal(n, n, k).astype(jnp.float16) for n in sizes]
    alone = [float_matmul(x[m : m + 1], weights) for m in range(33)]
    for rows in (2, 4, 8, 9, 32, 33):
        for i, made in enumerate(float_matmul(x[:rows], weights)):
            for m in range(rows):
                assert np.asarray(made[m]).tobytes() == np.asarray(alone[m][i][0]).tobytes(), f"{name}: row {m} of {rows}"

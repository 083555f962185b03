"""Kernels of a decode step for more than eight rows: each row has the bits of the row alone, wherever the batches are cut."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_bits_equal
from quantized import random_blocks

from pallas_kernels.core import batches
from pallas_kernels.core.limits import MAX_ROWS
from pallas_kernels.experts.decode import experts
from pallas_kernels.formats import MXFP4, Q4_K, Q8_0, Quantized
from pallas_kernels.linear.float_matmul import float_matmul
from pallas_kernels.linear.lane_matmul import lane_matmul
from pallas_kernels.linear.lane_row import quantize_for
from pallas_kernels.linear.q8_matmul import Tile, q8_matmul

# Two batches, the second one shorter; and two full ones.
SIZES = (9, pytest.param(16, marks=pytest.mark.long))


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), jnp.float32)


def weight(format: type[Quantized], *shape: int) -> Quantized:
    return format.from_bytes(random_blocks(format, shape, 1))


def check(product: Any, x: jax.Array, rows: int) -> None:
    """`product` of all rows against that of single rows."""
    run = jax.jit(product)
    together = run(x[:rows])
    for m in (0, MAX_ROWS - 1, MAX_ROWS, rows - 1):
        for many, alone in zip(together, run(x[m : m + 1]), strict=True):
            assert_bits_equal(many[m : m + 1], alone)


@pytest.mark.parametrize("rows", SIZES)
def test_q8_matmul(rows: int) -> None:
    """Two weights in one launch, the rows of one not a multiple of the tile."""
    weights = [weight(Q8_0, n, 96) for n in (13, 8)]

    def product(x: jax.Array) -> list[jax.Array]:
        return q8_matmul(quantize_for(x, Q8_0, interpret=True), weights, tile=Tile(2, 1), interpret=True)

    check(product, normal(16, 96), rows)


@pytest.mark.long
def test_q8_matmul_of_groups() -> None:
    w = weight(Q8_0, 3 * 5, 64)

    def product(x: jax.Array) -> list[jax.Array]:
        return q8_matmul(quantize_for(x, Q8_0, 3, interpret=True), [w], tile=Tile(2, 1), groups=3, interpret=True)

    check(product, normal(11, 192), 11)


@pytest.mark.parametrize("rows", SIZES)
def test_float_matmul(rows: int) -> None:
    weights = [normal(n, 64).astype(jnp.bfloat16) for n in (5, 8)]
    check(lambda x: float_matmul(x, weights, interpret=True), normal(16, 64), rows)


@pytest.mark.parametrize(("format", "groups"), [(MXFP4, 2), pytest.param(Q4_K, 1, marks=pytest.mark.slow)])
@pytest.mark.long
def test_lane_matmul(format: type[Quantized], groups: int) -> None:
    w = weight(format, groups * 5, 256)

    def product(x: jax.Array) -> list[jax.Array]:
        return [lane_matmul(quantize_for(x, format, groups, interpret=True), w, groups=groups, tile=2, interpret=True)]

    check(product, normal(11, groups * 256), 11)


@pytest.mark.long
def test_experts_of_many_rows() -> None:
    """Eleven rows with two of five experts each."""
    gate, up, down = (weight(Q8_0, 5, *shape) for shape in ((64, 32), (64, 32), (32, 64)))
    random = np.random.default_rng(0)
    chosen = jnp.asarray([random.permutation(5)[:2] for _ in range(11)], jnp.int32)
    share, x = jnp.asarray(random.uniform(0.2, 1.0, (11, 2)), jnp.float32), normal(11, 32) * 1e-3
    run = jax.jit(functools.partial(experts, limit=10.0, interpret=True))
    together = run(x, chosen, share, gate, up, down)
    for m in (0, 5, 10):
        own = slice(m, m + 1)
        assert_bits_equal(together[own], run(x[own], chosen[own], share[own], gate, up, down))


@pytest.mark.parametrize("rows", [1, MAX_ROWS, 9, 11, 16, 17, 64])
def test_batches_hold_every_row_once(rows: int) -> None:
    """Rows that the last batch repeats are not stored."""
    size, stored = batches.rows_of(rows), []
    assert size <= MAX_ROWS
    m = jnp.arange(size)
    for program in range(batches.count(rows)):
        number, batch = batches.split(jnp.int32(program), rows)
        assert int(number) == (program if batch.only else 0)
        assert all(0 <= int(batch.row(i)) < rows for i in range(size))
        real = batch.real(m)
        stored += [int(place) for place in batch.place(m)[slice(None) if real is None else np.asarray(real)]]
    assert stored == list(range(rows))

"""On an NVIDIA GPU: bits of every V4-Flash product over the number of rows, and golden products."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_bits_equal

from pallas_kernels import ops
from pallas_kernels.formats import BLOCK, HALF, Q8_0
from pallas_kernels.linear import activation
from pallas_kernels.tuning.shapes import FLASH

pytestmark = pytest.mark.gpu


def test_golden_activation(activation_golden):
    result = activation.quantize(jnp.asarray(activation_golden["q8_0.x"]))
    words = np.ascontiguousarray(np.moveaxis(np.asarray(result.quants)[:, 0], 1, 2))
    np.testing.assert_array_equal(words.reshape(4, -1, 8).view(np.int8).reshape(4, -1), activation_golden["q8_0.xq"])
    assert_bits_equal(np.asarray(result.scales)[:, 0], activation_golden["q8_0.xscale"])


def test_golden_products(activation_golden):
    weight = Q8_0.from_bytes(activation_golden["q8_0.weight_raw"])
    y = ops.matmul(jnp.asarray(activation_golden["q8_0.x"]), weight, strict=False, implementation="pallas")
    error = np.abs(np.asarray(y, np.float64) - activation_golden["q8_0.out"])
    assert (error <= 1e-6 * activation_golden["q8_0.abs_sum"]).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_nan_stays_in_its_row(activation_golden, poison):
    weight = Q8_0.from_bytes(activation_golden["q8_0.weight_raw"])
    x = jnp.asarray(activation_golden["q8_0.x"])
    clean = ops.matmul(x, weight, strict=False, implementation="pallas")
    y = ops.matmul(x.at[2, 50].set(poison), weight, strict=False, implementation="pallas")
    assert np.isnan(y[2]).all()
    for row in (0, 1, 3):
        assert_bits_equal(y[row], clean[row])


@functools.partial(jax.jit, static_argnums=(1, 2))
def random_weight(seed: jax.Array, n: int, k: int) -> Q8_0:
    words, scales = jax.random.split(jax.random.key(seed))
    quants = jax.lax.bitcast_convert_type(jax.random.bits(words, (2, n, k // BLOCK, HALF), jnp.uint32), jnp.int32)
    return Q8_0(quants, (jax.random.uniform(scales, (n, k // BLOCK)) * 0.01 + 1e-3).astype(jnp.float16))


@pytest.mark.parametrize("product", FLASH, ids=lambda product: product.key)
def test_each_row_has_the_bits_of_the_row_alone(product):
    weights = [random_weight(jnp.uint32(i), product.groups * n, product.k) for i, n in enumerate(product.sizes)]
    x = jax.random.normal(jax.random.key(9), (8, product.groups * product.k), jnp.float32)

    # Weights are arguments: as constants of the program they would be compiled, and kept, with it.
    @jax.jit
    def call(x: jax.Array, weights: list[Q8_0]) -> list[jax.Array]:
        if product.groups > 1:
            rows = x.reshape(x.shape[0], product.groups, product.k)
            return [ops.grouped_matmul(rows, weights[0], strict=False, implementation="pallas")]
        return ops.matmul_many(x, weights, strict=False, implementation="pallas")

    alone = [
        np.concatenate(parts)
        for parts in zip(*([np.asarray(y) for y in call(x[m : m + 1], weights)] for m in range(8)), strict=True)
    ]
    for rows in (2, 3, 4, 8):
        for y, expected in zip(call(x[:rows], weights), alone, strict=True):
            assert_bits_equal(y, expected[:rows])
        for again, expected in zip(call(x[:rows], weights), alone, strict=True):
            assert_bits_equal(again, expected[:rows])

"""The share-warp kernel in interpret mode: golden products, row invariance, every way to call it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.harness import Op, check_poisoned_row
from numerics import assert_bits_equal

from pallas_kernels import ops
from pallas_kernels.core.limits import MAX_ROWS
from pallas_kernels.formats import BLOCK, Q8_0
from pallas_kernels.linear import activation, meaning
from pallas_kernels.linear.q8_matmul import Tile, q8_matmul

TILES = [Tile(1, 1), Tile(2, 2), Tile(4, 1)]
LENGTHS = [1, 2, 3, 5, 6, 8]
SOME_TILES = [TILES[1], *(pytest.param(tile, marks=pytest.mark.long) for tile in (TILES[0], TILES[2]))]
CHUNKED = [Tile(1, 2), *(pytest.param(tile, marks=pytest.mark.slow) for tile in (Tile(2, 4), Tile(1, 8)))]


def random_weight(seed: int, n: int, k: int) -> Q8_0:
    return Q8_0.quantize(np.random.default_rng(seed).normal(size=(n, k)))


def random_rows(seed: int, m: int, k: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((m, k), np.float32)


matmul = jax.jit(ops.matmul, static_argnames=("strict", "implementation"))
grouped_matmul = jax.jit(ops.grouped_matmul, static_argnames=("strict", "implementation"))


@functools.partial(jax.jit, static_argnames=("tile", "groups"))
def product(x: np.ndarray, weights: list[Q8_0], tile: Tile = TILES[0], groups: int = 1) -> list[jax.Array]:
    return q8_matmul(activation.quantize(x, groups, interpret=True), weights, tile=tile, groups=groups, interpret=True)


def rows_alone(x: np.ndarray, weights: list[Q8_0], **how) -> np.ndarray:
    return np.concatenate([np.asarray(product(x[m : m + 1], weights, **how)[0]) for m in range(x.shape[0])])


@pytest.mark.parametrize("tile", SOME_TILES)
def test_golden_products(activation_golden, tile):
    weight = Q8_0.from_bytes(activation_golden["q8_0.weight_raw"])
    [y] = product(activation_golden["q8_0.x"], [weight], tile=tile)
    error = np.abs(np.asarray(y, np.float64) - activation_golden["q8_0.out"])
    assert (error <= 1e-6 * activation_golden["q8_0.abs_sum"]).all()


def test_golden_products_of_the_jnp_form(activation_golden):
    weight = Q8_0.from_bytes(activation_golden["q8_0.weight_raw"])
    y = matmul(activation_golden["q8_0.x"], weight, strict=False, implementation="xla")
    error = np.abs(np.asarray(y, np.float64) - activation_golden["q8_0.out"])
    assert (error <= 1e-6 * activation_golden["q8_0.abs_sum"]).all()


def test_golden_products_of_float_activations(activation_golden):
    weight = Q8_0.from_bytes(activation_golden["q8_0.weight_raw"])
    # Not jitted, as a caller may have it.
    y = ops.matmul(jnp.asarray(activation_golden["q8_0.x"]), weight, strict=True)
    error = np.abs(np.asarray(y, np.float64) - activation_golden["q8_0.out_f32_activation"])
    assert (error <= 1e-6 * activation_golden["q8_0.abs_sum"]).all()


@pytest.mark.parametrize(
    "blocks", [pytest.param(n, marks=[] if n == 8 else pytest.mark.long if n == 3 else pytest.mark.slow) for n in LENGTHS]
)
def test_each_row_has_the_bits_of_the_row_alone(blocks):
    """Contract 1, with rows of weights that no tile divides, and each M with another tile."""
    weights, x = [random_weight(blocks, 50, blocks * BLOCK)], random_rows(blocks, MAX_ROWS, blocks * BLOCK)
    alone = rows_alone(x, weights)
    tiles = {3: Tile(1, 2)} if blocks == 8 else {1: Tile(4, 2), 2: Tile(2, 1), 4: Tile(4, 1), 8: Tile(1, 1)}
    for m, tile in tiles.items():
        assert_bits_equal(product(x[:m], weights, tile=tile)[0], alone[:m])


@pytest.mark.long
@pytest.mark.parametrize("tile", [Tile(1, 3), *CHUNKED])
def test_bits_do_not_depend_on_how_many_chunks_are_loaded_at_once(tile):
    """Seven chunks of 32 blocks, the last one short: turns of a loop and what remains after them."""
    weights, x = [random_weight(0, 9, 200 * BLOCK)], random_rows(1, 2, 200 * BLOCK)
    assert_bits_equal(product(x, weights, tile=tile)[0], product(x, weights)[0])


@pytest.mark.slow
def test_more_accumulators_than_lanes():
    """Eight rows of activations and of weights are 64 sums: two groups of 32."""
    weights, x = [random_weight(0, 13, 96)], random_rows(1, MAX_ROWS, 96)
    assert_bits_equal(product(x, weights, tile=Tile(8, 1))[0], rows_alone(x, weights))


@pytest.mark.long
def test_more_lanes_of_blocks_than_a_warp_has():
    """40 blocks: the second round of lanes is masked."""
    weight, x = random_weight(0, 24, 40 * BLOCK), random_rows(1, 2, 40 * BLOCK)
    expected = np.asarray(jax.jit(meaning.quantized_dot)(x[:, None], weight))[:, 0]
    np.testing.assert_allclose(product(x, [weight])[0], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.long
def test_grouped():
    groups, n, k = 3, 32, 192
    weight, x = random_weight(3, groups * n, k), random_rows(4, 2, groups * k)
    y, planes = np.asarray(product(x, [weight], groups=groups)[0]), jax.tree.map(np.asarray, weight)
    for group in range(groups):
        rows = slice(group * n, (group + 1) * n)
        part = Q8_0(planes.quants[:, rows], planes.scales[rows])
        assert_bits_equal(y[:, rows], product(x[:, group * k : (group + 1) * k], [part])[0])


@pytest.mark.long
@pytest.mark.parametrize(
    ("m", "tile"), [(2, TILES[0]), pytest.param(2, Tile(4, 1), marks=pytest.mark.slow), (4, Tile(2, 2)), (8, Tile(1, 1))]
)
def test_grouped_rows_have_the_bits_of_the_row_alone(m, tile):
    weight, x = random_weight(3, 3 * 32, 192), random_rows(4, m, 3 * 192)
    assert_bits_equal(product(x, [weight], tile=tile, groups=3)[0], rows_alone(x, [weight], groups=3))


@pytest.mark.long
def test_the_jnp_form_of_a_grouped_product():
    weight, x = random_weight(3, 3 * 32, 192), random_rows(4, 4, 3 * 192).reshape(4, 3, 192)
    expected = np.asarray(grouped_matmul(x, weight, strict=False, implementation="interpret"))
    actual = grouped_matmul(x, weight, strict=False, implementation="xla")
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    strict = np.asarray(grouped_matmul(x, weight, strict=True))
    assert np.abs(strict - expected).mean() < 0.02 * np.abs(expected).std()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(40, 24), pytest.param((7, 50, 1), marks=pytest.mark.long)])
@pytest.mark.parametrize("tile", SOME_TILES)
def test_several_matrices_in_one_launch(sizes, tile):
    weights, x = [random_weight(n, n, 192) for n in sizes], random_rows(5, 2, 192)
    for y, weight in zip(product(x, weights, tile=tile), weights, strict=True):
        assert_bits_equal(y, product(x, [weight], tile=tile)[0])


@pytest.mark.long
@pytest.mark.parametrize("rows", [9, 32, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (1, 5, 8, 12, 20))])
def test_more_rows_are_more_launches(rows):
    weight, x = random_weight(6, 24, 96), random_rows(7, rows, 96)
    y = matmul(x, weight, strict=False, implementation="interpret")
    assert_bits_equal(y, rows_alone(x, [weight]))


@pytest.mark.long
def test_a_nan_stays_in_its_row():
    weight, x = random_weight(8, 24, 96), random_rows(9, 4, 96)
    poisoned = x.copy()
    poisoned[2, 50] = np.nan
    op = Op("product", lambda x, weights, interpret: product(x, weights), rows=(0,))
    check_poisoned_row(op, (x, [weight]), (poisoned, [weight]), 2)


@pytest.mark.parametrize(
    "blocks", [pytest.param(n, marks={3: [], 8: pytest.mark.long}.get(n, pytest.mark.slow)) for n in LENGTHS]
)
def test_the_jnp_form_is_row_invariant_too(blocks):
    weight, x = random_weight(blocks, 50, blocks * BLOCK), random_rows(blocks, MAX_ROWS, blocks * BLOCK)
    whole = np.asarray(matmul(x, weight, strict=False, implementation="xla"))
    for m in range(MAX_ROWS):
        assert_bits_equal(matmul(x[m : m + 1], weight, strict=False, implementation="xla"), whole[m : m + 1])

"""Products on the tensor cores: the bits of the share-warp kernel, the gate, and lowering for CUDA."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import kernel_calls, lowered_for_cuda, pallas_calls
from numerics import assert_bits_equal

from pallas_kernels import ops
from pallas_kernels.core import tiles
from pallas_kernels.core.limits import STEP_ROWS
from pallas_kernels.core.tiles import tile_for
from pallas_kernels.formats import BLOCK, HALF, Q8_0
from pallas_kernels.linear import q8_matmul, q8_mma
from pallas_kernels.linear.activation import Activation
from pallas_kernels.linear.q8_matmul import Tile
from pallas_kernels.linear.q8_mma import MmaTile, q8_product
from pallas_kernels.tuning import tune
from pallas_kernels.tuning.shapes import FLASH

product = jax.jit(q8_product, static_argnames=("tile", "groups", "interpret"))
interpreted = functools.partial(product, interpret=True)
in_eights = Tile(1, 1)


def operands(seed: int, m: int, sizes: tuple[int, ...], k: int, groups: int = 1) -> tuple[Activation, list[Q8_0]]:
    """Random int8 blocks, and scales of two bits whose products with an integer sum are exact.

    So a multiply-add has the same result with one rounding as with two, which a compiler for CPUs mixes, but the order of the
    sums shows.
    """
    rng, blocks = np.random.default_rng(seed), k // BLOCK

    def words(*shape: int) -> jax.Array:
        return jnp.asarray(rng.integers(-(2**31), 2**31, shape), jnp.int32)

    def scales(*shape: int) -> np.ndarray:
        return rng.choice([1.0, 1.5], shape) * 2.0 ** rng.integers(-6, 3, shape)

    weights = [Q8_0(words(2, groups * n, blocks, HALF), jnp.asarray(scales(groups * n, blocks), jnp.float16)) for n in sizes]
    return Activation(words(m, groups, 2, blocks, HALF), jnp.asarray(scales(m, groups, blocks), jnp.float32)), weights


def eight_at_a_time(x: Activation, weights: list[Q8_0], run=interpreted, **how) -> list[np.ndarray]:
    """The share-warp kernel's results."""
    parts = [
        run(jax.tree.map(lambda array: array[first : first + 8], x), weights, tile=in_eights, **how)  # noqa: B023
        for first in range(0, x.scales.shape[0], 8)
    ]
    return [np.concatenate(own) for own in zip(*parts, strict=True)]


CASES = [
    pytest.param(9, (17,), 1024, 1, MmaTile(8, 8, 1)),
    pytest.param(5, (16,), 2048, 1, MmaTile(8, 8, 2), marks=pytest.mark.long),
    pytest.param(1, (21, 3), 1024, 1, MmaTile(8, 4, 1), marks=pytest.mark.long),
    pytest.param(9, (17,), 2048, 1, MmaTile(4, 4, 3), marks=pytest.mark.long),
    pytest.param(10, (20,), 1024, 3, MmaTile(8, 8, 2), marks=pytest.mark.long),
    pytest.param(40, (16,), 1024, 1, MmaTile(8, 8, 1), marks=pytest.mark.long),
    pytest.param(16, (40,), 1024, 1, MmaTile(1, 1, 2), marks=pytest.mark.slow),
    pytest.param(17, (33,), 1024, 2, MmaTile(4, 2, 2), marks=pytest.mark.slow),
    pytest.param(32, (16,), 2048, 1, MmaTile(8, 8, 2), marks=pytest.mark.slow),
    pytest.param(9, (37,), 4096, 1, MmaTile(8, 8, 4), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("m", "sizes", "k", "groups", "tile"), CASES)
def test_the_bits_of_the_share_warp_kernel(m, sizes, k, groups, tile):
    x, weights = operands(m, m, sizes, k, groups)
    for y, expected in zip(
        interpreted(x, weights, tile=tile, groups=groups), eight_at_a_time(x, weights, groups=groups), strict=True
    ):
        assert_bits_equal(y, expected)


def test_the_gate_has_a_reason():
    assert q8_mma.why_not(4096) is None
    assert q8_mma.why_not(4096 + 32) == "K is not a multiple of 1024"


@pytest.mark.parametrize("product", FLASH, ids=lambda product: product.key)
def test_the_default_tile_has_warps_of_a_few_steps(product):
    tile = MmaTile.of(product.groups * sum(product.sizes), product.k, 16)
    assert tile.warps % tile.split == 0
    assert tile.split in (2, 4, 8)
    assert product.k // BLOCK // q8_mma.STEP // tile.split <= q8_mma.STEPS


EVERY = [
    pytest.param(product, m, id=f"{product.key}-{m}", marks=[] if (product, m) == (FLASH[0], 9) else pytest.mark.long)
    for product in FLASH
    for m in (9, 16, 32)
]


@pytest.mark.parametrize(("shape", "m"), EVERY)
def test_lowers_for_cuda(shape, m):
    blocks = shape.k // BLOCK
    words = jax.ShapeDtypeStruct((m, shape.groups, 2, blocks, HALF), jnp.int32)
    x = Activation(words, jax.ShapeDtypeStruct((m, shape.groups, blocks), jnp.float32))
    heights = [shape.groups * n for n in shape.sizes]
    weights = [
        Q8_0(jax.ShapeDtypeStruct((2, n, blocks, HALF), jnp.int32), jax.ShapeDtypeStruct((n, blocks), jnp.float16))
        for n in heights
    ]
    tile = MmaTile.of(sum(heights), shape.k, m)
    text = lowered_for_cuda(jax.jit(functools.partial(q8_product, tile=tile, groups=shape.groups)), x, weights)
    assert kernel_calls(text, q8_mma.NAME) == len(weights)
    assert pallas_calls(text) == 1


@pytest.mark.parametrize(("rows", "k", "expected"), [(4, 1024, 0), (12, 1024, 1), (12, 1056, 0)])
def test_the_table_chooses_the_kernel_for_a_number_of_rows(monkeypatch, rows, k, expected):
    tile = {"warps": 4, "split": 2, "ahead": 1}
    device = jax.devices()[0].device_kind
    monkeypatch.setattr(tiles, "_shipped", lambda: {device: {f"48x{k}": {"8": [1, 1, 0], "16": tile}}})
    weight = Q8_0(jax.ShapeDtypeStruct((2, 48, k // BLOCK, HALF), jnp.int32), jax.ShapeDtypeStruct((48, k // BLOCK), jnp.float16))
    words = jax.ShapeDtypeStruct((rows, 1, 2, k // BLOCK, HALF), jnp.int32)
    x = Activation(words, jax.ShapeDtypeStruct((rows, 1, k // BLOCK), jnp.float32))
    text = lowered_for_cuda(jax.jit(lambda x, weight: ops.quantized_products(x, [weight])), x, weight)
    assert (kernel_calls(text, q8_mma.NAME), kernel_calls(text, q8_matmul.NAME)) == (expected, 1 - expected)


@pytest.mark.gpu
def test_values_on_a_gpu():
    x, [weight] = operands(1, 24, (264,), 4096)
    [y] = product(x, [weight], tile=MmaTile.of(264, 4096, 24))
    [expected] = interpreted(x, [weight], tile=MmaTile.of(264, 4096, 24))
    assert_bits_equal(y, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", FLASH, ids=lambda shape: shape.key)
def test_each_row_has_the_bits_of_the_share_warp_kernel_on_a_gpu(shape):
    """Rows at random, with the kernel and the tile that a model has for so many, and on the tensor cores in any case."""
    data = tune.Data(shape, sets=1)
    [weights], kind = data.weights, jax.devices()[0].device_kind
    expected = eight_at_a_time(data.rows(STEP_ROWS), weights, run=product, groups=shape.groups)
    for m in (5, 8, 9, 16, 31, 32, STEP_ROWS):
        tile = tile_for(shape.sizes, shape.k, shape.groups, m, kind)
        for way in {tile, MmaTile.of(shape.groups * sum(shape.sizes), shape.k, m)}:
            for y, whole in zip(product(data.rows(m), weights, tile=way, groups=shape.groups), expected, strict=True):
                assert_bits_equal(y, whole[:m])


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [MmaTile(1, 1, 2), MmaTile(4, 2, 1), MmaTile(8, 4, 4), MmaTile(8, 8, 2)], ids=str)
def test_bits_do_not_depend_on_the_tile_on_a_gpu(tile):
    x, weights = operands(0, 19, (1000, 24), 2048)
    expected = eight_at_a_time(x, weights, run=product)
    for y, whole in zip(product(x, weights, tile=tile), expected, strict=True):
        assert_bits_equal(y, whole)

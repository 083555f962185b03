"""Dense products of any lane format: numbers, rows that do not depend on each other, every path of `ops`, lowering."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.harness import Op, check_lowers, check_meaning, check_poisoned_row, check_rows
from numerics import assert_bits_equal
from quantized import abstract, as_float, layouts, random_blocks

from pallas_kernels import ops
from pallas_kernels.core.dispatch import DECODE_ROWS
from pallas_kernels.formats import BLOCK, FORMATS, IQ2_XXS, MXFP4, Q2_K, Q4_K, Q8_0, Quantized
from pallas_kernels.linear import activation_k, meaning
from pallas_kernels.linear.lane_formats import LANE_FORMATS
from pallas_kernels.linear.lane_matmul import NAME, lane_matmul
from pallas_kernels.linear.lane_row import quantize_for
from pallas_kernels.linear.q8_matmul import NAME as SHARE_WARP


def formats(all_of: Iterable[type[Quantized]], *always: type[Quantized]) -> pytest.MarkDecorator:
    """Formats whose tests differ in the format alone. Lanes of every format are also tested as those of experts."""
    values = [pytest.param(one, marks=() if one in always else pytest.mark.slow, id=one.__name__) for one in all_of]
    return pytest.mark.parametrize("format", values)


some_formats = formats(map(FORMATS.get, layouts()), Q4_K, MXFP4)
lane_formats = formats(LANE_FORMATS, Q4_K)


@functools.cache
def weight(format: type[Quantized], n: int = 24, k: int = 512, seed: int = 0) -> Quantized:
    return format.from_bytes(random_blocks(format, (n, k), seed, least=-2))


def normal(m: int, k: int = 512, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((m, k), np.float32)


@functools.partial(jax.jit, static_argnames=("groups", "tile", "interpret"))
def product(x: jax.Array, w: Quantized, groups: int = 1, tile: int | None = None, *, interpret: bool = True) -> jax.Array:
    quants = quantize_for(x, type(w), groups, interpret=interpret)
    return lane_matmul(quants, w, groups=groups, tile=tile, interpret=interpret)


@jax.jit
def expected(x: jax.Array, w: Quantized) -> jax.Array:
    return meaning.quantized_dot(x[:, None], w)[:, 0]


# Integers are the same; what differs is the order of the float32 sums.
OP = Op("lane_matmul", product, expected, rows=(0,), tolerance=1e-5)
JNP = Op("quantized_dot", lambda x, w, interpret: expected(x, w), rows=(0,))
quantize, quantize_k = jax.jit(meaning.quantize), jax.jit(meaning.quantize_k)
matmul = jax.jit(ops.matmul, static_argnames=("strict", "implementation"))


def in_float64(x: np.ndarray, w: Quantized) -> np.ndarray:
    """Products of the dequantised weights with the activations as they are rounded, in float64."""
    quants, scales = (quantize if w.BLOCK == BLOCK else quantize_k)(x)
    rounded = (np.asarray(quants, np.float64) * np.asarray(scales, np.float64)[..., None]).reshape(x.shape)
    return rounded @ np.asarray(as_float(w), np.float64).T


@some_formats
def test_the_meaning_in_float64(format):
    op, operands = dataclasses.replace(JNP, meaning=in_float64, tolerance=3e-6), (normal(4), weight(format))
    check_meaning(op, operands)
    check_rows(op, operands, (4,))


@some_formats
@pytest.mark.parametrize("rows", [3, pytest.param(DECODE_ROWS + 8, marks=pytest.mark.long)])
def test_strict_is_the_product_of_the_dequantised_weight(format, rows):
    w, x = weight(format), normal(rows)
    assert_bits_equal(matmul(x, w, strict=True), matmul(x, as_float(w), strict=True))


@pytest.mark.parametrize("format", [Q4_K, pytest.param(IQ2_XXS, marks=pytest.mark.long)])
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_large_weight_is_dequantised_in_tiles(monkeypatch, format, strict):
    monkeypatch.setattr(ops, "MAX_TILE_VALUES", 512 * 6)
    w, x = weight(format), normal(DECODE_ROWS + 8)
    # Jitted here, since the bound is read while tracing.
    tiled = jax.jit(lambda x, w: ops.matmul(x, w, strict=strict))(x, w)
    exact = x.astype(np.float64) @ np.asarray(as_float(w), np.float64).T
    np.testing.assert_allclose(tiled, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


@lane_formats
def test_the_kernel_equals_its_meaning_and_its_rows_are_independent(format):
    operands = normal(3), weight(format)
    check_meaning(OP, operands)
    check_rows(OP, operands, (3,))


@pytest.mark.slow
@pytest.mark.parametrize("format", [Q4_K, MXFP4])
def test_odd_ends(format):
    """Eight rows, a last program that has a single row of the weight, and a second round of lanes that is masked."""
    width = LANE_FORMATS[format].width
    operands = normal(8, 48 * width), weight(format, 23, 48 * width)
    op = dataclasses.replace(OP, kernel=functools.partial(product, tile=2))
    check_meaning(op, operands)
    assert_bits_equal(product(*operands, tile=1), product(*operands, tile=2))


@pytest.mark.parametrize("format", [pytest.param(Q4_K, marks=pytest.mark.long), pytest.param(MXFP4, marks=pytest.mark.slow)])
def test_groups_are_products_of_their_own(format):
    groups, n, k = 2, 5, 512
    w, x = weight(format, groups * n, k), normal(2, groups * k)
    made = np.asarray(product(x, w, groups, 2)).reshape(2, groups, n)
    for group in range(groups):
        part = w.take(np.arange(group * n, (group + 1) * n))
        assert_bits_equal(np.array(made[:, group]), product(x[:, group * k : (group + 1) * k], part))


@pytest.mark.slow
@pytest.mark.parametrize("format", [Q2_K, MXFP4])
def test_a_nan_stays_in_its_row(format):
    x, w = normal(2), weight(format)
    poisoned = x.copy()
    poisoned[1] = np.nan
    check_poisoned_row(OP, (x, w), (poisoned, w), 1)


@pytest.mark.slow
def test_more_rows_are_more_launches():
    w, x = weight(Q4_K), normal(11)
    y = np.asarray(matmul(x, w, strict=False, implementation="interpret"))
    assert_bits_equal(y[:8], product(x[:8], w))
    assert_bits_equal(y[8:], product(x[8:], w))


def test_weights_of_several_formats():
    """Each has the product that it has alone."""
    weights, x = [weight(Q4_K), weight(MXFP4), as_float(weight(Q4_K))], normal(4)
    found = jax.jit(functools.partial(ops.matmul_many, strict=False))(x, weights)
    wanted = *(expected(x, w) for w in weights[:2]), x @ np.asarray(weights[2]).T
    for y, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(y, want, rtol=0, atol=3e-6 * np.abs(want).max())


FLASH = {"head": (129280, 4096), "q_a": (1024, 4096), "q_b": (32768, 1024), "o_a": (8192, 4096), "shared": (4096, 2048)}
TWO = {"head", "shared"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in TWO else pytest.mark.slow) for name in FLASH])
@pytest.mark.parametrize("format", [pytest.param(one, marks=[] if one is Q4_K else pytest.mark.long) for one in LANE_FORMATS])
def test_v4_flash_lowers(format, name):
    groups = 8 if name == "o_a" else 1
    x = jax.ShapeDtypeStruct((3, groups, FLASH[name][1]), jnp.float32)
    call = jax.jit(functools.partial(ops.grouped_matmul, strict=False))
    kernel = SHARE_WARP if format is Q8_0 else NAME
    quantised = "q8_activation" if format.BLOCK == BLOCK else activation_k.NAME
    check_lowers(call, (x, abstract(format, *FLASH[name])), {kernel: 1, quantised: 1})


@pytest.mark.long
def test_two_formats_of_one_input_lower():
    x, weights = jax.ShapeDtypeStruct((3, 4096), jnp.float32), [abstract(Q4_K, 2048, 4096)] * 2
    call = jax.jit(functools.partial(ops.matmul_many, strict=False))
    check_lowers(call, (x, weights), {f"{NAME}_q4_k": 2, activation_k.NAME: 1})
    check_lowers(call, (x, [*weights[:1], abstract(Q8_0, 2048, 4096)]), {NAME: 1, SHARE_WARP: 1})


@pytest.mark.gpu
@pytest.mark.parametrize("format", LANE_FORMATS)
@pytest.mark.parametrize("shape", [(1024, 4096), (4096, 2048), (32768, 1024)], ids=str)
def test_on_the_gpu(format, shape):
    operands = normal(8, shape[1]), weight(format, *shape)
    check_meaning(OP, operands, interpret=False)
    check_rows(OP, operands, (1, 2, 3, 8), interpret=False)

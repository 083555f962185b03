"""FP8 and FP4 rounding, in and outside a kernel body: the bits of the types' own conversions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cuda import kernel_calls, lowered_for_cuda
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from numerics import assert_bits_equal

from pallas_kernels.core import rounding

Rounding = Callable[[jax.Array], jax.Array]
FORMATS = pytest.mark.parametrize(
    ("rounded", "block", "form"),
    [
        (rounding.fp8, rounding.FP8_BLOCK, (ml_dtypes.float8_e4m3fn, 1e-4, 448.0)),
        (rounding.fp4, rounding.FP4_BLOCK, (ml_dtypes.float4_e2m1fn, 6 * 2.0**-120, 6.0)),
    ],
    ids=["fp8", "fp4"],
)
Form = tuple[type, float, float]


def by_conversion(x: np.ndarray, form: Form) -> np.ndarray:
    """Values over their block's scale, cast to the type and back; the scale is the smallest power of two that fits them in."""
    dtype, floor, limit = form
    amax = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(floor)).astype(np.float64)
    mantissa, exponent = np.frexp(amax / limit)
    scale = np.ldexp(1.0, exponent - (mantissa == 0.5))
    return np.float32((x / scale).astype(np.float32).astype(dtype).astype(np.float64) * scale)


def spread(shape: tuple[int, ...]) -> np.ndarray:
    """Values of both signs over sixty binades, with zeros of both signs."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape) * 2.0 ** rng.integers(-30, 30, (*shape[:-1], 1)) * 2.0 ** rng.integers(-12, 1, shape)
    x[..., 3] *= 0
    return x.astype(np.float32)


def in_a_kernel(function: Rounding, x: Any, *, interpret: bool) -> jax.Array:
    def kernel(x_ref: Any, out_ref: Any) -> None:
        out_ref[...] = function(x_ref[...])

    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="rounding",
    )
    return call(x)


@FORMATS
def test_bits(rounded: Rounding, block: int, form: Form) -> None:
    x = spread((64, 8, block))
    expected = by_conversion(x, form)
    assert_bits_equal(jax.jit(rounded)(x), expected)
    assert_bits_equal(rounded(jnp.asarray(x)), expected)


@FORMATS
def test_bits_in_a_kernel(rounded: Rounding, block: int, form: Form) -> None:
    x = spread((32, block))
    assert_bits_equal(jax.jit(functools.partial(in_a_kernel, rounded, interpret=True))(x), by_conversion(x, form))


@FORMATS
@given(values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=32, max_size=32))
def test_bits_for_anything_finite(rounded: Rounding, block: int, form: Form, values: list[float]) -> None:
    x = np.tile(np.float32(values), block // 32)
    assert_bits_equal(jax.jit(rounded)(x), by_conversion(x, form))


@FORMATS
def test_every_step_and_every_tie(rounded: Rounding, block: int, form: Form) -> None:
    """The block's largest value is the format's; the others lie on each step and half-way between two."""
    largest = 448.0 if block == rounding.FP8_BLOCK else 6.0
    values = np.arange(0, 2 * largest * 1024, dtype=np.float64)[: 4096 * (block - 1)] / 1024
    x = np.zeros((values.size // (block - 1), block), np.float32)
    x[:, 1:] = np.minimum(values[: x.shape[0] * (block - 1)], largest).reshape(x.shape[0], -1)
    x[:, 0] = largest
    out = np.asarray(jax.jit(rounded)(x))
    assert_bits_equal(out, by_conversion(x, form))
    assert (out[:, 0] == largest).all()


@FORMATS
def test_a_nan_stays_one(rounded: Rounding, block: int, form: Form) -> None:
    x = spread((4, block))
    x[1:3, 5] = np.nan, np.inf
    out = np.asarray(jax.jit(rounded)(x))
    assert np.isnan(out[1, 5])
    assert not np.isfinite(out[2, 5])
    assert_bits_equal(out[::3], by_conversion(x[::3], form))


@FORMATS
def test_lowers_for_cuda(rounded: Rounding, block: int, form: Form) -> None:
    x = jax.ShapeDtypeStruct((32, block), jnp.float32)
    assert kernel_calls(lowered_for_cuda(jax.jit(functools.partial(in_a_kernel, rounded, interpret=False)), x), "rounding") == 1


@pytest.mark.gpu
@FORMATS
def test_bits_on_a_gpu(rounded: Rounding, block: int, form: Form) -> None:
    x = spread((32, block))
    assert_bits_equal(in_a_kernel(rounded, jnp.asarray(x), interpret=False), by_conversion(x, form))

"""Storage types of published checkpoints: exact against the golden bytes, against ml_dtypes, and against the definition."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_bits_equal, component

from ds4jax.loading import hub_values
from pallas_kernels.formats.mxfp4 import E2M1

ALL_CODES = np.arange(256, dtype=np.uint8)


def test_golden_fp8():
    golden = component("ckpt")
    values = hub_values.from_fp8(golden["fp8_weight_bytes"], golden["fp8_scale_bytes"])
    assert_bits_equal(values, golden["fp8_dequant"])


def test_golden_fp4():
    golden = component("ckpt")
    values = hub_values.from_fp4(golden["fp4_weight_bytes"].view(np.uint8), golden["fp4_scale_bytes"])
    # The reference's table spells code 8 as 0 where the specification says -0.
    np.testing.assert_array_equal(values, golden["fp4_dequant"])
    assert values.dtype == np.float32


def test_every_code():
    powers = 2.0 ** (np.arange(255) - 127.0)
    np.testing.assert_array_equal(hub_values.POWERS[:255].astype(np.float64), powers)
    assert np.isnan(hub_values.POWERS[255])
    np.testing.assert_array_equal(hub_values.POWERS, ALL_CODES.view(jnp.float8_e8m0fnu).astype(np.float32))
    np.testing.assert_array_equal(E2M1, ALL_CODES[:16].view(jnp.float4_e2m1fn).astype(np.float32))
    low, high = hub_values.E2M1_PAIRS[0x2D]
    assert (low, high) == (-3, 1)


def test_every_bfloat16():
    bits = np.arange(2**16, dtype=np.uint16)
    np.testing.assert_array_equal(hub_values.from_bf16(bits), bits.view(jnp.bfloat16).astype(np.float32))


def e4m3(code: int) -> float:
    """One E4M3 code: sign, four exponent bits of bias 7, three mantissa bits; no infinity, NaN at the top."""
    sign, exponent, mantissa = -1 if code & 0x80 else 1, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


def test_every_e4m3_code():
    np.testing.assert_array_equal(hub_values.E4M3, [e4m3(int(code)) for code in ALL_CODES])


@given(rows=st.integers(1, 300), columns=st.integers(1, 300), seed=st.integers(0, 2**32 - 1))
def test_fp8_blocks(rows, columns, seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (rows, columns), np.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    scales = rng.integers(0, 240, hub_values.fp8_scale_shape((rows, columns)), np.uint8)
    values = hub_values.from_fp8(codes, scales)
    assert values.dtype == np.float32
    for row, column in rng.integers(0, (rows, columns), (20, 2)):
        exact = e4m3(int(codes[row, column])) * 2.0 ** (int(scales[row // 128, column // 128]) - 127)
        assert values[row, column] == exact
    # Exact in bfloat16 too, wherever its exponents reach.
    assert_bits_equal(values.astype(jnp.bfloat16).astype(np.float32)[np.abs(values) > 2**-120], values[np.abs(values) > 2**-120])


@given(rows=st.integers(1, 9), groups=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_fp4_groups(rows, groups, seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (rows, groups * 16), np.uint8)
    scales = rng.integers(0, 253, (rows, groups), np.uint8)
    values = hub_values.from_fp4(codes, scales)
    assert values.shape == (rows, groups * 32)
    magnitudes = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    for row, column in rng.integers(0, values.shape, (20, 2)):
        code = int(codes[row, column // 2]) >> 4 * (column % 2) & 15
        exact = (-1 if code & 8 else 1) * magnitudes[code & 7] * 2.0 ** (int(scales[row, column // 32]) - 127)
        assert values[row, column] == exact


@pytest.mark.parametrize(
    ("shape", "expected"), [((128, 128), (1, 1)), ((129, 128), (2, 1)), ((1, 257), (1, 3)), ((8192, 4096), (64, 32))]
)
def test_fp8_scale_shape(shape, expected):
    assert hub_values.fp8_scale_shape(shape) == expected

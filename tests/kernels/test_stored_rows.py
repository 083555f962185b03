"""Codes of rounded rows and keys: what is read back has the bits of what was written."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_bits_equal, component

from pallas_kernels.attention.stored_rows import fp4_values, fp8_values, narrow_keys, narrow_rows, widen
from pallas_kernels.core import rounding

ROPE = 8


@jax.jit
def rows_there_and_back(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    rounded = jnp.concatenate([rounding.fp8_rows(x[..., :-ROPE]), x[..., -ROPE:]], axis=-1)
    return rounded, widen(narrow_rows(rounded, ROPE))


@jax.jit
def keys_there_and_back(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    rounded = rounding.fp4_rows(x)
    return rounded, widen(narrow_keys(rounded))


@given(st.integers(0, 1 << 30), st.integers(-130, 125), st.integers(0, 40))
def test_rounded_values_come_back_with_their_bits(seed: int, exponent: int, spread: int) -> None:
    """Values far apart and near the codes' middles, blocks of zeros of both signs, magnitudes below any scale."""
    random = np.random.default_rng(seed)
    x = np.ldexp(random.choice([-1.0, 1.0], (4, 128 + ROPE)) * random.integers(1, 256, (4, 128 + ROPE)) / 256, exponent)
    x = np.float32(np.ldexp(x, -random.integers(0, spread + 1, x.shape)))
    x[0, :64], x[1, :32] = 0.0, -0.0
    for rounded, back in (rows_there_and_back(x), keys_there_and_back(x[:, :128])):
        assert np.isfinite(rounded).all()
        assert_bits_equal(back, rounded)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_block_that_is_not_finite_stays_so(wrong: float) -> None:
    x = np.random.default_rng(1).normal(size=(2, 128 + ROPE)).astype(np.float32)
    x[0, 70] = wrong
    (rounded, rows), (_, keys) = rows_there_and_back(x), keys_there_and_back(x[:, :128])
    assert not np.isfinite(rounded[0, 70])
    assert np.isnan(rows[0, 64:128]).all()
    assert np.isnan(keys[0, 64:96]).all()
    assert np.isfinite(rows[0, :64]).all()
    assert np.isfinite(keys[0, 96:]).all()
    assert_bits_equal(rows[1], rounded[1])


def test_the_golden_rounded_arrays_come_back() -> None:
    """Compressed rows of both ratios and indexer keys."""
    for ratio in (4, 16):
        rows = component(f"comp_r{ratio}")["out_qat"]
        assert_bits_equal(jax.jit(lambda rows: widen(narrow_rows(rows, 32)))(rows), rows)
    keys = component("indexer")["compressed_k_qat"]
    assert_bits_equal(jax.jit(lambda keys: widen(narrow_keys(keys)))(keys), keys)


def test_codes_are_those_of_the_formats() -> None:
    """Every E4M3 code but the two of NaN, and every E2M1 code."""
    codes = np.setdiff1d(np.arange(256), [0x7F, 0xFF]).astype(np.uint8)
    assert_bits_equal(fp8_values(jnp.asarray(codes)), codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    codes = np.arange(16, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert_bits_equal(fp4_values(jnp.asarray(codes, jnp.int32)).astype(jnp.float32), expected)

"""Activation quantisation: the kernel's body, its jnp twin, and the golden integers and scales."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_bits_equal

from pallas_kernels.formats import BLOCK
from pallas_kernels.linear import activation, meaning


def kernel(x: jax.Array, groups: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The kernel in interpret mode, its words put back in order: int8 [M, C, K/32, 32] and scales [M, C, K/32]."""
    result = activation.quantize(x, groups, interpret=True)
    words = np.ascontiguousarray(np.moveaxis(np.asarray(result.quants), 2, 3))
    return words.reshape(*words.shape[:3], 8).view(np.int8), np.asarray(result.scales)


def test_golden(activation_golden):
    x = jnp.asarray(activation_golden["q8_0.x"])
    quants, scales = kernel(x)
    np.testing.assert_array_equal(quants.reshape(x.shape), activation_golden["q8_0.xq"])
    assert_bits_equal(scales[:, 0], activation_golden["q8_0.xscale"])


def test_golden_of_the_jnp_twin(activation_golden):
    quants, scales = jax.jit(meaning.quantize)(jnp.asarray(activation_golden["q8_0.x"]))
    np.testing.assert_array_equal(np.asarray(quants).reshape(4, -1), activation_golden["q8_0.xq"])
    assert_bits_equal(scales, activation_golden["q8_0.xscale"])


def test_the_scale_is_correctly_rounded():
    """XLA's product with 1/127 would miss the last bit of some of these."""
    amax = np.random.default_rng(0).uniform(0.01, 100, 4096).astype(np.float32)
    x = np.zeros((1, amax.size * BLOCK), np.float32)
    x[0, ::BLOCK] = amax
    _, scales = jax.jit(meaning.quantize)(jnp.asarray(x))
    assert_bits_equal(scales[0], amax / np.float32(127))
    assert (amax * np.float32(1 / 127) != amax / np.float32(127)).any()


@pytest.mark.parametrize("blocks", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3, 5, 6, 8)), 40])
@pytest.mark.parametrize("groups", [1, 3])
def test_kernel_equals_twin_at_every_length(blocks, groups):
    x = np.random.default_rng(blocks).standard_normal((3, groups * blocks * BLOCK), np.float32) * 5
    quants, scales = kernel(jnp.asarray(x), groups)
    twin_quants, twin_scales = jax.jit(meaning.quantize)(x.reshape(3, groups, -1))
    assert_bits_equal(quants, np.asarray(twin_quants))
    assert_bits_equal(scales, twin_scales)


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=BLOCK, max_size=BLOCK))
def test_by_definition(values):
    """Half to even on x · (1/d), d = amax / 127, for anything finite."""
    x = np.float32(values)
    with np.errstate(over="ignore", divide="ignore", under="ignore", invalid="ignore"):
        d = np.abs(x).max() / np.float32(127)
        inverse = np.float32(0) if d == 0 else np.float32(1) / d
        if not np.isfinite(inverse) or 0 < d < np.finfo(np.float32).tiny:
            return
        expected = np.clip(np.round(x * inverse), -128, 127).astype(np.int8)
    quants, scales = kernel(jnp.asarray(x[None]))
    np.testing.assert_array_equal(quants[0, 0, 0], expected)
    assert scales[0, 0, 0] == d


@pytest.mark.parametrize("poison", [np.nan, *(pytest.param(x, marks=pytest.mark.long) for x in (np.inf, -np.inf))])
def test_a_nan_or_infinity_stays_in_its_block(poison):
    x = np.random.default_rng(0).normal(size=(3, 4 * BLOCK)).astype(np.float32)
    clean_quants, clean_scales = kernel(jnp.asarray(x))
    x[1, BLOCK + 7] = poison
    quants, scales = kernel(jnp.asarray(x))
    assert not np.isfinite(scales[1, 0, 1])
    others = np.ones((3, 1, 4), bool)
    others[1, 0, 1] = False
    assert_bits_equal(scales[others], clean_scales[others])
    assert_bits_equal(quants[others], clean_quants[others])

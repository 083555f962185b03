"""Products of quantised weights with quantised activations: golden arrays, and rows that do not depend on each other."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from numerics import arrays, assert_bits_equal
from quantized import as_float, random_blocks

from pallas_kernels.formats import FORMATS, MXFP4, Quantized, Terms
from pallas_kernels.linear import meaning

GOLDEN = "gguf/activation_quant"
K_FORMATS = ["IQ2_XXS", "Q2_K", "Q4_K"]
SUM_LIMIT = 1e-6


quantize_k = jax.jit(meaning.quantize_k)
expert_dot = jax.jit(meaning.expert_dot)


@functools.cache
def weight(name: str) -> Quantized:
    return FORMATS[name].from_bytes(arrays(GOLDEN)[f"{name.lower()}.weight_raw"])


@jax.jit
def product(x: jax.Array, w: Quantized) -> jax.Array:
    """Every row with the same matrix: [M, K] and [N, K] → [M, N]."""
    return meaning.expert_dot(x, jax.tree.map(lambda plane: plane[None], w))


def test_q8_k_activations() -> None:
    golden = arrays(GOLDEN)
    quants, scales = quantize_k(golden["q8_k.x"])
    np.testing.assert_array_equal(np.asarray(quants).reshape(golden["q8_k.q"].shape), golden["q8_k.q"])
    assert_bits_equal(scales, golden["q8_k.d"])
    sums = np.asarray(quants).reshape(*golden["q8_k.bsums"].shape, 16).sum(-1, dtype=np.int16)
    np.testing.assert_array_equal(sums, golden["q8_k.bsums"])


def test_the_first_of_two_largest_gives_the_sign() -> None:
    x = np.zeros((2, 256), np.float32)
    x[0, [3, 9]], x[1, [3, 9]] = (2.0, -2.0), (-2.0, 2.0)
    quants, scales = quantize_k(x)
    assert np.asarray(quants)[:, 0, [3, 9]].tolist() == [[-127, 127], [-127, 127]]
    assert np.sign(np.asarray(scales)).tolist() == [[-1], [1]]


@pytest.mark.parametrize("name", K_FORMATS)
def test_golden_integers(name: str) -> None:
    golden, key = arrays(GOLDEN), name.lower()
    terms = Terms(**jax.jit(lambda w: vars(w.terms()))(weight(name)))
    groups = terms.values.shape[-2:]
    x = golden["q8_k.q"].reshape(4, 1, -1, *groups).astype(np.int32)
    dots = (x * np.asarray(terms.values, np.int32)).sum(-1)
    np.testing.assert_array_equal((dots * np.asarray(terms.factor)).sum(-1), golden[f"{key}.block_isum"])
    if terms.offset is not None:
        np.testing.assert_array_equal((x.sum(-1) * np.asarray(terms.offset)).sum(-1), golden[f"{key}.block_minsum"])
    assert_bits_equal(np.asarray(as_float(weight(name)))[:4], golden[f"{key}.dequant"])


@pytest.mark.parametrize("name", ["Q8_0", *K_FORMATS])
def test_golden_products(name: str) -> None:
    golden, key = arrays(GOLDEN), name.lower()
    y = product(golden["q8_0.x" if name == "Q8_0" else "q8_k.x"], weight(name))
    error = np.abs(np.asarray(y, np.float64) - golden[f"{key}.out"])
    assert (error <= SUM_LIMIT * golden[f"{key}.abs_sum"]).all()


def test_mxfp4_products() -> None:
    """No golden array has them: the same sums in float64 from the quantised activations."""
    w = MXFP4.from_bytes(random_blocks(MXFP4, (24, 256)))
    x = np.random.default_rng(0).standard_normal((4, 256), np.float32)
    quants, scales = jax.jit(meaning.quantize)(x)
    rounded = (np.asarray(quants, np.float64) * np.asarray(scales, np.float64)[..., None]).reshape(4, -1)
    values = np.asarray(as_float(w), np.float64)
    error = np.abs(np.asarray(product(x, w), np.float64) - rounded @ values.T)
    assert (error <= SUM_LIMIT * (np.abs(rounded) @ np.abs(values).T)).all()


@pytest.mark.parametrize("name", ["Q8_0", *(pytest.param(name, marks=pytest.mark.long) for name in (*K_FORMATS, "MXFP4"))])
def test_rows_do_not_depend_on_each_other(name: str) -> None:
    """Contract 1: matrices of their own for each row, as the experts of a step have."""
    w = jax.tree.map(np.asarray, FORMATS[name].from_bytes(random_blocks(FORMATS[name], (6, 40, 512))))
    x = np.random.default_rng(1).standard_normal((6, 512), np.float32)
    alone = np.concatenate([np.asarray(expert_dot(x[i : i + 1], w.take(np.arange(i, i + 1)))) for i in range(6)])
    for rows in (2, 3, 6):
        assert_bits_equal(expert_dot(x[:rows], w.take(np.arange(rows))), alone[:rows])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["Q2_K", "MXFP4"])
def test_what_is_not_finite_stays_in_its_row(name: str, value: float) -> None:
    w = FORMATS[name].from_bytes(random_blocks(FORMATS[name], (40, 512)))
    x = np.random.default_rng(1).standard_normal((3, 512), np.float32)
    clean = np.asarray(product(x, w))
    x[1, 300] = value
    y = np.asarray(product(x, w))
    assert not np.isfinite(y[1]).any()
    for row in (0, 2):
        assert_bits_equal(y[row], clean[row])

"""Every format against the mainline golden set: dequantised values to the bit, and products with quantised activations."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable

import gguf
import jax
import numpy as np
import pytest
from numerics import GOLDEN, arrays, assert_bits_equal
from quantized import as_float

from pallas_kernels.formats import FORMATS, Quantized, Terms
from pallas_kernels.linear import meaning

PRODUCTS = "mainline/activation_quant"
# Rows of a sample whose values are listed; the last four have extreme scales.
ROWS = [0, 64, 65, 66, 67]
MOMENT_LIMIT = 1e-9
SUM_LIMIT = 1e-6


def types(*after: str) -> list[str]:
    """Types of which the product arrays have these entries."""
    found = (key.partition(".") for key in arrays(PRODUCTS))
    return [name.upper() for name, _, entry in found if entry in after and name.upper() in FORMATS]


# A block scale, K scales, two codebooks, and a format without a kernel.
USUAL = ("Q8_0", "Q5_K", "MXFP4", "IQ3_XXS", "IQ3_S")


def of(names: Iterable[str]) -> pytest.MarkDecorator:
    """Every format; all but the usual ones are long."""
    return pytest.mark.parametrize(
        "name", [name if name in USUAL else pytest.param(name, marks=pytest.mark.long) for name in names]
    )


@functools.cache
def samples() -> dict[str, np.ndarray]:
    """Stored rows of each type, uint8 [68, bytes of 256 values]."""
    reader = gguf.GGUFReader(GOLDEN / "mainline" / "type_samples.gguf")
    return {tensor.name.removeprefix("sample."): np.array(tensor.data) for tensor in reader.tensors}


@functools.cache
def weight(name: str) -> Quantized:
    return FORMATS[name].from_bytes(arrays(PRODUCTS)[f"{name.lower()}.weight_raw"])


@of(FORMATS)
def test_samples(name: str) -> None:
    """Values, and sums and SHA-256 of all 68 rows; the hash does not tell −0 from 0."""
    raw, golden = samples()[name], arrays("mainline/expected")
    sample = FORMATS[name].from_bytes(raw)
    values = np.asarray(as_float(sample))
    assert_bits_equal(values[ROWS], golden[f"samples/dequant/sample.{name}"])
    np.testing.assert_array_equal(sample.to_bytes(), raw)
    [row] = np.flatnonzero(golden["samples/tensor_name"] == f"sample.{name}")
    assert hashlib.sha256((values + np.float32(0)).tobytes()).hexdigest() == golden["samples/tensor_sha256"][row].decode()
    total, squares = (golden[f"samples/tensor_{moment}"][row] for moment in ("sum", "sumsq"))
    exact = values.astype(np.float64)
    assert abs(exact.sum() - total) <= MOMENT_LIMIT * np.sqrt(exact.size * squares)
    assert abs((exact**2).sum() - squares) <= MOMENT_LIMIT * squares


@of(types("block_isum", "block_dot"))
def test_integers(name: str) -> None:
    """Sums over a block of weights and quantised activations, and where a type has minima those of the minima."""
    golden, key = arrays(PRODUCTS), name.lower()
    terms = Terms(**jax.jit(lambda w: vars(w.terms()))(weight(name)))
    *_, blocks, groups, width = terms.values.shape
    quants = golden["q8_0.q" if FORMATS[name].BLOCK == 32 else "q8_k.q"]
    x = quants.reshape(4, 1, blocks, groups, width).astype(np.int32)
    dots = (x * np.asarray(terms.values, np.int32)).sum(-1)
    factors = 1 if terms.factor is None else np.asarray(terms.factor)
    integers = golden[f"{key}.block_dot"] if f"{key}.block_dot" in golden else golden[f"{key}.block_isum"]
    np.testing.assert_array_equal((dots * factors).sum(-1), integers)
    assert (terms.offset is not None) == (f"{key}.block_minsum" in golden)
    if terms.offset is not None:
        np.testing.assert_array_equal((x.sum(-1) * np.asarray(terms.offset)).sum(-1), golden[f"{key}.block_minsum"])
    assert_bits_equal(np.asarray(as_float(weight(name)))[:4], golden[f"{key}.dequant"])


@of(types("out"))
def test_products(name: str) -> None:
    golden, key = arrays(PRODUCTS), name.lower()
    for y in products(golden["q8_k.x"], weight(name)):
        error = np.abs(np.asarray(y, np.float64) - golden[f"{key}.out"])
        assert (error <= SUM_LIMIT * golden[f"{key}.abs_sum"]).all()


@jax.jit
def products(x: jax.Array, w: Quantized) -> tuple[jax.Array, jax.Array]:
    """Every row with the same matrix, as a dense weight and as an expert: [M, K] and [N, K] → [M, N]."""
    return meaning.quantized_dot(x[:, None], w)[:, 0], meaning.expert_dot(x, jax.tree.map(lambda plane: plane[None], w))


def test_activations() -> None:
    golden = arrays(PRODUCTS)
    for key, quantize in (("q8_k", meaning.quantize_k), ("q8_0", meaning.quantize)):
        quants, scales = jax.jit(quantize)(golden["q8_k.x"])
        np.testing.assert_array_equal(np.asarray(quants).reshape(4, -1), golden[f"{key}.q"])
        assert_bits_equal(scales, golden[f"{key}.d"])

"""Q8_0 against ggml's own bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pallas_kernels.formats import BLOCK_BYTES, Q8_0

Q8 = gguf.GGMLQuantizationType.Q8_0
# Up to the largest whose scale is a finite float16, and none so small that ggml divides by less than float32's normal range.
FLOATS = st.floats(-(2.0**22), 2.0**22, width=32).map(lambda value: value if abs(value) > 1e-30 else 0.0)


def shapes(last: int) -> st.SearchStrategy[tuple[int, ...]]:
    """[N, K] and [E, N, K], K a few times `last`."""
    return st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.booleans()).map(
        lambda s: (s[0], s[1], s[2] * last) if s[3] else (s[1], s[2] * last)
    )


@given(arrays.arrays(np.uint8, shapes(BLOCK_BYTES)))
def test_bytes_return(raw: np.ndarray) -> None:
    value = Q8_0.from_bytes(raw)
    np.testing.assert_array_equal(value.to_bytes(), raw)
    assert value.shape == (*raw.shape[:-1], raw.shape[-1] // BLOCK_BYTES * 32)
    assert value.nbytes == raw.nbytes


@given(arrays.arrays(np.float32, shapes(32), elements=FLOATS))
def test_quantize_is_ggmls_bit_for_bit(weight: np.ndarray) -> None:
    np.testing.assert_array_equal(Q8_0.quantize(weight).to_bytes(), gguf.quants.quantize(weight, Q8))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-7, 1e-4, 0.02, 1.0, 1e3])
def test_quantize_and_dequantize_are_ggmls_on_normal_weights(scale: float) -> None:
    weight = (np.random.default_rng(0).standard_normal((2, 64, 256)) * scale).astype(np.float32)
    value, raw = Q8_0.quantize(weight), gguf.quants.quantize(weight, Q8)
    np.testing.assert_array_equal(value.to_bytes(), raw)
    np.testing.assert_array_equal(np.asarray(value.dequantize()), gguf.quants.dequantize(raw, Q8))


def test_what_is_too_small_becomes_zero() -> None:
    weight = np.full((1, 32), np.finfo(np.float32).tiny)
    np.testing.assert_array_equal(Q8_0.quantize(weight).dequantize(), np.zeros((1, 32), np.float32))

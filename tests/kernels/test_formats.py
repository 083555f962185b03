"""Quantised formats: bytes come back, values have the bits of ggml's, and the planes lie as their docstrings say."""

from __future__ import annotations

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_bits_equal
from quantized import as_float, layouts, random_blocks, set_scale

from pallas_kernels.formats import FORMATS, IQ2_S, IQ2_XXS, IQ3_XXS, MXFP4, Q2_K, Q4_K, Q5_K, Q6_K, Quantized, iq2_s, iq3_xxs
from pallas_kernels.formats.iq1 import IQ1_M
from pallas_kernels.formats.iq2_xxs import GRID, MAGNITUDES, selectors

SHAPES = [(3, 256), (3, 2, 768)]
MOST_OF_THE_FILE = 1.25

every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=list(FORMATS))
USUAL = (Q4_K, MXFP4, IQ2_XXS)
EVERY = [pytest.param(FORMATS[name], marks=() if FORMATS[name] in USUAL else pytest.mark.long, id=name) for name in layouts()]
every_layout = pytest.mark.parametrize("format", EVERY)


def ggml(raw: np.ndarray, format: type[Quantized]) -> np.ndarray:
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[format.__name__])


@every_format
@settings(max_examples=8)
@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 2**32 - 1))
def test_bytes_return_and_values_are_ggmls(format: type[Quantized], shape: tuple[int, ...], seed: int) -> None:
    raw = random_blocks(format, shape, seed)
    weight = format.from_bytes(raw)
    np.testing.assert_array_equal(weight.to_bytes(), raw)
    assert weight.shape == shape
    assert_bits_equal(as_float(weight), ggml(raw, format))


@every_format
def test_size_on_the_device(format: type[Quantized]) -> None:
    raw = random_blocks(format, (4, 8, 512))
    weight = format.from_bytes(raw)
    assert weight.nbytes == raw.nbytes // format.BLOCK_BYTES * format.DEVICE_BYTES <= MOST_OF_THE_FILE * raw.nbytes
    assert all(plane.nbytes // plane.shape[0] % 16 == 0 for plane in jax.tree.leaves(weight)), "an expert begins aligned"


@every_format
def test_block_sizes_are_ggmls(format: type[Quantized]) -> None:
    kind = gguf.GGMLQuantizationType[format.__name__]
    assert gguf.GGML_QUANT_SIZES[kind] == (format.BLOCK, format.BLOCK_BYTES)


@every_layout
def test_experts_of_a_stack(format: type[Quantized]) -> None:
    weight = format.from_bytes(random_blocks(format, (5, 3, 256)))
    index = jnp.array([[4, 0], [2, 2]], jnp.int32)
    taken = weight.take(index)
    assert taken.shape == (2, 2, 3, 256)
    assert_bits_equal(as_float(taken), np.asarray(as_float(weight))[np.asarray(index)])


@every_layout
def test_rows_of_a_matrix(format: type[Quantized]) -> None:
    raw, order = random_blocks(format, (8, 512)), np.random.default_rng(0).permutation(8)
    weight = format.from_bytes(raw)
    for made, stored in ((weight.take(order), raw[order]), (weight.in_tiles(4), raw.reshape(4, 2, -1))):
        for plane, wanted in zip(jax.tree.leaves(made), jax.tree.leaves(format.from_bytes(stored)), strict=True):
            assert plane.shape == wanted.shape
            assert_bits_equal(plane, wanted)


@every_layout
def test_dequantised_inside_a_program(format: type[Quantized]) -> None:
    """Fused with what comes before and after it, no bit may differ."""
    raw = random_blocks(format, (3, 512))
    weight = jax.jit(lambda weight: weight.dequantize() * 1.0)(format.from_bytes(raw))
    assert_bits_equal(weight, ggml(raw, format))


@every_format
def test_broken_scales_are_found(format: type[Quantized]) -> None:
    blocks = random_blocks(format, (6, format.BLOCK)).reshape(6, format.BLOCK_BYTES)
    assert not format.broken(blocks).any()
    for place in format.FLOAT16:
        for value in (np.inf, -np.inf, np.nan):
            spoiled = blocks.copy()
            spoiled[4, place : place + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
            assert format.broken(spoiled).tolist() == [False] * 4 + [True, False]


def test_a_broken_scale_in_four_parts() -> None:
    """Every number that a float16 can be."""
    scales = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    blocks = np.zeros((scales.size, IQ1_M.BLOCK_BYTES), np.uint8)
    set_scale(blocks, scales)
    np.testing.assert_array_equal(IQ1_M.broken(blocks), ~np.isfinite(scales))


def test_exponents_of_mxfp4() -> None:
    """Every exponent: the smallest give numbers below the normal range, the largest none that is finite."""
    raw = np.zeros((256, 17), np.uint8)
    raw[:, 0] = np.arange(256)
    raw[:, 1:] = np.arange(16) * 17
    broken = MXFP4.broken(raw)
    with np.errstate(over="ignore"):
        expected = ggml(raw, MXFP4)
    assert np.isfinite(expected[~broken]).all()
    assert not np.isfinite(expected[broken]).all(axis=1).any()
    assert broken.sum() == 3
    assert_bits_equal(as_float(MXFP4.from_bytes(raw[~broken])), expected[~broken])


def test_the_table_of_patterns_is_ggmls() -> None:
    gguf.quants.IQ2_XXS.init_grid()
    np.testing.assert_array_equal(GRID, np.asarray(gguf.quants.IQ2_XXS.grid).reshape(256, 8))
    picked = (selectors()[:, None] >> np.arange(0, 32, 4)) & 15
    np.testing.assert_array_equal(MAGNITUDES[picked], GRID)


def lane_bytes(words: np.ndarray) -> np.ndarray:
    """int32 [..., 4] of a lane → its bytes, [..., 16]."""
    return np.ascontiguousarray(words).view(np.uint8)


def test_lanes_of_iq2_xxs() -> None:
    raw = random_blocks(IQ2_XXS, (1, 512))
    weight, expected = IQ2_XXS.from_bytes(raw), ggml(raw, IQ2_XXS).reshape(4, 4, 8, 4)
    indices, signs = lane_bytes(np.asarray(weight.indices)[0]), np.asarray(weight.signs)[0]
    for lane in range(4):
        scale = np.float32(np.asarray(weight.scales)[0, lane // 2])
        for j in range(4):
            step = scale * np.float32(2 * (int(weight.factors[0, lane]) >> 4 * j & 15) + 1) / 8
            for k in range(8):
                magnitude = GRID[indices[lane, 4 * j + k // 2], 4 * (k % 2) : 4 * (k % 2) + 4]
                negative = (signs[lane, j] >> (k // 2 + 16 * (k % 2) + np.arange(0, 16, 4))) & 1
                np.testing.assert_array_equal(step * magnitude * np.where(negative, -1, 1), expected[lane, j, k])


def test_lanes_of_iq2_s() -> None:
    raw = random_blocks(IQ2_S, (1, 512))
    weight, expected = IQ2_S.from_bytes(raw), ggml(raw, IQ2_S).reshape(4, 4, 4, 8)
    indices, signs, rest, factors = (
        np.asarray(plane)[0] for plane in (weight.indices, weight.signs, weight.rest, weight.factors)
    )
    rest, factors = lane_bytes(rest[:, None]), lane_bytes(factors[:, None])
    for lane in range(4):
        scale = np.float32(np.asarray(weight.scales)[0, lane // 2])
        for j in range(4):
            code = indices.view(np.uint32)[lane, j]
            for i, number in enumerate([code & 1023, code >> 10 & 1023, code >> 20 & 1023, code >> 30 | int(rest[lane, j]) << 2]):
                magnitudes = MAGNITUDES[iq2_s.selectors()[number] >> np.arange(0, 32, 4) & 15]
                step = scale * np.float32(2 * (int(factors[lane, j]) >> 4 * (i // 2) & 15) + 1) / 8
                negative = (signs[lane, j] >> (i + np.arange(0, 32, 4))) & 1
                np.testing.assert_array_equal(step * magnitudes * np.where(negative, -1, 1), expected[lane, j, i])


def test_lanes_of_iq3_xxs() -> None:
    raw = random_blocks(IQ3_XXS, (1, 512))
    weight, expected = IQ3_XXS.from_bytes(raw), ggml(raw, IQ3_XXS).reshape(8, 16, 4)
    indices, signs, factors = (
        lane_bytes(np.asarray(weight.indices)[0]),
        np.asarray(weight.signs)[:, 0],
        np.asarray(weight.factors)[0],
    )
    patterns = lane_bytes(iq3_xxs.patterns()[:, None])
    for lane in range(8):
        scale = np.float32(np.asarray(weight.scales)[0, lane // 4])
        for n in range(16):
            half = n // 8
            step = scale * np.float32(2 * (int(factors[lane]) >> 4 * half & 15) + 1) / 4
            negative = lane_bytes(signs[half, lane : lane + 1] << (n % 8)) >> 7
            np.testing.assert_array_equal(step * patterns[indices[lane, n]] * np.where(negative, -1.0, 1.0), expected[lane, n])


def test_lanes_of_q2_k() -> None:
    raw = random_blocks(Q2_K, (1, 512))
    weight, expected = Q2_K.from_bytes(raw), ggml(raw, Q2_K).reshape(2, 2, 4, 2, 16)
    quants, groups = lane_bytes(np.asarray(weight.quants)[0]), lane_bytes(np.asarray(weight.groups)[0][:, None])
    for lane in range(8):
        b, h, p = lane // 4, lane // 2 % 2, lane % 2
        scale, minimum = np.float32(np.asarray(weight.scales)[0, b]), np.float32(np.asarray(weight.minima)[0, b])
        for s in range(4):
            values = (quants[lane] >> 2 * s & 3).astype(np.float32)
            factor, offset = np.float32(groups[lane, s] & 15), np.float32(groups[lane, s] >> 4)
            np.testing.assert_array_equal(scale * factor * values - minimum * offset, expected[b, h, s, p])


def test_lanes_of_q4_k() -> None:
    raw = random_blocks(Q4_K, (1, 512))
    weight, expected = Q4_K.from_bytes(raw), ggml(raw, Q4_K).reshape(8, 2, 2, 16)
    quants, groups = lane_bytes(np.asarray(weight.quants)[:, 0]), lane_bytes(np.asarray(weight.groups)[0][:, None])
    for lane in range(8):
        scale, minimum = (np.float32(np.asarray(plane)[0, lane // 4]) for plane in (weight.scales, weight.minima))
        for half in range(2):
            for upper in range(2):
                values = (quants[half, lane] >> 4 * upper & 15).astype(np.float32)
                factor, offset = np.float32(groups[lane, upper]), np.float32(groups[lane, 2 + upper])
                np.testing.assert_array_equal(scale * factor * values - minimum * offset, expected[lane, upper, half])


def test_lanes_of_q5_k() -> None:
    raw = random_blocks(Q5_K, (1, 512))
    weight, expected = Q5_K.from_bytes(raw), ggml(raw, Q5_K).reshape(8, 2, 2, 4, 4)
    quants, groups = lane_bytes(np.asarray(weight.quants)[:, 0]), lane_bytes(np.asarray(weight.groups)[0][:, None])
    fifths = lane_bytes(np.asarray(weight.fifths)[:, 0, :, None])
    for lane in range(8):
        scale, minimum = (np.float32(np.asarray(plane)[0, lane // 4]) for plane in (weight.scales, weight.minima))
        for n, h, w in np.ndindex(2, 2, 4):
            bits = fifths[w // 2, lane] >> (4 * (w % 2) + 2 * n + h) & 1
            values = ((quants[h, lane, 4 * w : 4 * w + 4] >> 4 * n & 15) | bits << 4).astype(np.float32)
            factor, offset = np.float32(groups[lane, n]), np.float32(groups[lane, 2 + n])
            np.testing.assert_array_equal(scale * factor * values - minimum * offset, expected[lane, n, h, w])


def test_lanes_of_q6_k() -> None:
    raw = random_blocks(Q6_K, (1, 512))
    weight, expected = Q6_K.from_bytes(raw), ggml(raw, Q6_K).reshape(2, 2, 4, 2, 16)
    low, high = lane_bytes(np.asarray(weight.low)[:, 0]), lane_bytes(np.asarray(weight.high)[0])
    factors = lane_bytes(np.asarray(weight.factors)[0][:, None]).view(np.int8)
    for lane in range(8):
        b, h, p = lane // 4, lane // 2 % 2, lane % 2
        scale = np.float32(np.asarray(weight.scales)[0, b])
        for s in range(4):
            quants = (low[s % 2, lane] >> 4 * (s // 2) & 15) | (high[lane] >> 2 * s & 3) << 4
            step = scale * np.float32(factors[lane, s])
            np.testing.assert_array_equal(step * (quants.astype(np.float32) - 32), expected[b, h, s, p])


def test_lanes_of_mxfp4() -> None:
    raw = random_blocks(MXFP4, (1, 96))
    weight, expected = MXFP4.from_bytes(raw), ggml(raw, MXFP4).reshape(3, 2, 16)
    nibbles = np.asarray(weight.quants)[0][..., None] >> np.arange(0, 32, 4) & 15
    codes = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
    for lane in range(3):
        scale = np.ldexp(np.float32(1), int(weight.exponents[0, lane]) - 128)
        for upper in range(2):
            values = codes[nibbles[lane, :, 4 * upper : 4 * upper + 4]].reshape(16)
            np.testing.assert_array_equal(scale * values, expected[lane, upper])

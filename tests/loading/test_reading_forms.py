"""Tensors read as float32 whatever their type, and columns of a tensor."""

from __future__ import annotations

import hashlib
from pathlib import Path

import jax
import numpy as np
import pytest
from numerics import GOLDEN, arrays

from ds4jax.errors import InputError
from ds4jax.loading import gguf_values
from ds4jax.loading.gguf_header import TENSOR_TYPES, Header, Shard, TensorInfo, read_header
from ds4jax.loading.gguf_values import device_nbytes, reading, stored_nbytes
from pallas_kernels.formats import FORMATS, Quantized

ROWS, K = 6, 1024
# The others are read by the same code, and their values are compared in tests/kernels.
USUAL = ("Q8_0", "MXFP4", "Q6_K", "Q5_0")
HALVES = slice(0, K // 2), slice(K // 2, K)


def matrix(kind: str) -> Header:
    """A matrix `m` [6, 1024] of bytes drawn at random below 64, of a type: all of its values are finite."""
    _, block, block_bytes = next(row for row in TENSOR_TYPES.values() if row[0] == kind)
    count = ROWS * K // block * block_bytes
    data = np.random.default_rng(0).integers(0, 64, count).astype(np.uint8)
    path = Path("m.gguf")
    return Header(path, {}, {"m": TensorInfo("m", kind, (ROWS, K), 0, count)}, (Shard(path, data),))


KINDS = [kind if kind in USUAL else pytest.param(kind, marks=pytest.mark.long) for kind in FORMATS]


@pytest.mark.parametrize("kind", KINDS)
def test_dequantised_in_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every type of the golden set, its rows of extreme scales included, to the bit but for the sign of 0."""
    header, golden = read_header(GOLDEN / "mainline" / "type_samples.gguf"), arrays("mainline/expected")
    info = header.tensors[f"sample.{kind}"]
    # Three pieces of 23 rows: the last shares one with the one before. Stored bytes alone would make fewer.
    monkeypatch.setattr(gguf_values, "_PIECE", 4 * 256 * 68 // 3 + 1)
    read = reading(header, info, 0, "F32")
    assert len(read.pieces) == 3
    value = read.value()
    assert isinstance(value, jax.Array)
    assert value.nbytes == device_nbytes(info, "F32")
    [row] = np.flatnonzero(golden["samples/tensor_name"] == info.name)
    raw = (np.asarray(value) + np.float32(0)).tobytes()
    assert hashlib.sha256(raw).hexdigest() == golden["samples/tensor_sha256"][row].decode()


def test_stacks_are_dequantised_too(monkeypatch: pytest.MonkeyPatch) -> None:
    header = matrix("Q8_0")
    info = header.tensors["m"]
    stack = TensorInfo("m", "Q8_0", (3, 2, K), 0, info.nbytes)
    monkeypatch.setattr(gguf_values, "_PIECE", 4 * 2 * K)
    read = reading(header, stack, 0, "F32")
    assert len(read.pieces) == 3
    expected = np.asarray(reading(header, info, 0, "F32").value()).reshape(3, 2, K)
    assert np.abs(expected).max() > 0
    np.testing.assert_array_equal(np.asarray(read.value()), expected)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "MXFP4", "IQ4_XS"])
def test_columns_in_planes(kind: str) -> None:
    """The blocks of each half of the columns, as they are stored."""
    header = matrix(kind)
    info, format = header.tensors["m"], FORMATS[kind]
    blocks = header.raw(info).reshape(ROWS, K // format.BLOCK, format.BLOCK_BYTES)
    for half, stored in zip(HALVES, np.split(blocks, 2, axis=1), strict=True):
        value = reading(header, info, 0, columns=half).value()
        assert isinstance(value, Quantized)
        assert value.shape == (ROWS, K // 2)
        np.testing.assert_array_equal(value.to_bytes(), stored.reshape(ROWS, -1))
        assert value.nbytes == device_nbytes(info, columns=half)
        assert stored.size == stored_nbytes(info, half)


@pytest.mark.parametrize(("kind", "form"), [("F32", "F32"), ("BF16", "BF16"), ("F16", "F32"), ("Q8_0", "F32")])
def test_columns_of_numbers(kind: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    header = matrix(kind)
    info = header.tensors["m"]
    whole = np.asarray(reading(header, info, 0, form).value())
    monkeypatch.setattr(gguf_values, "_PIECE", 4 * K)
    monkeypatch.setattr(gguf_values, "_SMALL", 0)
    for half in HALVES:
        read = reading(header, info, 0, form, half)
        assert len(read.pieces) > 1
        value = np.asarray(read.value())
        assert np.abs(value.astype(np.float32)).max() > 0
        np.testing.assert_array_equal(value, whole[:, half], strict=True)
        assert value.nbytes == device_nbytes(info, form, half)


def test_what_is_broken_is_named_by_its_place_in_the_tensor() -> None:
    header = matrix("Q8_0")
    info = header.tensors["m"]
    header.shards[0].data[34 * (K // 32 * 2 + 30) + 1] = 0x7F
    for options in ({"columns": HALVES[1]}, {"form": "F32"}):
        with pytest.raises(InputError) as error:
            reading(header, info, 0, **options).value()
        assert str(error.value) == f"m.gguf: m: the scale of block {K // 32 * 2 + 30} is not finite"


def test_what_cannot_be_read() -> None:
    header = matrix("Q4_K")
    info = header.tensors["m"]
    with pytest.raises(ValueError, match="m: Q4_K cannot be read as Q8_0"):
        reading(header, info, 0, "Q8_0")
    for columns in (slice(0, 128), slice(128, 512), slice(512, 512), slice(0, 512, 2)):
        with pytest.raises(ValueError, match="are not whole blocks of 256"):
            reading(header, info, 0, columns=columns)

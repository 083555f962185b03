"""The header reader against the `gguf` package, on a large vocabulary, and on wrong headers."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import unpacked

from ds4jax.errors import InputError
from ds4jax.loading.gguf_header import QUANTISED, TENSOR_TYPES, read_header
from pallas_kernels.formats import FORMATS


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def header(*entries: bytes, tensors: tuple[bytes, ...] = ()) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries)) + b"".join(entries) + b"".join(tensors)


def strings(key: str, values: list[str]) -> bytes:
    return string(key) + struct.pack("<IIQ", 9, 8, len(values)) + b"".join(map(string, values))


def test_equal_to_the_gguf_package(tmp_path: Path) -> None:
    path = unpacked("ok_control.gguf.gz", tmp_path)
    reader, ours = gguf.GGUFReader(path), read_header(path)
    theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata.keys() == theirs.keys()
    for key, value in ours.metadata.items():
        plain = value.value.tolist() if isinstance(value.value, np.ndarray) else value.value
        assert plain == theirs[key], key
    assert list(ours.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        info = ours.tensors[tensor.name]
        assert (info.type, info.shape) == (tensor.tensor_type.name, tuple(tensor.shape[::-1].tolist()))
        assert ours.raw(info).tobytes() == tensor.data.tobytes()


def test_block_sizes_are_ggmls() -> None:
    for type_id, (name, block, block_bytes) in TENSOR_TYPES.items():
        theirs = gguf.GGMLQuantizationType(type_id)
        assert (name, (block, block_bytes)) == (theirs.name, gguf.GGML_QUANT_SIZES[theirs])


def test_the_quantised_types_are_the_formats() -> None:
    assert {name: format.BLOCK for name, format in FORMATS.items()} == QUANTISED


def test_nothing_that_checks_headers_imports_jax() -> None:
    code = "import sys, ds4jax.loading; raise SystemExit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_vocabulary_of_129280_tokens_is_read_in_under_a_second(tmp_path: Path) -> None:
    tokens, merges = [f"token{i:06}" for i in range(129280)], [f"left{i} right{i}" for i in range(127741)]
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(header(strings("tokenizer.ggml.tokens", tokens), strings("tokenizer.ggml.merges", merges)))
    start = time.process_time()
    found = read_header(path).metadata
    assert time.process_time() - start < 1
    assert found["tokenizer.ggml.tokens"].value == tokens
    assert found["tokenizer.ggml.merges"].value == merges


KEY = string("a.key")
WRONG = {
    "invalid UTF-8 in a key": (header(string(b"\xff\xfe") + bytes(5)), "metadata key 0: not valid UTF-8"),
    "invalid UTF-8 in a value": (header(KEY + struct.pack("<I", 8) + string(b"a\xff")), "a.key: not valid UTF-8 at byte 1"),
    "invalid UTF-8 in an array": (header(KEY + struct.pack("<IIQ", 9, 8, 1) + string(b"\xff")), "a.key: not valid UTF-8"),
    "array of arrays": (header(KEY + struct.pack("<IIQ", 9, 9, 0)), "a.key: arrays of arrays"),
    "array of an unknown type": (header(KEY + struct.pack("<IIQ", 9, 13, 0)), "a.key: unknown metadata value type 13"),
    "bool of 2": (header(KEY + struct.pack("<IB", 7, 2)), "a.key: a bool"),
    "array cut off": (header(KEY + struct.pack("<IIQQ", 9, 8, 1, 9) + b"12345678"), r"a.key\[0\]: truncated"),
    "array cut off in a length": (header(KEY + struct.pack("<IIQQ", 9, 8, 2, 7) + b"1234567" + b"\0"), r"a.key\[1\]: truncated"),
    "long key": (header(string(b"k" * 65536) + struct.pack("<IB", 0, 0)), "metadata key 0: string length is 65536"),
    "alignment 0": (header(string("general.alignment") + struct.pack("<II", 4, 0)), "general.alignment"),
    "alignment 24": (header(string("general.alignment") + struct.pack("<II", 4, 24)), "general.alignment"),
    "alignment as u64": (header(string("general.alignment") + struct.pack("<IQ", 10, 32)), "general.alignment"),
    "no dimensions": (header(tensors=(string("t") + struct.pack("<IIQ8x", 0, 0, 0),)), "t: 0 dimensions"),
    "empty dimension": (header(tensors=(string("t") + struct.pack("<IQIQ", 1, 0, 0, 0),)), "t: dimensions"),
    "a fork's type": (
        header(tensors=(string("t") + struct.pack("<IQIQ", 1, 256, 139, 0),)),
        "t: tensor type 139 is not supported",
    ),
    "row of half a block": (header(tensors=(string("t") + struct.pack("<IQIQ", 1, 128, 13, 0),)), "t: rows of 128 values; Q5_K"),
    "name with a line break": (header(string("a\nb") + struct.pack("<I", 99)), r"'a\\nb': unknown metadata value type 99"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_header(case: str, tmp_path: Path) -> None:
    raw, message = WRONG[case]
    path = tmp_path / "wrong.gguf"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=message) as error:
        read_header(path)
    assert "\n" not in str(error.value)


def test_alignment_is_obeyed(tmp_path: Path) -> None:
    entry = string("general.alignment") + struct.pack("<II", 4, 128)
    raw = header(entry, tensors=(string("t") + struct.pack("<IQIQ", 1, 1, 0, 128),))
    path = tmp_path / "aligned.gguf"
    path.write_bytes(raw + bytes(128 - len(raw) % 128) + bytes(128) + struct.pack("<f", 1.5))
    found = read_header(path)
    assert found.raw(found.tensors["t"]).view("<f4").tolist() == [1.5]


def test_empty_arrays_at_the_end_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "empty.gguf"
    path.write_bytes(header(strings("a", []), string("b") + struct.pack("<IIQ", 9, 4, 0)))
    found = read_header(path).metadata
    assert (found["a"].value, found["b"].value.tolist()) == ([], [])

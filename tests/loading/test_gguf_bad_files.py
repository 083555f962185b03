"""Broken files: one clear line, quickly, naming the file and the key or tensor at fault."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path

import pytest
from gguf_files import GOLDEN, unpacked

from ds4jax.errors import InputError
from ds4jax.loading import open_checkpoint
from ds4jax.loading.gguf_header import read_header
from ds4jax.loading.gguf_values import read_value

CASES = {case["file"]: case for case in json.loads((GOLDEN / "bad" / "index.json").read_text())}
CONTAINER = [name for name, case in CASES.items() if case["stage"] == "container"]
MODEL = [name for name, case in CASES.items() if case["stage"] == "model"]
VALUES = [name for name, case in CASES.items() if case["stage"] == "values"]
# What the messages must say where the index leaves the wording free.
WORDING = {
    "empty_file": "is empty",
    "three_bytes": "truncated",
    "wrong_magic": "magic",
    "version_2": "version 2;",
    "version_99": "version 99;",
    "cut_in_metadata": "before the end of file",
    "cut_in_tensor_table": "before the end of file",
    "unknown_type": "type 99 ",
    "tensor_count_2e60": "tensor count",
    "kv_count_2e60": "metadata count",
    "key_length_2e62": "string length",
    "unknown_value_type": "type 77",
    "wrong_dtype": "F16",
    "wrong_architecture": "deepseek2",
}
MOST_BYTES = 50e6


def assert_message(error: pytest.ExceptionInfo[InputError], name: str, path: Path) -> None:
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 400
    for alternatives in CASES[name]["must_mention"]:
        assert any(alternative in message for alternative in alternatives), message
    assert WORDING.get(name.removesuffix(".gguf.gz"), "") in message


def test_every_file_has_a_stage() -> None:
    assert len(CONTAINER) + len(MODEL) + len(VALUES) + 1 == len(CASES) == 34


@pytest.mark.parametrize("name", CONTAINER)
def test_container(name: str, tmp_path: Path) -> None:
    path = unpacked(name, tmp_path)
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(InputError) as error:
        read_header(path)
    seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 1
    assert peak < MOST_BYTES
    assert_message(error, name, path)


@pytest.mark.parametrize("name", CONTAINER + MODEL)
def test_open(name: str, tmp_path: Path) -> None:
    path = unpacked(name, tmp_path)
    start = time.process_time()
    with pytest.raises(InputError) as error:
        open_checkpoint(path)
    assert time.process_time() - start < 1
    assert_message(error, name, path)


@pytest.mark.parametrize("name", VALUES)
def test_values(name: str, tmp_path: Path) -> None:
    path = unpacked(name, tmp_path)
    header = read_header(path)
    n_experts = header.metadata["deepseek4.expert_count"].value
    broken = CASES[name]["must_mention"][0][0]
    with pytest.raises(InputError) as error:
        read_value(header, header.tensors[broken], n_experts)
    assert_message(error, name, path)


def test_the_control_stops_at_its_expert_format(tmp_path: Path) -> None:
    path = unpacked("ok_control.gguf.gz", tmp_path)
    with pytest.raises(InputError, match=r"blk\.0\.ffn_gate_exps\.weight: type IQ2_XXS is not supported"):
        open_checkpoint(path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        open_checkpoint(tmp_path / "missing.gguf")
    with pytest.raises(InputError, match="not a file"):
        read_header(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        open_checkpoint(tmp_path / ("x" * 300))

"""Broken files: one clear line, quickly, naming the file and the key or tensor at fault."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import split_files
from gguf_files import GOLDEN, unpacked
from numerics import assert_bits_equal

import ds4jax
from ds4jax.cli.main import main
from ds4jax.errors import InputError
from ds4jax.loading import open_checkpoint
from ds4jax.loading.gguf_header import read_header
from ds4jax.loading.gguf_names import slots
from ds4jax.loading.gguf_values import reading
from ds4jax.model.parameters import build

CASES = {case["file"]: case for case in json.loads((GOLDEN / "bad" / "index.json").read_text())}
# A type that is read today: the file is valid.
READ = ("wrong_dtype.gguf.gz",)
CONTAINER = [name for name, case in CASES.items() if case["stage"] == "container"]
MODEL = [name for name, case in CASES.items() if case["stage"] == "model" and name not in READ]
OPEN = CONTAINER + MODEL
VALUES = [name for name, case in CASES.items() if case["stage"] == "values"]
# Parts of messages whose wording the index does not give.
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
    "wrong_architecture": "deepseek2",
}
MAX_BYTES = 50e6
# Of llama.cpp's flavour; test_gguf_split.py has those of shards.
MAINLINE = {name: case for name, case in split_files.CASES.items() if case["stage"] in ("none", "model", "values")}
REFUSED = [name for name, case in MAINLINE.items() if case["expect"] == "refuse" and case["stage"] == "model"]
LOADED = [name for name, case in MAINLINE.items() if case["expect"] in ("load", "either", "warn")]
BROKEN = [name for name, case in MAINLINE.items() if case["stage"] == "values"]


def assert_message(error: pytest.ExceptionInfo[InputError], name: str, path: Path) -> None:
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 400
    for alternatives in CASES[name]["must_mention"]:
        assert any(alternative in message for alternative in alternatives), message
    assert WORDING.get(name.removesuffix(".gguf.gz"), "") in message


def test_every_file_has_a_stage() -> None:
    assert len(CONTAINER) + len(MODEL) + len(VALUES) + len(READ) + 1 == len(CASES) == 34


def growth(call: Callable[[Path], object], path: Path) -> int:
    """Peak bytes allocated by a refused call, numpy arrays included."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError):
            call(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("call", "name"), [(read_header, name) for name in CONTAINER] + [(open_checkpoint, name) for name in OPEN]
)
def test_refused_at_once(call: Callable[[Path], object], name: str, tmp_path: Path) -> None:
    path = unpacked(name, tmp_path)
    start = time.process_time()
    with pytest.raises(InputError) as error:
        call(path)
    assert time.process_time() - start < 1
    assert_message(error, name, path)
    assert growth(call, path) < MAX_BYTES


@pytest.mark.parametrize("name", VALUES)
def test_values_are_refused_when_read(name: str, tmp_path: Path) -> None:
    path = unpacked(name, tmp_path)
    broken = CASES[name]["must_mention"][0][0]
    header = read_header(path)
    n_experts = open_checkpoint(path).config.n_experts
    with pytest.raises(InputError) as error:
        reading(header, header.tensors[broken], n_experts).value()
    assert_message(error, name, path)


@pytest.mark.parametrize("name", [*OPEN, *VALUES])
def test_loading_and_inspecting_say_the_same(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = unpacked(name, tmp_path)
    with pytest.raises(InputError) as error:
        ds4jax.load(path)
    assert_message(error, name, path)
    if name in OPEN:
        with pytest.raises(SystemExit) as ended:
            main(["inspect", str(path)])
        assert ended.value.code == 2
        assert str(error.value) in capsys.readouterr().err


@pytest.mark.parametrize("name", READ)
def test_what_is_read_today(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(unpacked(name, tmp_path))
    assert {tensor.stored for tensor in checkpoint.tensors if tensor.name == "layers.0.attn.wq_a.weight"} == {"F16"}


@pytest.mark.slow
def test_the_control_loads_and_says_what_its_values_say(tmp_path: Path) -> None:
    """Every type of the published file, end to end against the `gguf` package's values in float32."""
    path = unpacked("ok_control.gguf.gz", tmp_path)
    checkpoint, model = open_checkpoint(path), ds4jax.load(path)
    assert {tensor.stored for tensor in checkpoint.tensors} >= {"IQ2_XXS", "Q2_K", "Q4_K", "Q8_0", "F16", "F32", "I32"}
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    values = []
    for slot in slots(checkpoint.config):
        tensor = stored[slot.gguf_name]
        plain = tensor.data if tensor.tensor_type.name == "I32" else gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        values.append((slot.name, jnp.asarray(plain.reshape(slot.shape))))
    plain_model = ds4jax.LanguageModel(build(checkpoint.config, values), None)
    ids = np.arange(24) * 17 % checkpoint.config.vocab_size
    strict = model.logits(ids, decode_from=18, strict=True)["logits"]
    expected = plain_model.logits(ids, decode_from=18, strict=True)["logits"]
    assert np.abs(expected).max() > 0
    assert_bits_equal(strict, expected)


@pytest.mark.parametrize("name", REFUSED)
def test_mainline_files_refused_at_once(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = split_files.unpacked(name, tmp_path)
    start = time.process_time()
    with pytest.raises(InputError) as error:
        open_checkpoint(path)
    assert time.process_time() - start < 1
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    for alternatives in MAINLINE[name]["must_mention"]:
        assert any(alternative in message for alternative in alternatives), message
    assert growth(open_checkpoint, path) < MAX_BYTES
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(path)])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", LOADED)
def test_mainline_files_that_load(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(split_files.unpacked(name, tmp_path))
    found = {"layers": checkpoint.config.n_layers, "mtp": checkpoint.config.n_mtp == 1, "vocab": checkpoint.config.vocab_size}
    assert found | MAINLINE[name].get("if_loaded", {}) == found
    if MAINLINE[name]["expect"] == "warn":
        assert all(any(one in checkpoint.note for one in group) for group in MAINLINE[name]["must_mention"])
        assert checkpoint.drafter_path is None


@pytest.mark.parametrize("name", BROKEN)
def test_mainline_values_are_refused_when_read(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = split_files.unpacked(name, tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(path), "--check"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    for alternatives in MAINLINE[name]["must_mention"]:
        assert any(alternative in told for alternative in alternatives), told


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        open_checkpoint(tmp_path / "missing.gguf")
    with pytest.raises(InputError, match="not a file"):
        read_header(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        open_checkpoint(tmp_path / ("x" * 300))


@pytest.mark.parametrize("name", ["unknown_type.gguf.gz", "missing_key.gguf.gz"])
def test_what_headers_show_needs_no_jax(name: str, tmp_path: Path) -> None:
    """Importing JAX and Flax takes longer than the rest of a refusal."""
    path = unpacked(name, tmp_path)
    program = (
        "import sys\nfrom ds4jax.errors import InputError\nfrom ds4jax.loading import open_checkpoint\n"
        f"try:\n    open_checkpoint({str(path)!r})\nexcept InputError:\n    print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"

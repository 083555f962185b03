"""No broken file is taken for a session: each is refused in one line, and nothing large is made before it is."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from numerics import golden_model
from saved_sessions import interrupted

import ds4jax
from ds4jax.errors import InputError
from ds4jax.language_model import LanguageModel

Header = dict[str, Any]


def remade(data: bytes, change: Callable[[Header, bytearray], None]) -> bytes:
    """A file with another header and a digest that is right, as someone would make it by hand."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    change(header, body)
    header["__metadata__"]["digest"] = "0" * 64
    raw = json.dumps(header).encode()
    raw = len(raw).to_bytes(8, "little") + raw
    digest = hashlib.sha256(raw + body).hexdigest()
    return raw.replace(b"0" * 64, digest.encode(), 1) + bytes(body)


def field(name: str, value: str) -> Callable[[bytes], bytes]:
    return lambda data: remade(data, lambda header, body: header["__metadata__"].update({name: value}))


def entry(name: str, **changes: Any) -> Callable[[bytes], bytes]:
    return lambda data: remade(data, lambda header, body: header[name].update(changes))


def flipped(place: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def padded(data: bytes) -> bytes:
    """Spaces after the header's JSON, which change nothing of what it says."""
    length = int.from_bytes(data[:8], "little")
    return (length + 8).to_bytes(8, "little") + data[8 : 8 + length] + b" " * 8 + data[8 + length :]


def without(name: str) -> Callable[[bytes], bytes]:
    """The last tensor goes, bytes and all."""

    def change(header: Header, body: bytearray) -> None:
        start, end = header.pop(name)["data_offsets"]
        assert end == len(body)
        del body[start:]

    return lambda data: remade(data, change)


def with_more(header: Header, body: bytearray) -> None:
    header["more\nof it"] = {"dtype": "U8", "shape": [3], "data_offsets": [len(body), len(body) + 3]}
    body += b"abc"


def other_token(header: Header, body: bytearray) -> None:
    start, _ = header["prompt_ids"]["data_offsets"]
    body[start : start + 4] = (10**6).to_bytes(4, "little")


def config_of(data: bytes) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["config"])
    return config


WINDOW, LAST = "state.cache.layers.0.window", "drafting.h_SND"
BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "header: 0 bytes in a file of 0 bytes"),
    "words": (lambda data: b"In the beginning God created the heaven", "header: "),
    "another format": (field("format", "pt"), "format: 'pt', not 'ds4jax session'"),
    "header cut": (lambda data: data[:500], "header: "),
    "header not JSON": (lambda data: data[:8] + b"[" + data[9:], "header: not a saved session"),
    "absurd header": (lambda data: b"\xff" * 8 + data[8:], "header: 18,446,744,073,709,551,615 bytes in a file of"),
    "deep header": (lambda data: (10**6).to_bytes(8, "little") + b"[" * 10**6, "header: not a saved session"),
    "data cut": (lambda data: data[:-5], "the file has .* bytes, and its header describes .* bytes"),
    "data longer": (lambda data: data + b"more", "the file has .* bytes, and its header describes .* bytes"),
    "data altered": (flipped(-9000), "digest: the bytes differ from the saved ones"),
    "last byte altered": (flipped(-2), "digest: the bytes differ from the saved ones"),
    "header altered": (lambda data: data.replace(b'"given": "7"', b'"given": "6"'), "digest: "),
    "header padded": (padded, "digest: "),
    "newer version": (field("version", "3"), "version: 3; this ds4jax reads 2; use a newer ds4jax"),
    "older version": (field("version", "1"), "version: 1; this ds4jax reads 2; save the session again"),
    "no version": (field("version", "new"), "header: not a saved session"),
    "other weights": (field("fingerprint", "0" * 63 + "1"), "fingerprint: the model has other weights"),
    "other config": (
        lambda data: field("config", json.dumps(config_of(data) | {"norm_eps": 1e-5}))(data),
        "config: norm_eps is 1e-05, and 1e-06 in the model",
    ),
    "other depth": (field("max_draft", "1"), "max_draft: 1, and 2 in the model; open the model with max_draft 1"),
    "other drafter": (field("drafter", "mine.Oracle"), "drafter: mine.Oracle, and mtp here"),
    "no options": (field("options", "{}"), "options: not valid"),
    "length not a number": (field("length", "NaN"), "length: missing or invalid"),
    "length beyond capacity": (field("length", "513"), "length: 513; it must be 0 to 512"),
    "absurd capacity": (field("capacity", str(1 << 39)), "capacity: 549755813888; it must be 1 to 1024"),
    "another length": (field("length", "45"), "is needed"),
    "too much given": (field("given", "40"), "length: .* prompt and tokens do not agree"),
    "tensor missing": (without(LAST), f"{LAST}: missing"),
    "tensor too many": (lambda data: remade(data, with_more), "more of it: not part of a session"),
    "wrong type": (entry(WINDOW, dtype="I32"), f"{WINDOW}: int32.* where float32.* is needed"),
    "unknown type": (entry(WINDOW, dtype="F64"), f"{WINDOW}: type, shape and position do not agree"),
    "wrong shape": (entry(WINDOW, shape=[1, 96, 24]), rf"{WINDOW}: float32\[1, 96, 24\], where float32\[1, 24, 96\] is needed"),
    "absurd shape": (entry(WINDOW, shape=[1 << 39, 1 << 39]), f"{WINDOW}: type, shape and position do not agree"),
    "not in order": (entry(WINDOW, data_offsets=[0, 24 * 96 * 4]), f"{WINDOW}: type, shape and position do not agree"),
    "token outside": (lambda data: remade(data, other_token), "prompt_ids: token id 1000000 is outside the vocabulary"),
}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return golden_model()


@pytest.fixture(scope="module")
def whole(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return interrupted(model, tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_in_one_line(name: str, model: LanguageModel, whole: Path, tmp_path: Path) -> None:
    change, message = BROKEN[name]
    data, path = whole.read_bytes(), tmp_path / "broken"
    path.write_bytes(change(data))
    assert path.read_bytes() != data
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message) as raised:
            ds4jax.restore(path, model)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)
    assert ";" in str(raised.value)


def test_what_is_no_file_and_what_no_option(model: LanguageModel, whole: Path, tmp_path: Path) -> None:
    for path, message in ((tmp_path, "Is a directory"), (tmp_path / "none", "No such file")):
        with pytest.raises(InputError, match=message):
            ds4jax.restore(path, model)
    with pytest.raises(InputError, match="is a folder; give the name of a file"):
        ds4jax.restore(whole, model).save(tmp_path)
    for options, message in (
        ({"strict": False}, "strict: the session was saved with strict True"),
        ({"sampler": 1}, "sampler: no such option"),
        ({"max_new_tokens": 0}, "max-new-tokens is 0"),
    ):
        with pytest.raises(InputError, match=message):
            ds4jax.restore(whole, model, **options)
    with pytest.raises(InputError, match="config: "):
        ds4jax.restore(whole)
    renamed = tmp_path / "moved"
    renamed.write_bytes(field("model", "/nowhere/model.gguf")(whole.read_bytes()))
    with pytest.raises(InputError, match="model: /nowhere/model.gguf does not exist; say where the model is"):
        ds4jax.restore(renamed)

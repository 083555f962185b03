"""Every case of the golden tokenizer, from GGUF metadata and from a tokenizer.json, and the streaming decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import GOLDEN, vocabulary
from hypothesis import given
from hypothesis import strategies as st

from ds4jax.errors import InputError
from ds4jax.tokenizer import BOS, Tokenizer, build_bpe

GOLDEN_CASES = json.loads((GOLDEN / "tokenizer_cases.json").read_text("utf-8"))
CASES, DECODE_CASES, SPECIALS = (GOLDEN_CASES[key] for key in ("cases", "decode_cases", "specials"))


def gguf_metadata() -> dict[str, Any]:
    words = vocabulary()
    return {
        "deepseek4.vocab_size": GOLDEN_CASES["vocab_size"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "joyai-llm",
        "tokenizer.ggml.tokens": words["tokens"],
        "tokenizer.ggml.merges": words["merges"],
        "tokenizer.ggml.token_type": np.array(words["token_types"]),
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


@pytest.fixture(scope="module")
def from_gguf() -> Tokenizer:
    return Tokenizer.from_gguf(gguf_metadata(), Path("golden.gguf"))


@pytest.fixture(scope="module")
def from_file(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    build_bpe(vocabulary()["tokens"], vocabulary()["merges"], list(SPECIALS)).save(str(path))
    return Tokenizer.from_file(path)


@pytest.fixture(params=["from_gguf", "from_file"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


def test_ids(tokenizer: Tokenizer) -> None:
    assert len(CASES) == 138
    for case in CASES:
        assert tokenizer.encode(case["text"]) == case["ids"], case["name"]
        assert tokenizer.encode(case["text"], parse_special=True) == case["ids_special"], case["name"]


def test_ids_with_the_seven_core_markers() -> None:
    core = build_bpe(vocabulary()["tokens"], vocabulary()["merges"], GOLDEN_CASES["core7"])
    for case in CASES:
        expected = case.get("ids_special_core7", case["ids_special"])
        assert core.encode(case["text"], add_special_tokens=False).ids == expected, case["name"]


def test_text_returns(tokenizer: Tokenizer) -> None:
    for case in CASES:
        assert tokenizer.decode(case["ids"]) == tokenizer.decode(case["ids_special"]) == case["decoded"], case["name"]


def test_decode_cases(tokenizer: Tokenizer) -> None:
    for case in DECODE_CASES:
        assert b"".join(map(tokenizer.token_bytes, case["ids"])).hex() == case["bytes_hex"]
        assert tokenizer.decode(case["ids"]) == case["text"]
        stream = tokenizer.stream()
        assert "".join(stream.push([i]) for i in case["ids"]) + stream.flush() == case["text"]


def test_special_ids(tokenizer: Tokenizer) -> None:
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (640, 0, 1)
    for text, i in SPECIALS.items():
        assert tokenizer.token_bytes(i) == text.encode()
        assert tokenizer.encode(text, parse_special=True) == [i]
        assert i not in tokenizer.encode(text)


def test_markers_without_token_types() -> None:
    metadata = gguf_metadata()
    del metadata["tokenizer.ggml.token_type"]
    tokenizer = Tokenizer.from_gguf(metadata, Path("golden.gguf"))
    for case in CASES:
        assert tokenizer.encode(case["text"], parse_special=True) == case["ids_special"], case["name"]


def test_a_character_comes_whole_or_not_at_all(from_gguf: Tokenizer) -> None:
    stream = from_gguf.stream()
    smile = from_gguf.encode("😀")
    assert len(smile) == 4
    assert [stream.push([i]) for i in smile] == ["", "", "", "😀"]
    assert stream.push(smile[:2]) == ""
    assert stream.push(from_gguf.encode("a")) == "\ufffda"
    assert stream.push(smile[:3]) == ""
    assert stream.flush() == "\ufffd"


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_returns(from_gguf: Tokenizer, text: str) -> None:
    assert from_gguf.decode(from_gguf.encode(text)) == text


@given(st.lists(st.integers(0, 639), max_size=30))
def test_streamed_text_is_decoded_text(from_gguf: Tokenizer, ids: list[int]) -> None:
    stream = from_gguf.stream()
    assert "".join(stream.push([i]) for i in ids) + stream.flush() == from_gguf.decode(ids)


def test_bad_input(from_gguf: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="character 1 is not valid Unicode"):
        from_gguf.encode("a\udcff")
    for wrong in (-1, 640):
        with pytest.raises(InputError, match=f"token id {wrong} is outside the vocabulary of 640"):
            from_gguf.decode([wrong])
    path = tmp_path / "tokenizer.json"
    with pytest.raises(InputError, match=r"tokenizer\.json: cannot be read: No such file"):
        Tokenizer.from_file(path)
    for text in (b"", b"{", b"[]", b"\xff", b'{"model": 3}'):
        path.write_bytes(text)
        with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer\.json"):
            Tokenizer.from_file(path)
    build_bpe(["a", "b"], [], []).save(str(path))
    with pytest.raises(InputError, match=rf"tokenizer\.json: added_tokens: {BOS} is missing"):
        Tokenizer.from_file(path)

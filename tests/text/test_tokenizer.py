"""Every case of the golden tokenizer and of V4's own, from GGUF metadata and from a tokenizer.json; the streaming decoder."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import v4_vocabulary
from gguf_files import GOLDEN, vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4jax.errors import InputError
from ds4jax.text import tokenizer as tokenizer_module
from ds4jax.text.tokenizer import BOS, CONTROL, CORE, EOS, NORMAL, USER_DEFINED, Tokenizer, build_bpe

GOLDEN_CASES = json.loads((GOLDEN / "tokenizer_cases.json").read_text("utf-8"))
CASES, DECODE_CASES, SPECIALS = (GOLDEN_CASES[key] for key in ("cases", "decode_cases", "specials"))
V4_CASES = v4_vocabulary.GOLDEN_CASES["cases"]
ROUND_TRIPS = 10_000
# Code points from here to there: ASCII, controls and Latin, the rest of the basic plane around the surrogates, everything above.
RANGES = ((0x20, 0x7E), (0, 0x2FF), (0x300, 0xD7FF), (0x3040, 0x9FFF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF))


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


def v4_metadata() -> dict[str, Any]:
    """V4's vocabulary as a published GGUF file has it."""
    text = v4_vocabulary.path().read_text("utf-8")
    ids = tokenizers.Tokenizer.from_str(text).get_vocab()
    stored = json.loads(text)
    types = np.full(len(ids), NORMAL)
    for token in stored["added_tokens"]:
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    return gguf_metadata() | {
        "deepseek4.vocab_size": 129280,
        "tokenizer.ggml.tokens": sorted(ids, key=ids.__getitem__),
        "tokenizer.ggml.merges": stored["model"]["merges"],
        "tokenizer.ggml.token_type": types,
    }


@pytest.fixture(params=["from_gguf", "from_file"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


def test_ids(tokenizer: Tokenizer) -> None:
    assert len(CASES) == 138
    for case in CASES:
        assert tokenizer.encode(case["text"]) == case["ids"], case["name"]
        assert tokenizer.encode(case["text"], parse_special=True) == case["ids_special"], case["name"]


@pytest.mark.parametrize("source", ["from_gguf", "from_file"])
def test_v4_ids(source: str) -> None:
    file = v4_vocabulary.tokenizer()
    tokenizer = file if source == "from_file" else Tokenizer.from_gguf(v4_metadata(), Path("v4.gguf"))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (129280, 0, 1)
    assert len(V4_CASES) == 138
    for case in V4_CASES:
        assert tokenizer.encode(case["text"]) == case["ids"], case["name"]
        assert tokenizer.encode(case["text"], parse_special=True) == case["ids_special"], case["name"]
        assert tokenizer.decode(case["ids"]) == tokenizer.decode(case["ids_special"]) == case["text"], case["name"]


def test_one_joined_pattern_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "_SPLITS", ("|".join(tokenizer_module._SPLITS),))
    joined = Tokenizer.from_gguf(v4_metadata(), Path("v4.gguf"))
    differ = {case["name"] for case in V4_CASES if joined.encode(case["text"]) != case["ids"]}
    assert "space_digits" in differ
    assert differ <= set(v4_vocabulary.GOLDEN_CASES["differ_if_one_joined_regex"])


@pytest.mark.parametrize("vocabulary", ["golden", "v4"])
def test_core_markers_need_no_token_type(vocabulary: str) -> None:
    metadata = gguf_metadata() if vocabulary == "golden" else v4_metadata()
    metadata["tokenizer.ggml.token_type"] = np.full_like(metadata["tokenizer.ggml.token_type"], NORMAL)
    core = Tokenizer.from_gguf(metadata, Path("core.gguf"))
    golden = GOLDEN_CASES if vocabulary == "golden" else v4_vocabulary.GOLDEN_CASES
    assert tuple(golden["core7"]) == CORE
    assert any("ids_special_core7" in case for case in golden["cases"])
    for case in golden["cases"]:
        expected = case.get("ids_special_core7", case["ids_special"])
        assert core.encode(case["text"], parse_special=True) == expected, case["name"]


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
        assert tokenizer.marker_id(text) == i
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


def random_texts(seed: int) -> list[str]:
    """Texts of 0 to 24 characters that runs of like characters make up."""
    source = random.Random(seed)
    texts = []
    for _ in range(ROUND_TRIPS):
        runs = [(source.choice(RANGES), source.randrange(5)) for _ in range(source.randrange(7))]
        texts.append("".join(chr(source.randint(*limits)) for limits, length in runs for _ in range(length)))
    return texts


@pytest.mark.parametrize("vocabulary", ["golden", "v4"])
def test_ten_thousand_texts_return(from_gguf: Tokenizer, vocabulary: str) -> None:
    tokenizer = from_gguf if vocabulary == "golden" else v4_vocabulary.tokenizer()
    texts = random_texts(seed=7)
    wrong = [text for text in texts if tokenizer.decode(tokenizer.encode(text)) != text]
    assert (len(texts), wrong) == (ROUND_TRIPS, [])


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(TEXTS, st.lists(st.integers(0, 90), max_size=8))
@settings(max_examples=200)
def test_a_stream_shows_every_complete_character_and_no_part_of_one(from_gguf: Tokenizer, text: str, cuts: list[int]) -> None:
    ids = from_gguf.encode(text)
    stream, shown = from_gguf.stream(), ""
    for start, end in itertools.pairwise([0, *sorted(cuts), len(ids)]):
        shown += stream.push(ids[start:end])
        # Valid text cut anywhere is whole characters and the beginning of one, which "ignore" leaves out.
        assert shown == b"".join(map(from_gguf.token_bytes, ids[: max(start, end)])).decode("utf-8", "ignore")
    assert (shown, stream.flush()) == (text, "")


@given(st.lists(st.integers(0, 639), max_size=30))
def test_streamed_text_is_decoded_text(from_gguf: Tokenizer, ids: list[int]) -> None:
    stream = from_gguf.stream()
    assert "".join(stream.push([i]) for i in ids) + stream.flush() == from_gguf.decode(ids)


def test_v4_keeps_its_ids_without_its_place_holders(tmp_path: Path) -> None:
    """The library would give added tokens the next ids that are free."""
    path, raw = tmp_path / "tokenizer.json", json.loads(v4_vocabulary.path().read_text("utf-8"))
    added = [one for one in raw["added_tokens"] if "place▁holder" not in one["content"]]
    assert 0 < len(added) < len(raw["added_tokens"])
    path.write_text(json.dumps(raw | {"added_tokens": added}))
    tokenizer = Tokenizer.from_file(path, 129280)
    for one in added:
        assert tokenizer.marker_id(one["content"]) == one["id"]
        assert tokenizer.encode(one["content"], parse_special=True) == [one["id"]]
    assert tokenizer.decode([128803, 128700]) == "<｜User｜>[PAD128700]"
    for case in V4_CASES[::10]:
        assert tokenizer.encode(case["text"], parse_special=True) == case["ids_special"], case["name"]
        assert tokenizer.encode(case["text"]) == case["ids"], case["name"]


def gaps(path: Path, *, added: dict[str, int], without: str = "", **model: Any) -> Path:
    """The golden vocabulary as a tokenizer.json, with other added tokens and a hole where one token was."""
    bpe = build_bpe(vocabulary()["tokens"], [], [])
    raw = json.loads(bpe.to_str())
    raw["model"]["vocab"].pop(without, None)
    raw["model"] |= model
    marker = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    raw["added_tokens"] = [marker | {"content": text, "id": i} for text, i in added.items()]
    path.write_text(json.dumps(raw))
    return path


def test_added_tokens_in_holes_and_beyond_gaps(tmp_path: Path) -> None:
    words = vocabulary()["tokens"]
    hole = words[300]
    path = gaps(tmp_path / "tokenizer.json", added={BOS: 0, "<low>": 300, "<far>": 650, EOS: 1, "<end>": 643}, without=hole)
    for size, last in ((None, 650), (700, 699)):
        tokenizer = Tokenizer.from_file(path, size)
        assert tokenizer.vocab_size == last + 1
        # A marker of V4's that only the vocabulary lists is one all the same, as in a GGUF file.
        for text, i in {"<low>": 300, "<far>": 650, "<end>": 643, EOS: 1, "<think>": words.index("<think>")}.items():
            assert tokenizer.encode(text, parse_special=True) == [i] == [tokenizer.marker_id(text)]
            assert i not in tokenizer.encode(text)
            assert tokenizer.decode([i]) == text
        assert tokenizer.decode([642, 649, last]) == f"[PAD642][PAD649]{'<far>' if size is None else '[PAD699]'}"
        assert tokenizer.decode(tokenizer.encode("in the beginning 語")) == "in the beginning 語"
    with pytest.raises(InputError, match=r"tokenizer\.json: has 651 tokens; the model of config\.json has 650"):
        Tokenizer.from_file(path, 650)


@pytest.mark.parametrize(
    ("added", "model", "says"),
    [
        ({"<x>": 300}, {}, "'<x>': has id 300, which '.*' also has"),
        ({EOS: 640}, {}, f"'{EOS}': has two ids, 1 and 640"),
        ({"<x>": 640, "<y>": 640}, {}, "'<y>': has id 640, which '<x>' also has"),
        ({"<x>": 2**20}, {}, "'<x>': has id 1048576; ids are 0 to 1048575"),
        ({"[PAD640]": 641}, {}, r"'\[PAD640\]': has id 641; it is the name of the placeholder of 640"),
        ({}, {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}, "not a tokenizer.json of a V4 model: no table of tokens"),
    ],
)
def test_ids_that_contradict_each_other(added: dict[str, int], model: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = gaps(tmp_path / "tokenizer.json", added={BOS: 0} | added, **model)
    with pytest.raises(InputError, match=rf"tokenizer\.json: {says}") as caught:
        Tokenizer.from_file(path)
    assert "\n" not in str(caught.value)


def test_bad_input(from_gguf: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="character 1 is not valid Unicode"):
        from_gguf.encode("a\udcff")
    for wrong in (-1, 640):
        with pytest.raises(InputError, match=f"token id {wrong} is outside the vocabulary of 640"):
            from_gguf.decode([wrong])
    with pytest.raises(InputError, match="tokenizer: a: the vocabulary has no such marker"):
        from_gguf.marker_id("a")
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

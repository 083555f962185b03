"""Converts between text and token ids: byte-level BPE with V4's pre-tokenizer."""

from __future__ import annotations

import codecs
import functools
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from ds4jax.errors import InputError
from ds4jax.files import read_regular

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK, DSML = "<think>", "</think>", "｜DSML｜"
# Markers of every V4 vocabulary, regardless of a file's token types. Other programs also find them by their text.
CORE = (BOS, EOS, USER, ASSISTANT, THINK, END_THINK, DSML)
VOCAB_SIZE_KEY = "deepseek4.vocab_size"
TOKENS_KEY, MERGES_KEY, TYPES_KEY = (f"tokenizer.ggml.{name}" for name in ("tokens", "merges", "token_type"))
KIND, PRE_TOKENIZER = ("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.pre", "joyai-llm")
# ggml's token types that V4 uses. V4's placeholder tokens have type UNUSED.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
MARKERS = (CONTROL, USER_DEFINED, UNUSED)
# Each id needs a row of the embedding; V4 has 129,280 rows.
_LARGEST_ID = (1 << 20) - 1
_MARKER = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}

# Applied in order: each split works inside the pieces of the one before. One joined pattern would give other results.
_SPLITS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def _byte_characters() -> dict[str, int]:
    """Byte of each of GPT-2's printable characters."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_characters()


def pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer `joyai-llm` of GGUF files: three splits in order, then bytes as printable characters."""
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in _SPLITS]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def build_bpe(tokens: Sequence[str], merges: Sequence[str], specials: Sequence[str]) -> tokenizers.Tokenizer:
    """Build a byte-level BPE encoder.

    Args:
        tokens: the vocabulary by id.
        merges: merges ("a b"), best first.
        specials: markers to parse in a text.
    """
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    bpe = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=False))
    bpe.pre_tokenizer = pre_tokenizer()
    bpe.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in specials])
    return bpe


class TextStream:
    """Decodes ids as they arrive. It holds a character back until all of its bytes are there."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete."""
        return self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, ids)))

    def flush(self) -> str:
        """The remaining text at the end: U+FFFD for an incomplete character."""
        return self._decoder.decode(b"", final=True)


class Tokenizer:
    """A model's tokenizer.

    A marker such as `<｜User｜>` in a text becomes the marker's token only with `parse_special`; otherwise it is ordinary text.

    Attributes:
        bos_id, eos_id: ids of the tokens at the beginning and the end of a text. `encode` does not add them.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        special_ids: Collection[int],
        build: Callable[[bool], tokenizers.Tokenizer],
        *,
        bos_id: int,
        eos_id: int,
    ):
        """Make a tokenizer from its parts.

        Args:
            tokens: token texts by id, all different.
            special_ids: ids of the markers.
            build: `build(with_markers)` makes the encoder; called on first use.
            bos_id, eos_id: ids of the tokens at the beginning and the end of a text.
        """
        self.bos_id = bos_id
        self.eos_id = eos_id
        self._tokens = tokens
        self._special_ids = frozenset(special_ids)
        self._markers = {tokens[i]: i for i in special_ids}
        self._bpe = functools.cache(build)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], path: Path) -> Tokenizer:
        """Make the tokenizer of a GGUF file from its metadata, which must contain `deepseek4.vocab_size`.

        Raises:
            InputError: the kind of tokenizer is not supported, or vocabulary, merges and `vocab_size` are inconsistent.
        """
        for key, expected in (KIND, PRE_TOKENIZER):
            found = metadata.get(key)
            if not isinstance(found, str) or found != expected:
                raise InputError(f"{path}: {key}: {str(found)[:60]!r} is not supported; it must be {expected!r}")
        tokens = _strings(metadata, TOKENS_KEY, path)
        merges = _strings(metadata, MERGES_KEY, path)
        vocab_size = metadata[VOCAB_SIZE_KEY]
        if len(tokens) != vocab_size:
            raise InputError(f"{path}: {TOKENS_KEY}: {len(tokens)} entries for a vocab_size of {vocab_size}")
        _check_vocabulary(tokens, merges, path)
        special_ids = _special_ids(metadata, tokens, path)
        specials = [tokens[i] for i in special_ids]
        return cls(
            tokens,
            special_ids,
            lambda with_markers: build_bpe(tokens, merges, specials if with_markers else ()),
            bos_id=token_id(metadata, "bos", path),
            eos_id=token_id(metadata, "eos", path),
        )

    @classmethod
    def from_file(cls, path: str | Path, vocab_size: int | None = None) -> Tokenizer:
        """Make a tokenizer from a `tokenizer.json` file. Every token keeps its id from the file.

        Args:
            path: the file.
            vocab_size: rows of the model's embedding; None: the file's last id + 1. Placeholders fill ids without a token.

        Raises:
            InputError: the file cannot be read, is not a tokenizer, is inconsistent, has no begin or end token, or has more
                tokens than the embedding.
        """
        path = Path(path)
        try:
            text = read_regular(path).decode()
            complete = tokenizers.Tokenizer.from_str(text)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        except Exception as error:  # the library raises nothing narrower
            raise InputError(f"{path}: not a tokenizer.json: {' '.join(str(error).split())[:200]}") from error
        raw = json.loads(text)
        ids = listed(raw, path)
        for token in (BOS, EOS):
            if token not in ids:
                raise InputError(f"{path}: added_tokens: {token} is missing; this is not a V4 tokenizer")
        tokens = by_id(ids, vocab_size or max(ids.values()) + 1, path)
        special_ids = {ids[one["content"]] for one in raw.get("added_tokens", ())}
        special_ids |= {i for i, token in enumerate(tokens) if token in CORE or token not in ids}

        def build(with_markers: bool) -> tokenizers.Tokenizer:
            if not with_markers:
                return tokenizers.Tokenizer.from_str(json.dumps(raw | {"added_tokens": []}))
            if special_ids == complete.get_added_tokens_decoder().keys() and ids == complete.get_vocab():
                return complete
            # The library numbers added tokens in order, but a token of the vocabulary keeps its id.
            added = {one["content"]: one for one in raw.get("added_tokens", ())}
            names = {tokens[i]: i for i in sorted(special_ids)}
            model = raw["model"] | {"vocab": raw["model"]["vocab"] | names}
            marked = [added.get(name, _MARKER | {"content": name}) | {"id": i} for name, i in names.items()]
            return tokenizers.Tokenizer.from_str(json.dumps(raw | {"model": model, "added_tokens": marked}))

        return cls(tokens, special_ids, build, bos_id=ids[BOS], eos_id=ids[EOS])

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return len(self._tokens)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the markers."""
        return self._special_ids

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids of a text. Markers in it are parsed only with `parse_special`.

        Raises:
            InputError: the text has lone surrogates; no tokens can encode them.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"text: character {error.start} is not valid Unicode; give UTF-8 text") from error
        return self._bpe(parse_special).encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, including markers; U+FFFD for bytes that are not UTF-8."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def stream(self) -> TextStream:
        """A decoder for streamed ids."""
        return TextStream(self)

    def marker_id(self, text: str) -> int:
        """Id of a marker such as `<｜User｜>`.

        Raises:
            InputError: the vocabulary does not have the marker.
        """
        if text not in self._markers:
            raise InputError(f"tokenizer: {text}: the vocabulary has no such marker; the model was not made for chat")
        return self._markers[text]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token.

        Raises:
            InputError: the id is outside the vocabulary.
        """
        if not 0 <= token_id < len(self._tokens):
            raise InputError(f"token id {token_id} is outside the vocabulary of {len(self._tokens)}")
        token = self._tokens[token_id]
        if token_id in self._special_ids or not BYTE_OF.keys() >= set(token):
            return token.encode()
        return bytes(map(BYTE_OF.__getitem__, token))


def listed(raw: Mapping[str, Any], path: Path) -> dict[str, int]:
    """Ids of all tokens of a `tokenizer.json`, from its vocabulary and its added tokens.

    Raises:
        InputError: two tokens have one id, a token has two ids, or the file is not a byte-level BPE.
    """
    ids: dict[str, int] = {}
    names: dict[int, str] = {}
    try:
        pairs = [*raw["model"]["vocab"].items(), *((one["content"], one["id"]) for one in raw.get("added_tokens", ()))]
    except (AttributeError, KeyError, TypeError):
        raise InputError(f"{path}: not a tokenizer.json of a V4 model: no table of tokens and ids") from None
    for token, i in pairs:
        if not 0 <= i <= _LARGEST_ID:
            raise InputError(f"{path}: {token[:60]!r}: has id {i}; ids are 0 to {_LARGEST_ID}")
        if ids.setdefault(token, i) != i:
            raise InputError(f"{path}: {token[:60]!r}: has two ids, {ids[token]} and {i}")
        if names.setdefault(i, token) != token:
            raise InputError(f"{path}: {token[:60]!r}: has id {i}, which {names[i][:60]!r} also has")
    return ids


def by_id(ids: Mapping[str, int], vocab_size: int, path: Path) -> list[str]:
    """Tokens in the order of their ids, [vocab_size]. An id without a token gets a placeholder such as `[PAD17]`.

    Raises:
        InputError: there are more tokens than `vocab_size`, or a token has the name of a placeholder.
    """
    if max(ids.values()) >= vocab_size:
        raise InputError(f"{path}: has {max(ids.values()) + 1} tokens; the model of config.json has {vocab_size}")
    tokens = {i: token for token, i in ids.items()}
    for i in set(range(vocab_size)) - tokens.keys():
        tokens[i] = f"[PAD{i}]"
        if tokens[i] in ids:
            raise InputError(f"{path}: {tokens[i]!r}: has id {ids[tokens[i]]}; it is the name of the placeholder of {i}")
    return [tokens[i] for i in range(vocab_size)]


def token_id(metadata: Mapping[str, Any], which: str, path: Path) -> int:
    """The "bos" or "eos" id of a GGUF file: from its metadata, or else the id of V4's marker.

    Raises:
        InputError: the file has neither, or the id is outside the vocabulary.
    """
    key, literal = f"tokenizer.ggml.{which}_token_id", {"bos": BOS, "eos": EOS}[which]
    if key not in metadata:
        tokens = _strings(metadata, TOKENS_KEY, path)
        if literal not in tokens:
            raise InputError(f"{path}: {key}: missing, and the vocabulary has no {literal}")
        return tokens.index(literal)
    value = metadata[key]
    if type(value) is not int or not 0 <= value < metadata[VOCAB_SIZE_KEY]:
        raise InputError(f"{path}: {key}: it must be an integer below {metadata[VOCAB_SIZE_KEY]}")
    return value


def _strings(metadata: Mapping[str, Any], key: str, path: Path) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list):
        raise InputError(f"{path}: {key}: " + ("missing" if value is None else "it must be an array of strings"))
    return value


def _special_ids(metadata: Mapping[str, Any], tokens: list[str], path: Path) -> list[int]:
    core = [i for i, token in enumerate(tokens) if token in CORE]
    if TYPES_KEY not in metadata:
        return sorted({*core, *(i for i, token in enumerate(tokens) if not BYTE_OF.keys() >= set(token))})
    types = metadata[TYPES_KEY]
    if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu" or len(types) != len(tokens):
        raise InputError(f"{path}: {TYPES_KEY}: it must hold one integer for each of the {len(tokens)} tokens")
    return sorted({*core, *np.flatnonzero(np.isin(types, MARKERS)).tolist()})


def _check_vocabulary(tokens: list[str], merges: list[str], path: Path) -> None:
    """Refuse a vocabulary or merges that the library would drop silently or abort on."""
    known = set(tokens)
    if "" in known or len(known) < len(tokens):
        raise InputError(f"{path}: {TOKENS_KEY}: an entry is empty or appears twice")
    if not BYTE_OF.keys() <= known:
        raise InputError(f"{path}: {TOKENS_KEY}: {len(BYTE_OF.keys() - known)} of the 256 bytes have no token")
    for rank, merge in enumerate(merges):
        left, space, right = merge.partition(" ")
        if not space or not {left, right, left + right} <= known:
            raise InputError(f"{path}: {MERGES_KEY}[{rank}]: {merge!r} does not join two tokens to a third")

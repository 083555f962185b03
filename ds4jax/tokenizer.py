"""Text to token ids and back: byte-level BPE with V4's pre-tokenizer."""

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

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
# Markers in every V4 vocabulary, whatever a file's token types say; readers of the published files look these up by their text.
CORE = (BOS, EOS, USER, ASSISTANT, THINK, END_THINK, "｜DSML｜")
VOCAB_SIZE_KEY = "deepseek4.vocab_size"
TOKENS_KEY, MERGES_KEY, TYPES_KEY = (f"tokenizer.ggml.{name}" for name in ("tokens", "merges", "token_type"))
KIND, PRE_TOKENIZER = ("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.pre", "joyai-llm")
# ggml's token types, as far as V4 has them; its place holders are the unused ones.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
MARKERS = (CONTROL, USER_DEFINED, UNUSED)

# Applied one after another: each runs inside the pieces that the one before left, so joining them would change results.
_SPLITS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def _byte_characters() -> dict[str, int]:
    """GPT-2's printable character for every byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_characters()


def pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer that GGUF files call `joyai-llm`: three splits in sequence, then bytes as characters."""
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in _SPLITS]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def build_bpe(tokens: Sequence[str], merges: Sequence[str], specials: Sequence[str]) -> tokenizers.Tokenizer:
    """A byte-level BPE of a vocabulary (position = id), its merges ("a b", best first) and the markers to parse in text."""
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    bpe = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=False))
    bpe.pre_tokenizer = pre_tokenizer()
    bpe.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in specials])
    return bpe


class TextStream:
    """Turns ids into text as they come; a character is held back until all of its bytes are there."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete."""
        return self._decoder.decode(b"".join(map(self._tokenizer.token_bytes, ids)))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)


class Tokenizer:
    """A model's tokenizer.

    Text is taken as text: markers such as `<｜User｜>` in it become their own tokens only with `parse_special`.

    Attributes:
        bos_id, eos_id: the tokens that begin and end a text; `encode` adds neither.
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
        """Args: `tokens` by id ("" where there is none), the ids of markers, and `build(with_markers)`, called when needed."""
        self.bos_id = bos_id
        self.eos_id = eos_id
        self._tokens = tokens
        self._special_ids = frozenset(special_ids)
        self._markers = {tokens[i]: i for i in special_ids}
        self._bpe = functools.cache(build)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], path: Path) -> Tokenizer:
        """Make a tokenizer of a GGUF file's metadata, whose `deepseek4.vocab_size` must be there.

        Raises:
            InputError: another kind of tokenizer, or a vocabulary or merges that contradict themselves or `vocab_size`.
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
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Make a tokenizer of a `tokenizer.json`.

        Raises:
            InputError: a file that cannot be read, is no tokenizer, or lacks the begin or end token.
        """
        try:
            text = Path(path).read_text("utf-8")
            complete = tokenizers.Tokenizer.from_str(text)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        except Exception as error:  # the library raises nothing narrower
            raise InputError(f"{path}: not a tokenizer.json: {' '.join(str(error).split())[:200]}") from error
        plain = json.dumps(json.loads(text) | {"added_tokens": []})
        ids = complete.get_vocab(with_added_tokens=True)
        for token in (BOS, EOS):
            if token not in ids:
                raise InputError(f"{path}: added_tokens: {token} is missing; this is not a V4 tokenizer")
        tokens = [""] * (max(ids.values()) + 1)
        for token, i in ids.items():
            tokens[i] = token
        return cls(
            tokens,
            complete.get_added_tokens_decoder().keys(),
            lambda with_markers: complete if with_markers else tokenizers.Tokenizer.from_str(plain),
            bos_id=ids[BOS],
            eos_id=ids[EOS],
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self._tokens)

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids of a text; markers in it are parsed only with `parse_special`.

        Raises:
            InputError: a text with lone surrogates, which no token can spell.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"text: character {error.start} is not valid Unicode; give UTF-8 text") from error
        return self._bpe(parse_special).encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, markers spelled out, U+FFFD where the bytes are not UTF-8."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def stream(self) -> TextStream:
        """A decoder for ids that come a few at a time."""
        return TextStream(self)

    def marker_id(self, text: str) -> int:
        """The id of a marker such as `<｜User｜>`.

        Raises:
            InputError: the vocabulary has no such marker.
        """
        if text not in self._markers:
            raise InputError(f"tokenizer: {text}: the vocabulary has no such marker; the model was not made for chat")
        return self._markers[text]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for.

        Raises:
            InputError: an id outside the vocabulary.
        """
        if not 0 <= token_id < len(self._tokens):
            raise InputError(f"token id {token_id} is outside the vocabulary of {len(self._tokens)}")
        token = self._tokens[token_id]
        if token_id in self._special_ids or not BYTE_OF.keys() >= set(token):
            return token.encode()
        return bytes(map(BYTE_OF.__getitem__, token))


def token_id(metadata: Mapping[str, Any], which: str, path: Path) -> int:
    """The "bos" or "eos" id of a GGUF file: the one its metadata names, else that of V4's own marker.

    Raises:
        InputError: neither is there, or the id is not in the vocabulary.
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
    """Refuse what the library would drop silently or abort on."""
    known = set(tokens)
    if "" in known or len(known) < len(tokens):
        raise InputError(f"{path}: {TOKENS_KEY}: an entry is empty or appears twice")
    if not BYTE_OF.keys() <= known:
        raise InputError(f"{path}: {TOKENS_KEY}: {len(BYTE_OF.keys() - known)} of the 256 bytes have no token")
    for rank, merge in enumerate(merges):
        left, space, right = merge.partition(" ")
        if not space or not {left, right, left + right} <= known:
            raise InputError(f"{path}: {MERGES_KEY}[{rank}]: {merge!r} does not join two tokens to a third")

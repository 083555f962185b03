"""The vocabulary of a `tokenizer.json` as GGUF metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.loading.hub_config import read_json
from ds4jax.text.tokenizer import (
    CONTROL,
    KIND,
    MERGES_KEY,
    NORMAL,
    PRE_TOKENIZER,
    TOKENS_KEY,
    TYPES_KEY,
    UNUSED,
    USER_DEFINED,
    VOCAB_SIZE_KEY,
    Tokenizer,
    by_id,
    listed,
    pre_tokenizer,
)


def read_vocabulary(path: Path, config: Config) -> dict[str, list[Any]]:
    """Tokens, merges and token types for `write_gguf`, with place holders for ids without a token.

    Raises:
        InputError: not the tokenizer of a V4 model. A GGUF file of this architecture cannot hold another.
    """
    Tokenizer.from_file(path, config.vocab_size)
    raw = read_json(path)
    _require_v4(path, raw)
    ids = listed(raw, path)
    types = [UNUSED] * config.vocab_size
    for i in ids.values():
        types[i] = NORMAL
    for one in raw.get("added_tokens", ()):
        types[one["id"]] = CONTROL if one["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in raw["model"]["merges"]]
    vocabulary: dict[str, list[Any]] = {
        "tokens": by_id(ids, config.vocab_size, path),
        "merges": merges,
        "token_types": types,
    }
    _require_readable(path, config, vocabulary)
    if not merges:
        raise InputError(f"{path}: model.merges: none, and GGUF files hold no empty list; this tokenizer cannot be converted")
    return vocabulary


def _require_v4(path: Path, raw: dict[str, Any]) -> None:
    """Refuse a tokenizer that splits text differently from GGUF files of this architecture."""
    model = raw["model"]
    if model.get("type") != "BPE" or model.get("ignore_merges") or model.get("byte_fallback"):
        raise InputError(f"{path}: model: is not V4's byte-level BPE; only that can be converted")
    if raw.get("normalizer") not in (None, {"type": "Sequence", "normalizers": []}):
        raise InputError(f"{path}: normalizer: V4 has none; this tokenizer cannot be converted")
    if _splits(raw.get("pre_tokenizer")) != _splits(json.loads(pre_tokenizer().__getstate__())):
        raise InputError(f"{path}: pre_tokenizer: is not V4's three splits and bytes; only these can be converted")


def _splits(described: Any) -> Any:
    """A pre-tokenizer without the settings that do not affect splitting."""
    if isinstance(described, str):
        # A pattern may hold these characters or their escapes.
        return described.replace("\r", "\\r").replace("\n", "\\n")
    if isinstance(described, dict):
        return {key: _splits(value) for key, value in described.items() if key != "trim_offsets"}
    return [_splits(value) for value in described] if isinstance(described, list) else described


def _require_readable(path: Path, config: Config, vocabulary: dict[str, list[Any]]) -> None:
    """Read the vocabulary as from the converted file; an error names the file that it came from."""
    metadata = {
        **dict((KIND, PRE_TOKENIZER)),
        TOKENS_KEY: vocabulary["tokens"],
        MERGES_KEY: vocabulary["merges"],
        TYPES_KEY: np.array(vocabulary["token_types"], np.int32),
        VOCAB_SIZE_KEY: config.vocab_size,
        "tokenizer.ggml.bos_token_id": config.bos_id,
        "tokenizer.ggml.eos_token_id": config.eos_id,
    }
    Tokenizer.from_gguf(metadata, path)

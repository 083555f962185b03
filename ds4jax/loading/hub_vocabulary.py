"""The vocabulary of a `tokenizer.json` as GGUF metadata lists it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.loading.hub_config import read_json
from ds4jax.tokenizer import (
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
    pre_tokenizer,
)


def read_vocabulary(path: Path, config: Config) -> dict[str, list[Any]]:
    """Tokens, merges and token types as `write_gguf` takes them, with place holders for ids that have no token.

    Raises:
        InputError: not the tokenizer of a V4 model; a GGUF file could name no other.
    """
    Tokenizer.from_file(path)
    raw = read_json(path)
    _require_v4(path, raw)
    names = dict.fromkeys(range(config.vocab_size), "")
    types = dict.fromkeys(names, UNUSED)
    added = {one["id"]: one for one in raw.get("added_tokens") or ()}
    found = {i: token for token, i in raw["model"]["vocab"].items()} | {i: one["content"] for i, one in added.items()}
    if max(found) >= config.vocab_size:
        raise InputError(f"{path}: has {max(found) + 1} tokens; the model of config.json has {config.vocab_size}")
    for i in names:
        names[i] = found.get(i, f"[PAD{i}]")
        if i in found:
            types[i] = NORMAL if i not in added else CONTROL if added[i]["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in raw["model"]["merges"]]
    vocabulary: dict[str, list[Any]] = {"tokens": list(names.values()), "merges": merges, "token_types": list(types.values())}
    _require_readable(path, config, vocabulary)
    return vocabulary


def _require_v4(path: Path, raw: dict[str, Any]) -> None:
    """Refuse what would read text in another way than GGUF files of this architecture do."""
    model = raw["model"]
    if model.get("type") != "BPE" or model.get("ignore_merges") or model.get("byte_fallback"):
        raise InputError(f"{path}: model: is not V4's byte-level BPE; only that can be converted")
    if raw.get("normalizer") not in (None, {"type": "Sequence", "normalizers": []}):
        raise InputError(f"{path}: normalizer: V4 has none; this tokenizer cannot be converted")
    if _splits(raw.get("pre_tokenizer")) != _splits(json.loads(pre_tokenizer().__getstate__())):
        raise InputError(f"{path}: pre_tokenizer: is not V4's three splits and bytes; only these can be converted")


def _splits(described: Any) -> Any:
    """A pre-tokenizer without what has no part in splitting text."""
    if isinstance(described, str):
        # A pattern may spell these out or escape them.
        return described.replace("\r", "\\r").replace("\n", "\\n")
    if isinstance(described, dict):
        return {key: _splits(value) for key, value in described.items() if key != "trim_offsets"}
    return [_splits(value) for value in described] if isinstance(described, list) else described


def _require_readable(path: Path, config: Config, vocabulary: dict[str, list[Any]]) -> None:
    """Read it as it will be read from the converted file, and name the file that it comes from if that fails."""
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

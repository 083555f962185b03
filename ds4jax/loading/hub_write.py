"""The parts of a checkpoint directory that is written: `config.json`, `tokenizer.json`, the header of a safetensors file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers

from ds4jax.config import Config
from ds4jax.loading.hub_config import IF_PRESENT, KEYS, REQUIRED, YARN_KEYS
from ds4jax.loading.hub_dspark import KEYS as DSPARK_KEYS
from ds4jax.text.tokenizer import CONTROL, UNUSED, USER_DEFINED, build_bpe


def config_json(config: Config) -> dict[str, Any]:
    """The content of `config.json`, from which `hub_config.read_config` makes this configuration, except `n_mtp`.

    With a DSpark drafter it says one block is predicted, as published ones do.
    """
    values = dataclasses.asdict(config)
    raw = REQUIRED | IF_PRESENT | {key: values[field] for field, key in KEYS.items()}
    raw["rope_scaling"] = {"type": "yarn"} | {key: values[field] for field, key in YARN_KEYS.items()}
    if config.n_dspark:
        raw |= {key: values[field] for field, key in DSPARK_KEYS.items()}
    return raw | {"num_nextn_predict_layers": int(bool(config.n_mtp or config.n_dspark))}


def safetensors_header(rows: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """Bytes of a safetensors file before its data, which follows in this order without gaps.

    Args:
        rows: name, type, shape and number of bytes of each tensor.
    """
    header, end = {}, 0
    for name, dtype, shape, nbytes in rows:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    # The format allows spaces after the object, and wants the data aligned to 8 bytes.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tokenizer_json(tokens: Sequence[str], merges: Sequence[str], token_types: Sequence[int]) -> str:
    """The content of `tokenizer.json`; the arguments are those of `write_gguf`. Place holders of unused ids are left out."""
    kinds = dict(zip(tokens, token_types, strict=True))
    bpe = build_bpe(tokens, merges, [token for token, kind in kinds.items() if kind == CONTROL])
    own = [token for token, kind in kinds.items() if kind == USER_DEFINED]
    bpe.add_tokens([tokenizers.AddedToken(token, special=False, normalized=False) for token in own])
    raw = json.loads(bpe.to_str())
    unused = {token for i, token in enumerate(tokens) if token_types[i] == UNUSED and token == f"[PAD{i}]"}
    raw["model"]["vocab"] = {token: i for token, i in raw["model"]["vocab"].items() if token not in unused}
    return json.dumps(raw, ensure_ascii=False)

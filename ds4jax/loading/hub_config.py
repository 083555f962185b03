"""Config of a hub checkpoint: every value of its `config.json` is checked, none is assumed."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.files import read_regular
from ds4jax.loading.limits import require_plausible

KEYS = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "head_dim": "head_dim",
    "rope_dim": "qk_rope_head_dim",
    "q_lora_rank": "q_lora_rank",
    "o_groups": "o_groups",
    "o_lora_rank": "o_lora_rank",
    "window": "sliding_window",
    "n_experts": "n_routed_experts",
    "n_active": "num_experts_per_tok",
    "moe_dim": "moe_intermediate_size",
    "n_hash_layers": "num_hash_layers",
    "route_scale": "routed_scaling_factor",
    "swiglu_limit": "swiglu_limit",
    "compress_ratios": "compress_ratios",
    "rope_theta": "rope_theta",
    "compress_rope_theta": "compress_rope_theta",
    "index_heads": "index_n_heads",
    "index_dim": "index_head_dim",
    "index_topk": "index_topk",
    "hc_mult": "hc_mult",
    "hc_iters": "hc_sinkhorn_iters",
    "hc_eps": "hc_eps",
    "norm_eps": "rms_norm_eps",
    "max_context": "max_position_embeddings",
    "bos_id": "bos_token_id",
    "eos_id": "eos_token_id",
}
YARN_KEYS = {
    "rope_factor": "factor",
    "original_context": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
}
TYPES = {field.name: field.type for field in dataclasses.fields(Config)}

# Values that the model is built for. With other values it would compute wrong results.
REQUIRED: dict[str, Any] = {"model_type": "deepseek_v4", "scoring_func": "sqrtsoftplus"}
IF_PRESENT: dict[str, Any] = {
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
}
LARGEST = 2**31 - 1


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: the file cannot be read, is not JSON, gives a key twice, or holds something other than an object.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice!r} is given twice")
        return result

    try:
        value = json.loads(read_regular(path), object_pairs_hook=once)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); a checkpoint directory needs it") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds {_shown(value)}; it must be a JSON object")
    return value


def read_config(path: Path) -> tuple[Config, dict[str, Any]]:
    """Config without an MTP block, and the content of `config.json`.

    Raises:
        InputError: a key is missing or not usable, or the file describes another architecture; names file and key.

    Source: `config.json` of the V4-Flash checkpoint; `rope_parameters` as Transformers 5 writes it.
    """
    raw = read_json(path)
    _check_architecture(path, raw)
    yarn_key, yarn = _yarn(path, raw)
    thetas = _thetas(raw)
    values = {field: _value(path, key, TYPES[field], thetas | raw) for field, key in KEYS.items()}
    values |= {field: _value(path, f"{yarn_key}.{key}", TYPES[field], yarn) for field, key in YARN_KEYS.items()}
    return _construct(path, **values, n_mtp=0, qat=True), raw


def with_mtp(config: Config, path: Path) -> Config:
    """The same model with the MTP block that its weights hold.

    Raises:
        InputError: `compress_ratios` of the file has no entry for it, or entries for more than it.
    """
    entries, needed = len(config.compress_ratios), config.n_layers + 1
    if entries > needed:
        made = f"{config.n_layers} layers and the MTP block of these weights make {needed}"
        raise InputError(f"{path}: compress_ratios: has {entries} entries; {made}")
    return with_fields(config, path, {"n_mtp": 1})


def with_fields(config: Config, path: Path, fields: dict[str, Any]) -> Config:
    """The same model with other values of some fields.

    Raises:
        InputError: no model can have them.
    """
    return _construct(path, **(dataclasses.asdict(config) | fields))


def _construct(path: Path, **values: Any) -> Config:
    try:
        require_plausible(values)
        return Config(**values)
    except ValueError as error:
        field, _, wrong = str(error).partition(" ")
        key = (KEYS | YARN_KEYS).get(field, field)
        raise InputError(f"{path}: {key}: {wrong}") from error


def _check_architecture(path: Path, raw: dict[str, Any]) -> None:
    for key, expected in REQUIRED.items():
        found = _present(path, key, raw)
        if found != expected:
            raise InputError(f"{path}: {key}: is {_shown(found)}; only {expected} can be loaded")
    for key, expected in IF_PRESENT.items():
        if raw.get(key, expected) != expected:
            raise InputError(f"{path}: {key}: is {_shown(raw[key])}; only {json.dumps(expected)} can be loaded")


def _yarn(path: Path, raw: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The key under which the file describes YaRN, and its value."""
    key = "rope_scaling" if raw.get("rope_scaling") is not None else "rope_parameters"
    yarn = raw.get(key)
    if yarn is None:
        raise InputError(f"{path}: rope_scaling: missing; it must describe YaRN for the compressed layers")
    if isinstance(yarn, dict) and "compress" in yarn:
        key, yarn = f"{key}.compress", yarn["compress"]
    if not isinstance(yarn, dict):
        raise InputError(f"{path}: {key}: is {_shown(yarn)}; it must be an object that describes YaRN")
    kind = yarn.get("type", yarn.get("rope_type"))
    if kind != "yarn":
        raise InputError(f"{path}: {key}.type: is {_shown(kind)}; only yarn can be loaded")
    if yarn.get("attention_factor", 1) not in (1, None):
        raise InputError(f"{path}: {key}.attention_factor: is {_shown(yarn['attention_factor'])}; cos and sin are never scaled")
    return key, yarn


def _thetas(raw: dict[str, Any]) -> dict[str, Any]:
    """Bases of rotation where `rope_parameters` alone gives them."""
    nested = raw.get("rope_parameters")
    parts = {"rope_theta": "main", "compress_rope_theta": "compress"}
    found = {key: nested.get(part) for key, part in parts.items()} if isinstance(nested, dict) else {}
    return {key: part["rope_theta"] for key, part in found.items() if isinstance(part, dict) and "rope_theta" in part}


def _present(path: Path, key: str, raw: dict[str, Any]) -> Any:
    name = key.rpartition(".")[2]
    if raw.get(name) is None:
        raise InputError(f"{path}: {key}: missing; a deepseek_v4 checkpoint must give it")
    return raw[name]


def _value(path: Path, key: str, kind: Any, raw: dict[str, Any]) -> Any:
    value = _present(path, key, raw)
    if kind == "float":
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST and math.isfinite(value):
            return float(value)
        raise InputError(f"{path}: {key}: is {_shown(value)}; it must be a number")
    if kind == "int":
        return _integer(path, key, value)
    if not isinstance(value, list):
        raise InputError(f"{path}: {key}: is {_shown(value)}; it must be a list of integers")
    return tuple(_integer(path, f"{key}[{i}]", ratio) for i, ratio in enumerate(value))


def _integer(path: Path, key: str, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST:
        return value
    raise InputError(f"{path}: {key}: is {_shown(value)}; it must be an integer from 0 to {LARGEST}")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."

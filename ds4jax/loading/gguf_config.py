"""The configuration as GGUF metadata spells it, in both directions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.loading.gguf_header import Header, shown
from ds4jax.loading.limits import require_plausible
from ds4jax.loading.mtp_file import drafter
from ds4jax.tokenizer import token_id

ARCHITECTURE = "deepseek4"
PREFIX = f"{ARCHITECTURE}."
QAT_KEY = "ds4jax.qat"

_COUNT = ("u32",)
_LONG = ("u32", "u64")
_REAL = ("f32",)
_NUMBER = ("f32", "f64", "u32", "i32", "u64")

# Config field, key after the prefix, types it may have; the first is the one we write.
_FIELDS = (
    ("n_layers", "block_count", _COUNT),
    ("max_context", "context_length", _LONG),
    ("dim", "embedding_length", _COUNT),
    ("vocab_size", "vocab_size", _COUNT),
    ("n_heads", "attention.head_count", _COUNT),
    ("head_dim", "attention.key_length", _COUNT),
    ("rope_dim", "rope.dimension_count", _COUNT),
    ("q_lora_rank", "attention.q_lora_rank", _COUNT),
    ("o_lora_rank", "attention.output_lora_rank", _COUNT),
    ("o_groups", "attention.output_group_count", _COUNT),
    ("n_experts", "expert_count", _COUNT),
    ("n_active", "expert_used_count", _COUNT),
    ("moe_dim", "expert_feed_forward_length", _COUNT),
    ("n_hash_layers", "hash_layer_count", _COUNT),
    ("window", "attention.sliding_window", _COUNT),
    ("index_heads", "attention.indexer.head_count", _COUNT),
    ("index_dim", "attention.indexer.key_length", _COUNT),
    ("index_topk", "attention.indexer.top_k", _COUNT),
    ("hc_mult", "hyper_connection.count", _COUNT),
    ("hc_iters", "hyper_connection.sinkhorn_iterations", _COUNT),
    ("hc_eps", "hyper_connection.epsilon", _REAL),
    ("norm_eps", "attention.layer_norm_rms_epsilon", _REAL),
    ("rope_theta", "rope.freq_base", _REAL),
    ("compress_rope_theta", "attention.compress_rope_freq_base", _REAL),
    ("rope_factor", "rope.scaling.factor", _NUMBER),
    ("beta_fast", "rope.scaling.yarn_beta_fast", _NUMBER),
    ("beta_slow", "rope.scaling.yarn_beta_slow", _NUMBER),
    ("original_context", "rope.scaling.original_context_length", _LONG),
    ("route_scale", "expert_weights_scale", _REAL),
)
# What this architecture leaves no choice about; the last two may be absent.
_FIXED = (
    ("attention.head_count_kv", "u32", 1),
    ("expert_shared_count", "u32", 1),
    ("expert_weights_norm", "bool", True),
    ("expert_group_count", "u32", 0),
    ("expert_group_used_count", "u32", 0),
)
_OPTIONAL = ("expert_group_count", "expert_group_used_count")
_RATIOS, _CLAMPS = "attention.compress_ratios", "swiglu_clamp_exp"
_KEY_OF = {field: key for field, key, _ in _FIELDS} | {"compress_ratios": _RATIOS, "swiglu_limit": _CLAMPS}


def read_config(header: Header, *, mtp_file: bool = False) -> Config:
    """Derive the configuration from a file's metadata; `n_mtp` is 1 where the file or its `mtp_file` holds the MTP block.

    Raises:
        InputError: another architecture, a key that is missing or of a wrong type, or values that no model can have.

    Source: the metadata keys of the published deepseek4 GGUF files.
    """
    _require_architecture(header)
    for key, kind, expected in _FIXED:
        if PREFIX + key in header.metadata or key not in _OPTIONAL:
            _require_equal(header, key, (kind,), expected)
    fields = {field: _number(header, key, types) for field, key, types in _FIELDS}
    _require_equal(header, "attention.value_length", _COUNT, fields["head_dim"])
    n_mtp = int(mtp_file or drafter(header.tensors) == "mtp")
    inside = 0 if mtp_file else n_mtp
    ratios = tuple(_array(header, _RATIOS, ("i32[]", "u32[]"), fields["n_layers"] + inside).tolist())
    if mtp_file and len(ratios) == fields["n_layers"]:
        # Files need not say what a block of another file has: no compression.
        ratios += (0,)
    clamps = _array(header, _CLAMPS, ("f32[]", "f64[]"), fields["n_layers"])
    if np.any(clamps != clamps[0]) or not np.isfinite(clamps[0]):
        raise InputError(f"{header.path}: {PREFIX}{_CLAMPS}: it must be one finite value, the same for all layers")
    values = plain_metadata(header)
    try:
        require_plausible(fields)
        return Config(
            **fields,
            compress_ratios=ratios,
            swiglu_limit=_decimal(clamps[0]),
            n_mtp=n_mtp,
            bos_id=token_id(values, "bos", header.path),
            eos_id=token_id(values, "eos", header.path),
            qat=_typed(header, QAT_KEY, ("bool",)) if QAT_KEY in header.metadata else True,
        )
    except InputError:
        raise
    except ValueError as error:
        field, _, rest = str(error).partition(" ")
        raise InputError(f"{header.path}: {PREFIX}{_KEY_OF[field]}: {rest}") from error


def metadata(config: Config) -> list[tuple[str, str, Any]]:
    """Key, type and value of everything that `read_config` needs to give the same configuration again, `n_mtp` aside.

    The architecture itself is not among them: the writer of the `gguf` package adds it.
    """
    entries = [(PREFIX + key, types[0], getattr(config, field)) for field, key, types in _FIELDS]
    entries += [(PREFIX + key, kind, value) for key, kind, value in _FIXED]
    return [
        *entries,
        (f"{PREFIX}attention.value_length", "u32", config.head_dim),
        (PREFIX + _RATIOS, "i32[]", list(config.compress_ratios)),
        (PREFIX + _CLAMPS, "f32[]", [config.swiglu_limit] * config.n_layers),
        (f"{PREFIX}rope.scaling.type", "str", "yarn"),
        (f"{PREFIX}nextn_predict_layers", "u32", config.n_mtp),
        ("tokenizer.ggml.bos_token_id", "u32", config.bos_id),
        ("tokenizer.ggml.eos_token_id", "u32", config.eos_id),
        (QAT_KEY, "bool", config.qat),
    ]


def plain_metadata(header: Header) -> dict[str, Any]:
    """The metadata without its types."""
    return {key: value.value for key, value in header.metadata.items()}


def _require_architecture(header: Header) -> None:
    found = _typed(header, "general.architecture", ("str",))
    if found != ARCHITECTURE:
        raise InputError(f"{header.path}: general.architecture: {shown(found)!r} is not supported; it must be {ARCHITECTURE!r}")


def _require_equal(header: Header, key: str, types: tuple[str, ...], expected: Any) -> None:
    value = _typed(header, PREFIX + key, types)
    if value != expected:
        raise InputError(f"{header.path}: {PREFIX}{key}: {value} is not supported; it must be {expected}")


def _typed(header: Header, key: str, types: tuple[str, ...]) -> Any:
    if key not in header.metadata:
        raise InputError(f"{header.path}: {key}: this metadata key is missing")
    value = header.metadata[key]
    if value.type not in types:
        raise InputError(f"{header.path}: {key}: stored as {value.type}; it must be {' or '.join(types)}")
    return value.value


def _number(header: Header, key: str, types: tuple[str, ...]) -> Any:
    value = _typed(header, PREFIX + key, types)
    if types[0] == "u32":
        return value
    if not math.isfinite(value):
        raise InputError(f"{header.path}: {PREFIX}{key}: {value} is not finite")
    return _decimal(value) if header.metadata[PREFIX + key].type == "f32" else float(value)


def _array(header: Header, key: str, types: tuple[str, ...], least: int) -> np.ndarray:
    array = _typed(header, PREFIX + key, types)
    if len(array) < max(least, 1):
        raise InputError(f"{header.path}: {PREFIX}{key}: {len(array)} entries; layers and MTP block need {least}")
    return array


def _decimal(value: float) -> float:
    """The shortest decimal with the same float32, so that a stored 1e-6 is the 1e-6 of `config.json`."""
    return float(str(np.float32(value)))

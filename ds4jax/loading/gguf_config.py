"""Conversion of the configuration from and to GGUF metadata."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.loading.gguf_header import Header, Value, shown
from ds4jax.loading.limits import require_plausible
from ds4jax.loading.mtp_file import ARCHITECTURE as MTP_ARCHITECTURE
from ds4jax.loading.mtp_file import DSPARK_ARCHITECTURES
from ds4jax.loading.mtp_names import MtpBlock, block_in
from ds4jax.text.tokenizer import TOKENS_KEY, VOCAB_SIZE_KEY, token_id

ARCHITECTURE = "deepseek4"
PREFIX = f"{ARCHITECTURE}."
QAT_KEY = "ds4jax.qat"

_COUNT = ("u32",)
_LONG = ("u32", "u64")
_REAL = ("f32",)
_NUMBER = ("f32", "f64", "u32", "i32", "u64")

# Config field, key after the prefix, types it may have; the first is the one we write.
FIELDS = (
    ("max_context", "context_length", _LONG),
    ("dim", "embedding_length", _COUNT),
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
# Keys that must be there and have this value.
_FIXED = (
    ("attention.head_count_kv", "u32", 1),
    ("expert_shared_count", "u32", 1),
    ("expert_weights_norm", "bool", True),
)
_BLOCKS, VOCABULARY, NEXTN = "block_count", "vocab_size", "nextn_predict_layers"
RATIOS, _CLAMPS, _SHARED_CLAMPS = "attention.compress_ratios", "swiglu_clamp_exp", "swiglu_clamp_shexp"
# Keys that ask for other arithmetic unless they have one of these values; any of them may be absent. Types are not compared.
_NEUTRAL: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("rope.scaling.type", ("yarn",)),
    ("rope.scaling.attn_factor", (1,)),
    ("rope.scaling.yarn_attn_factor", (1,)),
    ("rope.scaling.yarn_ext_factor", (1,)),
    ("rope.scaling.yarn_log_multiplier", (0,)),
    # 4 is the square root of softplus.
    ("expert_gating_func", (4,)),
    ("expert_group_count", (0, 1)),
    ("expert_group_used_count", (0, 1)),
    ("leading_dense_block_count", (0,)),
    ("interleave_moe_layer_step", (0, 1)),
    ("attention.causal", (True,)),
    ("attn_logit_softcapping", (0,)),
    ("final_logit_softcapping", (0,)),
    ("router_logit_softcapping", (0,)),
    ("logit_scale", (0, 1)),
    ("embedding_scale", (0, 1)),
    ("residual_scale", (0, 1)),
)
_YARN = "rope.scaling."
_WITHOUT_YARN = "the file was converted before the fix of 2026-08-06 (llama.cpp 26673); download it again"
_KEY_OF = {field: key for field, key, _ in FIELDS} | {
    "n_layers": _BLOCKS,
    "vocab_size": VOCABULARY,
    "compress_ratios": RATIOS,
    "swiglu_limit": _CLAMPS,
}


def read_config(header: Header, side: MtpBlock | None = None) -> Config:
    """Derive the configuration from a file's metadata; `n_mtp` is 1 where the file holds an MTP block or `side` is given.

    Args:
        side: the MTP block in a file of its own.

    Raises:
        InputError: another architecture, a key that is missing or of a wrong type, or values that no model can have or that ask
            for arithmetic that this model does not have.

    Source: the metadata keys of the published deepseek4 GGUF files, and of llama.cpp's converter and loader.
    """
    _require_architecture(header)
    _require_arithmetic(header)
    fields = {field: _number(header, key, types) for field, key, types in FIELDS}
    _require_equal(header, "attention.value_length", _COUNT, fields["head_dim"])
    inside = block_in(header)
    layers = _layers(header, inside)
    values = plain_metadata(header) | {VOCAB_SIZE_KEY: vocab_size(header)}
    try:
        require_plausible(fields)
        return Config(
            **fields,
            n_layers=layers,
            vocab_size=values[VOCAB_SIZE_KEY],
            compress_ratios=_ratios(header, layers, inside, side),
            swiglu_limit=_clamp(header, layers),
            n_mtp=int(side is not None or inside is not None),
            bos_id=token_id(values, "bos", header.path),
            eos_id=token_id(values, "eos", header.path),
            qat=_typed(header, QAT_KEY, ("bool",)) if QAT_KEY in header.metadata else True,
        )
    except InputError:
        raise
    except ValueError as error:
        field, _, rest = str(error).partition(" ")
        raise InputError(f"{header.path}: {PREFIX}{_KEY_OF[field]}: {rest}") from error


def vocab_size(header: Header) -> int:
    """Rows of the embedding: by `deepseek4.vocab_size`, which llama.cpp does not write, or else the number of tokens.

    Raises:
        InputError: the file tells neither, or key, tokens and embedding contradict each other.
    """
    key, tokens = PREFIX + VOCABULARY, None
    if TOKENS_KEY in header.metadata:
        tokens = len(_typed(header, TOKENS_KEY, ("str[]",)))
    if key in header.metadata:
        given = int(_number(header, VOCABULARY, _COUNT))
        if tokens is not None and tokens != given:
            raise InputError(f"{header.path}: {TOKENS_KEY}: {tokens} entries, but {key} is {given}")
        return given
    if tokens is None:
        raise InputError(f"{header.path}: {key}: this metadata key is missing, and so is {TOKENS_KEY}")
    table = header.tensors.get("token_embd.weight")
    if table is not None and table.shape[0] != tokens:
        raise InputError(f"{header.path}: {TOKENS_KEY}: {tokens} entries, but {table.name} has {table.shape[0]} rows")
    return tokens


def _layers(header: Header, inside: MtpBlock | None) -> int:
    """Number of main layers. llama.cpp's files count an MTP block among the blocks, ds4's do not."""
    key = PREFIX + _BLOCKS
    count = int(_number(header, _BLOCKS, _COUNT))
    if inside is not None and inside.layer is not None:
        if inside.is_alone:
            what = "an MTP block is all that it holds; give the model, and this file as --drafter-file"
            raise InputError(f"{header.path}: blk.{inside.layer}.nextn: {what}")
        if inside.layer not in (count, count - 1):
            raise InputError(f"{header.path}: {key}: is {count}, but the MTP block is blk.{inside.layer}")
        return inside.layer
    predicted = header.metadata.get(PREFIX + NEXTN)
    if predicted is not None and real(predicted) > 0 and inside is None and count > 1:
        last = f"blk.{count - 1}."
        if not any(name.startswith(last) for name in header.tensors):
            raise InputError(f"{header.path}: {PREFIX}{NEXTN}: is {predicted.value} and {key} {count}, but {last}* is missing")
        ratios = _array(header, RATIOS, ("i32[]", "u32[]"), count)
        # No entry is left for a block beyond the layers, and the last one has none of the compression of a last layer.
        if len(ratios) == count and not ratios[-1] and np.any(ratios):
            raise InputError(f"{header.path}: {last}nextn.eh_proj.weight: this tensor is missing; {PREFIX}{NEXTN} asks for it")
    return count


def _ratios(header: Header, layers: int, inside: MtpBlock | None, side: MtpBlock | None) -> tuple[int, ...]:
    """Compression ratios as stored, with one for an MTP block in a file of its own."""
    ratios = tuple(_array(header, RATIOS, ("i32[]", "u32[]"), layers + (inside is not None)).tolist())
    if side is not None:
        # The list may lack an entry for a block in another file: it has no compression.
        return ratios if len(ratios) > layers else (*ratios, 0)
    if inside is not None and len(ratios) > layers + 1:
        found = f"{len(ratios)} entries; {layers} layers and an MTP block make {layers + 1}"
        raise InputError(f"{header.path}: {PREFIX}{RATIOS}: {found}")
    return ratios


def _clamp(header: Header, layers: int) -> float:
    """The limit of the experts' activations, one for routed and shared experts of all layers."""
    found = {}
    for key in (_CLAMPS, _SHARED_CLAMPS):
        if key == _CLAMPS or PREFIX + key in header.metadata:
            value = header.metadata.get(PREFIX + key)
            clamps = np.array([value.value]) if value and value.type == "f32" else _array(header, key, ("f32[]", "f64[]"), layers)
            if np.any(clamps != clamps[0]) or not np.isfinite(clamps[0]):
                raise InputError(f"{header.path}: {PREFIX}{key}: it must be one finite value, the same for all layers")
            found[key] = _decimal(clamps[0])
    limit = found[_CLAMPS]
    if found.get(_SHARED_CLAMPS, limit) != limit:
        said = f"is {found[_SHARED_CLAMPS]}, and {PREFIX}{_CLAMPS} {limit}; one limit for all experts is supported"
        raise InputError(f"{header.path}: {PREFIX}{_SHARED_CLAMPS}: {said}")
    return limit


def key_of(field: str) -> str:
    """The metadata key of a field of the configuration."""
    return PREFIX + _KEY_OF[field]


def metadata(config: Config) -> list[tuple[str, str, Any]]:
    """Key, type and value of all metadata from which `read_config` makes this configuration, except the drafter.

    The `gguf` package's writer adds the architecture's own key.
    """
    entries = [(PREFIX + key, types[0], getattr(config, field)) for field, key, types in FIELDS]
    entries += [(PREFIX + key, kind, value) for key, kind, value in _FIXED]
    return [
        (PREFIX + _BLOCKS, "u32", config.n_layers),
        (PREFIX + VOCABULARY, "u32", config.vocab_size),
        *entries,
        (f"{PREFIX}expert_group_count", "u32", 0),
        (f"{PREFIX}expert_group_used_count", "u32", 0),
        (f"{PREFIX}attention.value_length", "u32", config.head_dim),
        (PREFIX + RATIOS, "i32[]", list(config.compress_ratios)),
        (PREFIX + _CLAMPS, "f32[]", [config.swiglu_limit] * config.n_layers),
        (f"{PREFIX}rope.scaling.type", "str", "yarn"),
        (f"{PREFIX}nextn_predict_layers", "u32", config.n_mtp),
        *(dspark_metadata(config) if config.n_dspark else []),
        ("tokenizer.ggml.bos_token_id", "u32", config.bos_id),
        ("tokenizer.ggml.eos_token_id", "u32", config.eos_id),
        (QAT_KEY, "bool", config.qat),
    ]


def dspark_metadata(config: Config) -> list[tuple[str, str, Any]]:
    """Keys of a DSpark drafter in ds4's files, from which `dspark_file.read_dspark` makes its numbers."""
    prefix = f"{PREFIX}dspark."
    return [
        (f"{prefix}block_size", "u32", config.dspark_block),
        (f"{prefix}markov_rank", "u32", config.dspark_rank),
        (f"{prefix}noise_token_id", "u32", config.dspark_noise_id),
        (f"{prefix}target_layer_ids", "u32[]", list(config.dspark_layers)),
    ]


def plain_metadata(header: Header) -> dict[str, Any]:
    """The metadata without its types."""
    return {key: value.value for key, value in header.metadata.items()}


def _require_architecture(header: Header) -> None:
    found = _typed(header, "general.architecture", ("str",))
    described = ", and the drafter beside it; `ds4jax inspect --drafter-file FILE` describes this file"
    known = dict.fromkeys(DSPARK_ARCHITECTURES, ("a DSpark drafter", described))
    known[MTP_ARCHITECTURE] = ("an MTP file", ", and this file as --drafter-file")
    if found in known:
        what, how = known[found]
        raise InputError(f"{header.path}: general.architecture: {found!r} is {what}, not a model; give the model{how}")
    if found != ARCHITECTURE:
        raise InputError(f"{header.path}: general.architecture: {shown(found)!r} is not supported; it must be {ARCHITECTURE!r}")


def _require_arithmetic(header: Header) -> None:
    """Refuse keys that ask for other arithmetic than this model's."""
    for key, kind, expected in _FIXED:
        _require_equal(header, key, (kind,), expected)
    for key, allowed in _NEUTRAL:
        value = header.metadata.get(PREFIX + key)
        if value is not None and (isinstance(value.value, np.ndarray | list) or value.value not in allowed):
            found = f"{value.type} of {len(value.value)}" if value.type.endswith("[]") else shown(str(value.value))
            raise InputError(
                f"{header.path}: {PREFIX}{key}: {found} is not supported; it must be {' or '.join(map(str, allowed))}"
            )


def _require_equal(header: Header, key: str, types: tuple[str, ...], expected: Any) -> None:
    value = _typed(header, PREFIX + key, types)
    if value != expected:
        raise InputError(f"{header.path}: {PREFIX}{key}: {value} is not supported; it must be {expected}")


def _typed(header: Header, key: str, types: tuple[str, ...]) -> Any:
    if key not in header.metadata:
        why = f"; {_WITHOUT_YARN}" if key.startswith(PREFIX + _YARN) else ""
        raise InputError(f"{header.path}: {key}: this metadata key is missing{why}")
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


def real(value: Value) -> float:
    """A number, or NaN, which equals nothing."""
    return float(value.value) if isinstance(value.value, int | float) else math.nan


def _array(header: Header, key: str, types: tuple[str, ...], needed: int) -> np.ndarray:
    array = _typed(header, PREFIX + key, types)
    if len(array) < max(needed, 1):
        raise InputError(f"{header.path}: {PREFIX}{key}: {len(array)} entries; layers and MTP block need {needed}")
    return array


def _decimal(value: float) -> float:
    """The shortest decimal with the same float32, so that a stored 1e-6 is the 1e-6 of `config.json`."""
    return float(str(np.float32(value)))

"""The files that llama.cpp's converter writes: metadata keys in their order, and the tensors of a model, an MTP file, a drafter.

A model's tensors have the names of `gguf_names`. The MTP block is a layer more, in a file of its own that llama.cpp loads as a
model, with copies of embedding, norm and head. A DSpark drafter is of architecture `dflash`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ds4jax.config import Config
from ds4jax.loading.dspark_names import DFLASH, dflash_name
from ds4jax.loading.flavour import NO_TOKENIZER
from ds4jax.loading.gguf_config import ARCHITECTURE, QAT_KEY
from ds4jax.loading.gguf_names import slots
from ds4jax.loading.gguf_write import Entry, vocabulary_entries
from ds4jax.text.tokenizer import KIND

PADDING = "<｜▁pad▁｜>"
# ggml's number of a file's types, by the type of most values.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32, "MXFP4": 38}
_MTP = {
    "enorm.weight": "nextn.enorm.weight",
    "hnorm.weight": "nextn.hnorm.weight",
    "norm.weight": "nextn.shared_head_norm.weight",
}
_COPIES = ("token_embd.weight", "output_norm.weight", "output.weight")

# Key after the prefix, type, and field of the configuration or of `metadata`. A drafter has no `streams_dim`.
_KEYS = (
    ("block_count", "u32", "layers"),
    ("context_length", "u32", "max_context"),
    ("embedding_length", "u32", "dim"),
    ("attention.head_count", "u32", "n_heads"),
    ("attention.head_count_kv", "u32", "one"),
    ("rope.scaling.type", "str", "yarn"),
    ("rope.scaling.factor", "f32", "rope_factor"),
    ("rope.scaling.original_context_length", "u32", "original_context"),
    ("rope.scaling.yarn_beta_fast", "f32", "beta_fast"),
    ("rope.scaling.yarn_beta_slow", "f32", "beta_slow"),
    ("rope.freq_base", "f32", "rope_theta"),
    ("attention.layer_norm_rms_epsilon", "f32", "norm_eps"),
    ("expert_count", "u32", "n_experts"),
    ("expert_used_count", "u32", "n_active"),
    ("expert_gating_func", "u32", "gating"),
    ("attention.key_length", "u32", "head_dim"),
    ("attention.value_length", "u32", "head_dim"),
    ("rope.dimension_count", "u32", "rope_dim"),
    ("attention.q_lora_rank", "u32", "q_lora_rank"),
    ("attention.sliding_window", "u32", "window"),
    ("expert_feed_forward_length", "u32", "moe_dim"),
    ("expert_shared_count", "u32", "one"),
    ("expert_weights_scale", "f32", "route_scale"),
    ("expert_weights_norm", "bool", "normalised"),
    ("swiglu_clamp_exp", "f32[]", "clamps"),
    ("swiglu_clamp_shexp", "f32[]", "clamps"),
    ("attention.indexer.head_count", "u32", "index_heads"),
    ("attention.indexer.key_length", "u32", "index_dim"),
    ("attention.indexer.top_k", "u32", "index_topk"),
    ("attention.output_group_count", "u32", "o_groups"),
    ("attention.output_lora_rank", "u32", "o_lora_rank"),
    ("attention.compress_ratios", "i32[]", "ratios"),
    ("attention.compress_rope_freq_base", "f32", "compress_rope_theta"),
    ("hyper_connection.count", "u32", "hc_mult"),
    ("hyper_connection.sinkhorn_iterations", "u32", "hc_iters"),
    ("hyper_connection.epsilon", "f32", "hc_eps"),
    ("hash_layer_count", "u32", "n_hash_layers"),
    ("embedding_length_out", "u32", "streams_dim"),
)
# The gating is the square root of softplus.
_FIXED = {"one": 1, "yarn": "yarn", "gating": 4, "normalised": True}

# GGUF name -> parameters that lie in it side by side, on the input axis.
Names = dict[str, tuple[str, ...]]


def model_names(config: Config) -> Names:
    """Tensors of a model's file and their parameters, without its drafter."""
    return {slot.gguf_name: (slot.name,) for slot in slots(dataclasses.replace(config, n_mtp=0, n_dspark=0))}


def mtp_names(config: Config) -> Names:
    """Tensors of the MTP block's own file. `output_hc_*` is the block's own head, the rest is named as a layer."""
    names: Names = {slot.gguf_name: (slot.name,) for slot in slots(config) if slot.gguf_name in _COPIES}
    for slot in slots(config):
        if not slot.name.startswith("mtp.0."):
            continue
        own = slot.gguf_name.removeprefix("mtp.0.")
        layer = f"blk.{config.n_layers}."
        if own.startswith("hc_head_"):
            names[f"output_{own.replace('hc_head_', 'hc_')}"] = (slot.name,)
        elif own == "e_proj.weight":
            names[f"{layer}nextn.eh_proj.weight"] = (slot.name, slot.name.replace("e_proj", "h_proj"))
        elif own != "h_proj.weight":
            names[layer + _MTP.get(own, own)] = (slot.name,)
    return names


def dspark_names(config: Config) -> Names:
    """Tensors of the file of a DSpark drafter."""
    return {dflash_name(slot.gguf_name): (slot.name,) for slot in slots(config) if slot.name.startswith("dspark.")}


def metadata(
    config: Config,
    name: str,
    main_type: str,
    vocabulary: Mapping[str, Sequence[Any]],
    *,
    mtp: bool = False,
    dspark: bool = False,
) -> list[Entry]:
    """All metadata of a file but `general.architecture`, in the converter's order.

    Args:
        name: the model's name. It is the same in the files that belong together.
        main_type: stored type of the experts.
        vocabulary: tokens, merges and token_types, as for `write_gguf`; empty for a model without a tokenizer.
        mtp, dspark: the file is that of the MTP block or of the DSpark drafter.
    """
    prefix = DFLASH if dspark else ARCHITECTURE
    layers = config.n_dspark if dspark else config.n_layers + mtp
    values = dataclasses.asdict(config) | _FIXED
    values |= {"layers": layers, "clamps": [config.swiglu_limit] * layers}
    if dspark:
        values |= {"ratios": [0] * layers, "n_hash_layers": 0}
    else:
        values |= {"ratios": list(config.compress_ratios), "streams_dim": config.hc_mult * config.dim}
    own: list[Entry] = [(f"{prefix}.{key}", kind, values[field]) for key, kind, field in _KEYS if field in values]
    if dspark:
        own.append((f"{prefix}.block_size", "u32", config.dspark_block))
        own.append((f"{prefix}.target_layers", "i32[]", [layer + 1 for layer in config.dspark_layers]))
    elif mtp:
        own.append((f"{prefix}.nextn_predict_layers", "u32", 1))
    return [
        ("general.type", "str", "model"),
        ("general.name", "str", name),
        *own,
        *_tokenizer(config, prefix, vocabulary),
        *([("tokenizer.ggml.mask_token_id", "u32", config.dspark_noise_id)] if dspark else []),
        ("general.quantization_version", "u32", 2),
        *([("general.file_type", "u32", _FILE_TYPES[main_type])] if main_type in _FILE_TYPES else []),
        *([] if config.qat else [(QAT_KEY, "bool", False)]),
    ]


def _tokenizer(config: Config, prefix: str, vocabulary: Mapping[str, Sequence[Any]]) -> list[Entry]:
    ids: list[Entry] = [
        ("tokenizer.ggml.bos_token_id", "u32", config.bos_id),
        ("tokenizer.ggml.eos_token_id", "u32", config.eos_id),
    ]
    if not vocabulary:
        # Without tokens, only this key tells the size.
        return [(f"{prefix}.vocab_size", "u32", config.vocab_size), (KIND[0], "str", NO_TOKENIZER), *ids]
    tokens = vocabulary["tokens"]
    if PADDING in tokens:
        ids.append(("tokenizer.ggml.padding_token_id", "u32", tokens.index(PADDING)))
    flags: list[Entry] = [(f"tokenizer.ggml.add_{which}_token", "bool", False) for which in ("bos", "eos")]
    return [*vocabulary_entries(**vocabulary), *ids, *flags]

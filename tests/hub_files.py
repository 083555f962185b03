"""Checkpoints in the hub's form for tests: published values, and reading and writing safetensors of any type."""

from __future__ import annotations

import json
import re
from pathlib import Path

Raw = dict[str, tuple[str, list[int], bytes]]

# The published values of V4-Flash under the names of its config.json.
V4_FLASH = {
    "model_type": "deepseek_v4",
    "scoring_func": "sqrtsoftplus",
    "bos_token_id": 0,
    "compress_ratios": [0, 0] + [4, 128] * 20 + [4, 0],
    "compress_rope_theta": 160000,
    "eos_token_id": 1,
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
    "max_position_embeddings": 1048576,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_hidden_layers": 43,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 16, "original_max_position_embeddings": 65536, "type": "yarn"},
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "vocab_size": 129280,
}


def read_raw(file: Path) -> Raw:
    """Type, shape and bytes of every tensor of a safetensors file."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return {
        name: (info["dtype"], info["shape"], content[start + info["data_offsets"][0] : start + info["data_offsets"][1]])
        for name, info in header.items()
    }


def write_raw(file: Path, tensors: Raw) -> None:
    """A safetensors file of these tensors, in this order."""
    header, end = {}, 0
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(content)]}
        end += len(content)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(content for _, _, content in tensors.values()))


def published_storage(name: str, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """How V4-Flash's checkpoint stores a parameter: name, type, shape and bytes a value of everything it is made of."""
    head, experts, tail = name.partition(".ffn.experts.")
    if experts:
        rows, columns = shape[1:]
        stacks = [f"{head}{experts}{expert}.{tail}" for expert in range(shape[0])]
        codes = dict.fromkeys(stacks, ("I8", (rows, columns // 2), 1))
        return codes | {part.replace(".weight", ".scale"): ("F8_E8M0", (rows, columns // 32), 1) for part in stacks}
    quantised = r"\.(wq_a|wq_b|wo_a|wo_b|attn\.wkv|[eh]_proj|shared_experts\.w\d)\.weight$"
    if re.search(quantised, name):
        blocks = tuple(-(-size // 128) for size in shape)
        return {name: ("F8_E4M3", shape, 1), name.replace(".weight", ".scale"): ("F8_E8M0", blocks, 1)}
    if name.endswith("tid2eid"):
        return {name: ("I64", shape, 8)}
    return {name: ("BF16", shape, 2) if name.endswith(".weight") else ("F32", shape, 4)}

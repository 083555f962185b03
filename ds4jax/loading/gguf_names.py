"""Which GGUF tensor holds which parameter, and what shape and types it may have there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.loading.gguf_header import Header, TensorInfo

DENSE = ("Q8_0", "BF16", "F32")
EXPERTS = ("IQ2_XXS", "Q2_K", "Q4_K", "MXFP4", "Q8_0", "BF16", "F32")
EMBEDDING = ("F16", "BF16", "F32", "Q8_0")
SMALL = ("F16", "BF16", "F32")
VECTOR = ("F32",)
TABLE = ("I32",)

# Parameter, GGUF name, shape in the axes of `_axes`, types. GGUF counts dimensions from the other end: [in, out, experts].
_GLOBAL = (
    ("embed.weight", "token_embd.weight", "V D", EMBEDDING),
    ("head.weight", "output.weight", "V D", DENSE),
    ("norm.weight", "output_norm.weight", "D", VECTOR),
    ("hc_head_fn", "output_hc_fn.weight", "N ND", SMALL),
    ("hc_head_base", "output_hc_base.weight", "N", VECTOR),
    ("hc_head_scale", "output_hc_scale.weight", "1", VECTOR),
)
_BLOCK = (
    ("hc_attn_fn", "hc_attn_fn.weight", "M ND", SMALL),
    ("hc_attn_base", "hc_attn_base.weight", "M", VECTOR),
    ("hc_attn_scale", "hc_attn_scale.weight", "3", VECTOR),
    ("attn_norm.weight", "attn_norm.weight", "D", VECTOR),
    ("attn.wq_a.weight", "attn_q_a.weight", "A D", DENSE),
    ("attn.q_norm.weight", "attn_q_a_norm.weight", "A", VECTOR),
    ("attn.wq_b.weight", "attn_q_b.weight", "HQ A", DENSE),
    ("attn.wkv.weight", "attn_kv.weight", "Q D", DENSE),
    ("attn.kv_norm.weight", "attn_kv_a_norm.weight", "Q", VECTOR),
    ("attn.attn_sink", "attn_sinks.weight", "H", VECTOR),
    ("attn.wo_a.weight", "attn_output_a.weight", "O HQ/O", DENSE),
    ("attn.wo_b.weight", "attn_output_b.weight", "D O", DENSE),
    ("hc_ffn_fn", "hc_ffn_fn.weight", "M ND", SMALL),
    ("hc_ffn_base", "hc_ffn_base.weight", "M", VECTOR),
    ("hc_ffn_scale", "hc_ffn_scale.weight", "3", VECTOR),
    ("ffn_norm.weight", "ffn_norm.weight", "D", VECTOR),
    ("ffn.gate.weight", "ffn_gate_inp.weight", "E D", SMALL),
    ("ffn.shared_experts.w1.weight", "ffn_gate_shexp.weight", "F D", DENSE),
    ("ffn.shared_experts.w3.weight", "ffn_up_shexp.weight", "F D", DENSE),
    ("ffn.shared_experts.w2.weight", "ffn_down_shexp.weight", "D F", DENSE),
    ("ffn.experts.w1.weight", "ffn_gate_exps.weight", "E F D", EXPERTS),
    ("ffn.experts.w3.weight", "ffn_up_exps.weight", "E F D", EXPERTS),
    ("ffn.experts.w2.weight", "ffn_down_exps.weight", "E D F", EXPERTS),
)
_HASH_ROUTED = (("ffn.gate.tid2eid", "ffn_gate_tid2eid.weight", "V K", TABLE),)
_SCORE_ROUTED = (("ffn.gate.bias", "exp_probs_b.bias", "E", VECTOR),)
_COMPRESSED = (
    ("attn.compressor.ape", "attn_compressor_ape.weight", "C W", SMALL),
    ("attn.compressor.wkv.weight", "attn_compressor_kv.weight", "W D", SMALL),
    ("attn.compressor.wgate.weight", "attn_compressor_gate.weight", "W D", SMALL),
    ("attn.compressor.norm.weight", "attn_compressor_norm.weight", "Q", VECTOR),
)
_INDEXED = (
    ("attn.indexer.wq_b.weight", "indexer.attn_q_b.weight", "JI A", SMALL),
    ("attn.indexer.weights_proj.weight", "indexer.proj.weight", "J D", SMALL),
    ("attn.indexer.compressor.ape", "indexer_compressor_ape.weight", "C X", SMALL),
    ("attn.indexer.compressor.wkv.weight", "indexer_compressor_kv.weight", "X D", SMALL),
    ("attn.indexer.compressor.wgate.weight", "indexer_compressor_gate.weight", "X D", SMALL),
    ("attn.indexer.compressor.norm.weight", "indexer_compressor_norm.weight", "I", VECTOR),
)
_MTP = (
    ("hc_head_fn", "hc_head_fn.weight", "N ND", SMALL),
    ("hc_head_base", "hc_head_base.weight", "N", VECTOR),
    ("hc_head_scale", "hc_head_scale.weight", "1", VECTOR),
    ("e_proj.weight", "e_proj.weight", "D D", DENSE),
    ("h_proj.weight", "h_proj.weight", "D D", DENSE),
    ("enorm.weight", "enorm.weight", "D", VECTOR),
    ("hnorm.weight", "hnorm.weight", "D", VECTOR),
    ("norm.weight", "norm.weight", "D", VECTOR),
)
_Rows = tuple[tuple[str, str, str, tuple[str, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Slot:
    """A parameter of a model and the GGUF tensor that holds it.

    Attributes:
        name: the parameter's name in the published checkpoint.
        gguf_name: the tensor's name.
        shape: shape of both, slowest axis first.
        types: types that the tensor may have.
    """

    name: str
    gguf_name: str
    shape: tuple[int, ...]
    types: tuple[str, ...]


def slots(config: Config) -> Iterator[Slot]:
    """Every parameter of a model, layer by layer.

    The shapes repeat what `ds4jax.model.parameters.shapes` finds by tracing the whole model: a look at a file must be quicker.

    Source: the tensor table of the published deepseek4 GGUF files.
    """
    yield from _slots(_GLOBAL, "", "", _axes(config, 0))
    for i, ratio in enumerate(config.layer_ratios):
        routed = _HASH_ROUTED if i < config.n_hash_layers else _SCORE_ROUTED
        yield from _slots(_block(ratio) + routed, f"layers.{i}.", f"blk.{i}.", _axes(config, ratio))
    if config.n_mtp:
        ratio = config.mtp_ratio
        yield from _slots(_MTP + _block(ratio) + _SCORE_ROUTED, "mtp.0.", "mtp.0.", _axes(config, ratio))


@dataclasses.dataclass(frozen=True)
class Found:
    """A parameter and the tensor that holds it, with the file that it is in."""

    slot: Slot
    header: Header
    info: TensorInfo


def match(header: Header, config: Config, mtp: Header | None = None) -> tuple[list[Found], tuple[str, ...]]:
    """Find every parameter in a file; also returns the names of tensors that the model has no use for.

    Args:
        mtp: the file of the MTP block, where it has its own.

    Raises:
        InputError: a tensor that is missing or has a wrong shape or a type that this tensor never has.
    """
    unused = {id(source): dict(source.tensors) for source in (header, mtp) if source is not None}
    found = []
    for slot in slots(config):
        source = mtp if mtp is not None and slot.name.startswith("mtp.") else header
        where = f"{source.path}: {slot.gguf_name}"
        info = unused[id(source)].pop(slot.gguf_name, None)
        if info is None:
            raise InputError(f"{where}: this tensor is missing")
        if info.shape != slot.shape:
            raise InputError(f"{where}: dimensions {list(info.shape[::-1])}; the metadata asks for {list(slot.shape[::-1])}")
        if info.type not in slot.types:
            raise InputError(f"{where}: type {info.type} is not supported for this tensor; it must be {' or '.join(slot.types)}")
        found.append(Found(slot, source, info))
    for one in found:
        up = one.header.tensors[one.info.name.replace("ffn_gate_exps", "ffn_up_exps")]
        if up.type != one.info.type:
            raise InputError(f"{one.header.path}: {up.name}: type {up.type} differs from the {one.info.type} of {one.info.name}")
    return found, tuple(name for names in unused.values() for name in names)


def _block(ratio: int) -> _Rows:
    if not ratio:
        return _BLOCK
    return _BLOCK + _COMPRESSED + (_INDEXED if ratio == 4 else ())


def _slots(rows: _Rows, prefix: str, gguf_prefix: str, axes: dict[str, int]) -> Iterator[Slot]:
    for name, gguf_name, shape, types in rows:
        yield Slot(prefix + name, gguf_prefix + gguf_name, tuple(axes[axis] for axis in shape.split()), types)


def _axes(config: Config, ratio: int) -> dict[str, int]:
    """Length of each axis of the tables above, in a layer of this compression ratio."""
    # Ratio 4 overlaps: each row serves its own window and the next.
    overlap = 2 if ratio == 4 else 1
    n, d, hq, outputs = config.hc_mult, config.dim, config.n_heads * config.head_dim, config.o_groups * config.o_lora_rank
    return {
        "1": 1,
        "3": 3,
        "V": config.vocab_size,
        "D": d,
        "N": n,
        "ND": n * d,
        "M": config.hc_mixes,
        "A": config.q_lora_rank,
        "H": config.n_heads,
        "Q": config.head_dim,
        "HQ": hq,
        "O": outputs,
        "HQ/O": hq // config.o_groups,
        "E": config.n_experts,
        "K": config.n_active,
        "F": config.moe_dim,
        "C": ratio,
        "W": overlap * config.head_dim,
        "J": config.index_heads,
        "I": config.index_dim,
        "JI": config.index_heads * config.index_dim,
        "X": overlap * config.index_dim,
    }

"""Which GGUF tensor holds which parameter, and what shape and types it may have there."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Iterator

from ds4jax.config import Config
from ds4jax.loading.dspark_names import hub_name
from ds4jax.loading.gguf_header import QUANTISED


class Kind(enum.Enum):
    """What a parameter is. It decides which types a file may store it in and how the device holds it.

    The device holds small matrices as numbers: a quantised one as float32, which has the same values.
    """

    DENSE = "dense"
    EXPERTS = "experts"
    EMBEDDING = "embedding"
    SMALL = "small"
    VECTOR = "vector"
    TABLE = "table"


DENSE, EXPERTS, EMBEDDING, SMALL, VECTOR, TABLE = Kind
_MATRIX = (*QUANTISED, "BF16", "F16", "F32")
_TYPES = dict.fromkeys(Kind, _MATRIX) | {VECTOR: ("F32", "BF16", "F16"), TABLE: ("I32",)}

# Parameter, GGUF name, shape in the axes of `_axes`, kind. GGUF counts dimensions from the other end: [in, out, experts].
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
_DSPARK = (
    ("main_proj.weight", "D TD", DENSE),
    ("main_norm.weight", "D", VECTOR),
    ("norm.weight", "D", VECTOR),
    ("hc_head_fn", "N ND", SMALL),
    ("hc_head_base", "N", VECTOR),
    ("hc_head_scale", "1", VECTOR),
    ("markov_w1.weight", "V R", EMBEDDING),
    ("markov_w2.weight", "V R", DENSE),
    ("confidence.weight", "1 DR", SMALL),
)
_Rows = tuple[tuple[str, str, str, Kind], ...]
# Matrices that multiply one input in one launch, which takes one type of numbers.
TOGETHER = {name for name, _, _, kind in _COMPRESSED + _INDEXED if kind is SMALL and not name.endswith("ape")}


@dataclasses.dataclass(frozen=True)
class Slot:
    """A parameter of a model and the GGUF tensor that holds it.

    Attributes:
        name: the parameter's name in the published checkpoint.
        gguf_name: the tensor's name.
        shape: shape of both, slowest axis first.
        axes: the letters of its axes, as in the tables above.
    """

    name: str
    gguf_name: str
    shape: tuple[int, ...]
    kind: Kind
    axes: tuple[str, ...]

    @property
    def types(self) -> tuple[str, ...]:
        """Types that the tensor may have; the first is the usual one of a large model."""
        return _TYPES[self.kind]


def slots(config: Config) -> Iterator[Slot]:
    """Every parameter of a model, layer by layer.

    The same shapes as `ds4jax.model.parameters.shapes`, which traces the model: too slow for reading a header.

    Source: the tensor table of the published deepseek4 GGUF files.
    """
    yield from _slots(_GLOBAL, "", "", _axes(config, 0))
    for i, ratio in enumerate(config.layer_ratios):
        routed = _HASH_ROUTED if i < config.n_hash_layers else _SCORE_ROUTED
        yield from _slots(_block(ratio) + routed, f"layers.{i}.", f"blk.{i}.", _axes(config, ratio))
    if config.n_mtp:
        ratio = config.mtp_ratio
        yield from _slots(_MTP + _block(ratio) + _SCORE_ROUTED, "mtp.0.", "mtp.0.", _axes(config, ratio))
    if config.n_dspark:
        yield from dspark_slots(config)


def device_form(slot: Slot, stored: str) -> str:
    """How the device holds a parameter, "F32", "Q8_0" and so on, from its type in the file."""
    if slot.kind is VECTOR:
        return "F32"
    if stored in QUANTISED:
        fits = slot.shape[-1] % QUANTISED[stored] == 0
        return stored if fits and slot.kind is not SMALL else "F32"
    return stored


def contradiction(config: Config, ignored: Iterable[str]) -> tuple[str, str] | None:
    """The configuration's field that leaves some of the model's own tensors unused, and the reason; None where no field does.

    Such a model would run and compute wrong values.

    Args:
        ignored: names of unused tensors, as in a published checkpoint or a GGUF file.
    """
    owners: dict[str, tuple[str, int]] = {}
    for i, ratio in enumerate(config.layer_ratios):
        for name, gguf_name, _, _ in _COMPRESSED + _INDEXED:
            owners |= dict.fromkeys((f"layers.{i}.{name}", f"blk.{i}.{gguf_name}"), ("compress_ratios", ratio))
        for name, gguf_name, _, _ in _HASH_ROUTED:
            owners |= dict.fromkeys((f"layers.{i}.{name}", f"blk.{i}.{gguf_name}"), ("n_hash_layers", config.n_hash_layers))
    if config.n_mtp:
        for name, gguf_name, _, _ in _COMPRESSED + _INDEXED:
            names = (f"mtp.0.{name}", f"mtp.0.{gguf_name}", f"blk.{config.n_layers}.{gguf_name}")
            owners |= dict.fromkeys(names, ("compress_ratios", config.mtp_ratio))
    for name in ignored:
        if name in owners:
            field, value = owners[name]
            what = f"gives this layer {value}" if field == "compress_ratios" else f"is {value}"
            return field, f"{what}, but the weights have {name}"
    return None


def _block(ratio: int) -> _Rows:
    if not ratio:
        return _BLOCK
    return _BLOCK + _COMPRESSED + (_INDEXED if ratio == 4 else ())


def _slots(rows: _Rows, prefix: str, gguf_prefix: str, axes: dict[str, int]) -> Iterator[Slot]:
    for name, gguf_name, shape, kind in rows:
        yield _slot(prefix + name, gguf_prefix + gguf_name, shape, kind, axes)


def _slot(name: str, gguf_name: str, letters: str, kind: Kind, lengths: dict[str, int]) -> Slot:
    axes = tuple(letters.split())
    return Slot(name, gguf_name, tuple(lengths[axis] for axis in axes), kind, axes)


def dspark_slots(config: Config) -> Iterator[Slot]:
    """Every parameter of a DSpark drafter."""
    axes = _axes(config, 0)
    for stage in range(config.n_dspark):
        yield from _slots(_block(0) + _SCORE_ROUTED, f"dspark.stages.{stage}.", f"mtp.{stage}.", axes)
    for own, shape, kind in _DSPARK:
        published = hub_name(f"dspark.{own}", config.n_dspark)
        gguf_name = f"{published.removesuffix('.weight')}.weight"
        yield _slot(f"dspark.{own}", gguf_name, shape, kind, axes)


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
        "TD": len(config.dspark_layers) * d,
        "R": config.dspark_rank,
        "DR": d + config.dspark_rank,
    }

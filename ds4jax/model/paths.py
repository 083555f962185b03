"""The gate of the model: decides from static facts which calls run by kernels on CUDA, and gives the reason where none do.

Each function returns why kernels cannot run, in a few words, or None if they can. The rule of a single product is in
`pallas_kernels.core.dispatch`, which also reads the opt-out. `ds4jax inspect --dispatch` prints exactly these answers.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from ds4jax.cache.state import LayerCache, Rows
from ds4jax.config import Config
from pallas_kernels.core.dispatch import opt_out
from pallas_kernels.core.limits import STEP_ROWS
from pallas_kernels.experts import prefill as grouped
from pallas_kernels.experts.fragments import BLOCK, DECODERS
from pallas_kernels.formats import Quantized
from pallas_kernels.hyper_connections.gates import STREAMS
from pallas_kernels.linear.cut import Cut, rows_of
from pallas_kernels.linear.dequantise import RUNS
from pallas_kernels.linear.lane_formats import LANE_FORMATS
from pallas_kernels.linear.meaning import Weight

# Parameters of a block by their dotted names.
Weights = Mapping[str, Any]

DENSE = ("attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_a", "attn.wo_b")
SHARED = ("ffn.shared_experts.w1", "ffn.shared_experts.w2", "ffn.shared_experts.w3")
# Gate, up and down.
EXPERTS = ("ffn.experts.w1", "ffn.experts.w3", "ffn.experts.w2")
# Products of one input in one launch.
COMPRESSED = (
    "attn.compressor.wkv",
    "attn.compressor.wgate",
    "attn.indexer.compressor.wkv",
    "attn.indexer.compressor.wgate",
    "attn.indexer.weights_proj",
    "attn.indexer.wq_b",
)
FLOATS = ("float16", "bfloat16", "float32")
# Widths are multiples of these minimum blocks.
MIN_WIDTH = {"dim": 256, "moe_dim": 256, "head_dim": 64, "index_dim": 32}
# A tensor core's operand has at least this many columns.
MIN_COLUMNS = 16
# Names in JAX of GPUs whose tensor cores take an operand from the registers of a warpgroup.
HOPPER = ("H100", "H200", "GH200", "H800", "H20")
# Names in JAX of GPUs of which all in one host store into each other's memory over NVLink.
PEERS = ("NVIDIA H100 80GB HBM3", "NVIDIA H200")
# Why mailboxes are used where they are asked for alone.
UNMEASURED = "mailboxes are not measured on a GPU yet"
# Drafters whose gathers follow each other: each depends on the one before.
CHAINED = ("none", "mtp", "dspark", "ngram", "mtp+ngram", "dspark+ngram")
# The kinds of calls, where they are the reason.
PROMPT, STEP = "a chunk of a prompt", "a decode step"


def _powers_of_two(**widths: int) -> str | None:
    for name, width in widths.items():
        if width & (width - 1):
            return f"{name} is {width}, not a power of two"
    return None


def _wide_enough(config: Config, *names: str) -> str | None:
    for name in names:
        width, unit = getattr(config, name), MIN_WIDTH[name]
        if width % unit:
            return f"{name} is {width}, not a multiple of {unit}"
    return None


def _no_kernel(name: str, weight: Any, formats: Container[type[Quantized]]) -> str | None:
    weight = rows_of(weight)
    if type(weight) in formats:
        return None
    return f"{name} is {type(weight).__name__ if isinstance(weight, Quantized) else weight.dtype}, which has no kernel"


def _streams(config: Config) -> str | None:
    return None if config.hc_mult == STREAMS else f"hc_mult is {config.hc_mult}, not {STREAMS}"


def why_not_block(config: Config, weights: Weights) -> str | None:
    """Why the decode kernels cannot run a block of these weights; None when they can."""
    names = ("dim", "head_dim", "rope_dim", "q_lora_rank", "moe_dim", "index_dim")
    reason = opt_out() or _streams(config) or _powers_of_two(**{name: getattr(config, name) for name in names})
    reason = reason or _wide_enough(config, *MIN_WIDTH)
    if reason:
        return reason
    for name in (*DENSE, *SHARED, *EXPERTS):
        if reason := _no_kernel(name, weights[name], LANE_FORMATS):
            return reason
    gate, up = (type(rows_of(weights[name])).__name__ for name in EXPERTS[:2])
    if gate != up:
        return f"gate and up experts are of two types, {gate} and {up}"
    floats = {str(weights[name].dtype) if hasattr(weights[name], "dtype") else "" for name in COMPRESSED if name in weights}
    if not floats <= set(FLOATS) or isinstance(weights["ffn.gate"], Quantized):
        return "a compressor, indexer or router weight is quantised"
    return "compressor and indexer weights are of two float types" if len(floats) > 1 else None


def why_not_step(config: Config, blocks: Iterable[Weights], rows: Rows, caches: Sequence[LayerCache]) -> str | None:
    """Why the decode kernels cannot run a call of these rows through blocks; None when they can.

    They write the rings before they read them, so the rings need room for all rows of a sequence.
    """
    if rows.strict:
        return "strict"
    if rows.sees is not None:
        return "what each row sees is given"
    if not rows.decoding:
        return PROMPT
    if rows.position.shape[0] > STEP_ROWS:
        return f"more than {STEP_ROWS} rows"
    if rows.per_sequence > min(cache.window.shape[1] for cache in caches) - config.window:
        return "the rings have no room for the rows"
    return next((reason for weights in blocks if (reason := why_not_block(config, weights))), None)


def why_not_head(config: Config, head: Any, rows: int, *, strict: bool) -> str | None:
    """Why the decode kernels cannot compute the logits of this many rows; None when they can."""
    if strict:
        return "strict"
    if rows > STEP_ROWS:
        return f"more than {STEP_ROWS} rows"
    reason = opt_out() or _streams(config) or _powers_of_two(dim=config.dim) or _wide_enough(config, "dim")
    return reason or _no_kernel("head", head, LANE_FORMATS)


def why_not_prefill_attention(config: Config, rows: Rows, weight: Weight) -> str | None:
    """Why the prefill kernels cannot run the attention of a call of these rows; None when they can.

    Args:
        weight: one of the dense weights. Where they are float32, the caller wants float32 results, or gradients.
    """
    if rows.strict:
        return "strict"
    if rows.decoding:
        return STEP
    if not rows.single:
        return "rows of several sequences"
    if rows.both_ways or rows.sees is not None:
        return "rows that see later ones"
    if not isinstance(weight, Quantized) and weight.dtype == "float32":
        return "float32 weights"
    reason = opt_out() or _powers_of_two(index_heads=config.index_heads, index_dim=config.index_dim)
    if reason:
        return reason
    if config.head_dim & -config.head_dim < MIN_COLUMNS:
        return f"head_dim is {config.head_dim}, not a multiple of {MIN_COLUMNS}"
    return _wide_enough(config, "index_dim")


def why_not_prefill_streams(config: Config, rows: Rows, weight: Weight) -> str | None:
    """Why the prefill kernel cannot compute the gates of a call's streams; None when it can.

    Args:
        weight: as for `why_not_prefill_attention`.
    """
    if rows.strict:
        return "strict"
    if rows.decoding:
        return STEP
    if not isinstance(weight, Quantized) and weight.dtype == "float32":
        return "float32 weights"
    return opt_out() or _streams(config)


def why_not_grouped_experts(config: Config, stacks: Sequence[Weight], *, decoding: bool, strict: bool) -> str | None:
    """Why the prefill kernels cannot run the experts of a call; None when they can.

    Args:
        stacks: gate, up and down, of any types.
        decoding: as in `Rows`.
    """
    if strict:
        return "strict"
    if decoding:
        return STEP
    if reason := opt_out():
        return reason
    for name, stack in zip(EXPERTS, stacks, strict=True):
        if reason := _no_kernel(name, stack, RUNS):
            return reason
    for width in (config.dim, config.moe_dim, *(rows_of(stack).shape[1] for stack in stacks)):
        if not grouped.fits(width, width):
            return f"a width of {width} does not divide into tiles"
    return None


def why_not_stored_experts(config: Config, stacks: Sequence[Weight], device_kind: str) -> str | None:
    """Why grouped experts must dequantise their weights first; None where the products read them as they are stored.

    Args:
        stacks: gate, up and down, for which `why_not_grouped_experts` gives no reason.
        device_kind: the name of the device in JAX.
    """
    if not any(name in device_kind for name in HOPPER):
        return f"{device_kind} is not a Hopper GPU"
    for name, stack in zip(EXPERTS, stacks, strict=True):
        if isinstance(stack, Cut):
            return f"{name} is cut over devices"
        if type(stack) not in DECODERS:
            return f"{name} is {type(stack).__name__}, which the products do not decode"
    if type(stacks[0]) is not type(stacks[1]):
        return f"gate and up experts are of two types, {type(stacks[0]).__name__} and {type(stacks[1]).__name__}"
    for name, width in (("dim", config.dim), ("moe_dim", config.moe_dim)):
        if width % BLOCK:
            return f"{name} is {width}, not a multiple of {BLOCK}"
    return None


def why_not_mailboxes(config: Config, blocks: Iterable[Weights], head: Any) -> str | None:
    """Why decode steps of a model cannot gather outputs by mailboxes; None when they can.

    Mailboxes need gathers that follow each other, which those of the kernels do and those of the modules do not.

    Args:
        blocks: the layers' weights, those of the blocks that draft included.
    """
    reason = next((reason for weights in blocks if (reason := why_not_block(config, weights))), None)
    return reason or why_not_head(config, head, STEP_ROWS, strict=False)


def why_no_peers(kinds: Sequence[str], processes: int) -> str | None:
    """Why devices cannot store into each other's memory; None when they can.

    Args:
        kinds: the devices' names in JAX.
    """
    if len(kinds) == 1:
        return "there is one device"
    if processes > 1:
        return "there are several processes"
    return next((f"{kind} is none of {', '.join(PEERS)}" for kind in kinds if kind not in PEERS), None)


def why_not_mail(rows: int, drafter: str, *, strict: bool) -> str | None:
    """Why a decode step of a model with mailboxes gathers by collectives; None when it uses them.

    Args:
        rows: rows of the step, of all sequences.
        drafter: the drafter's name.
    """
    if strict:
        return "strict"
    if rows > STEP_ROWS:
        return f"more than {STEP_ROWS} rows"
    if drafter not in CHAINED:
        return f"the gathers of {drafter} may not follow each other"
    return opt_out()

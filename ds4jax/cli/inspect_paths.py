"""What `ds4jax inspect` says about paths: which kernels run, for which layers and products they do not, and what that costs."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

from ds4jax.cache.capacity import PREFILL
from ds4jax.config import Config
from ds4jax.loading.checkpoint import Checkpoint, Tensor
from ds4jax.loading.contents import kind_of, layers, split_name
from ds4jax.loading.plan import token_bytes
from ds4jax.model import paths
from pallas_kernels.core.dispatch import choose
from pallas_kernels.core.limits import STEP_ROWS
from pallas_kernels.formats import FORMATS
from pallas_kernels.linear.lane_formats import LANE_FORMATS

FLOAT_BYTES = 4
DSPARK = "dspark"
# Parts that are blocks, in the order of a step.
PARTS = ("layers", "mtp", DSPARK)
# Matrices whose rows are looked up; no product has them.
TABLES = ("embed.weight", "dspark.markov_w1.weight")


def dispatch(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The path of every kind of product. Layers with the same shape and types share a row.

    Returns:
        Rows with product, shape, stored, device (the weight's type there, which decides the path) and count; and for decode,
        prefill and strict each the path on CUDA, the path elsewhere and the reason.
    """
    calls = {"decode": (1, False), "prefill": (PREFILL[-1], False), "strict": (1, True)}
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for tensor in checkpoint.tensors:
        if len(tensor.shape) != 2 or not tensor.name.endswith(".weight") or tensor.name in TABLES:
            continue
        product = re.sub(r"^(layers|mtp|dspark\.stages)\.\d+\.", "", tensor.name).removesuffix(".weight")
        # The router's product is part of choosing experts and always float32.
        if product == "ffn.gate":
            continue
        key = (product, tensor.shape, tensor.stored, tensor.form)
        if key not in rows:
            gate = functools.partial(choose, format=FORMATS.get(tensor.form), half=tensor.form in ("F16", "BF16"))
            choices = {name: gate(m, strict=strict) for name, (m, strict) in calls.items()}
            taken = {name: {"cuda": c.cuda, "default": c.default, "reason": c.reason} for name, c in choices.items()}
            types = {"stored": tensor.stored, "device": tensor.form}
            rows[key] = {"product": product, "shape": list(tensor.shape), **types, "count": 0, **taken}
        rows[key]["count"] += 1
    return list(rows.values())


def decode_step(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Whether the kernels for a complete layer run a decode or verify step. Layers with one reason share a row.

    Returns:
        Rows with part ("layers", "mtp", "dspark" or "head"), layers (which of them, as text), count of blocks, rows (their
        maximum in a step of all sequences), the path on CUDA, the path elsewhere and the reason. A path is "kernels", or
        "modules", where each product takes its path from `dispatch`.
    """
    weights, config = _weights(checkpoint), checkpoint.config
    reasons: dict[tuple[str, str | None], list[str]] = {}
    for (block, _), own in weights.items():
        if block:
            part = block if block in PARTS else PARTS[0]
            reasons.setdefault((part, _why_not(part, config, own)), []).append(block)
    found = [_row(part, reason, blocks, _rows(part, config)) for (part, reason), blocks in reasons.items()]
    found.sort(key=lambda row: (PARTS.index(row["part"]), int(re.match(r"\d*", row["layers"])[0] or 0)))  # type: ignore[index]
    head = weights["", ""]["head"]
    return [*found, _row("head", paths.why_not_head(config, head, STEP_ROWS, strict=False), [""], STEP_ROWS)]


def prompt_experts(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """How the routed experts of a chunk of a prompt are multiplied. Layers with one reason share a row.

    Returns:
        Rows with part, layers and count as for `decode_step`; hopper, cuda and default, the paths on Hopper GPUs, on other CUDA
        devices and elsewhere; and the reason why the first is not "stored". A path is "stored" (grouped by expert, weights are
        read as they are stored), "dequantised" (grouped, weights are dequantised before) or "every row" (every expert is computed
        for all rows).
    """
    found: dict[tuple[str, str | None, str | None], list[str]] = {}
    for (block, _), own in _weights(checkpoint).items():
        if not block or not all(name in own for name in paths.EXPERTS):
            continue
        stacks = [own[name] for name in paths.EXPERTS]
        grouped = paths.why_not_grouped_experts(checkpoint.config, stacks, decoding=False, strict=False)
        stored = paths.why_not_stored_experts(checkpoint.config, stacks, paths.HOPPER[0])
        part = block if block in PARTS else PARTS[0]
        found.setdefault((part, grouped, stored), []).append(block)
    rows = []
    for (part, grouped, stored), blocks in found.items():
        cuda = "every row" if grouped else "dequantised"
        way = {"hopper": cuda if grouped or stored else "stored", "cuda": cuda, "default": "every row"}
        reason = grouped or stored or "widths and types fit"
        rows.append({"part": part, "layers": layers(blocks), "count": len(blocks), **way, "reason": reason})
    return rows


def exchange(checkpoint: Checkpoint) -> dict[str, str]:
    """How GPUs exchange outputs in a decode step, with the reasons: "auto" and "mailbox", each a way and a reason."""
    weights = _weights(checkpoint)
    blocks = [own for (block, _), own in weights.items() if block]
    reason = paths.why_not_mailboxes(checkpoint.config, blocks, weights["", ""]["head"])
    able = f"refused ({reason})" if reason else f"mailboxes, between {' or '.join(paths.PEERS)} of one process"
    return {"auto": f"collectives ({reason or paths.UNMEASURED})", "mailbox": able}


def _weights(checkpoint: Checkpoint) -> dict[tuple[str, str], dict[str, Any]]:
    """The abstract weights of each block, and of each stage of a DSpark drafter, by their dotted names."""
    weights: dict[tuple[str, str], dict[str, Any]] = {}
    for tensor in checkpoint.tensors:
        block, name = split_name(tensor.name)
        weights.setdefault((block, tensor.name.split(".")[2] if block == DSPARK else ""), {})[name] = tensor.abstract
    return weights


def _rows(part: str, config: Config) -> int:
    """Maximum rows in a step of all sequences; the stages of a DSpark drafter run whole blocks."""
    if part != DSPARK or config.dspark_block > STEP_ROWS:
        return config.dspark_block if part == DSPARK else STEP_ROWS
    return STEP_ROWS // config.dspark_block * config.dspark_block


def _why_not(part: str, config: Config, own: dict[str, Any]) -> str | None:
    return f"more than {STEP_ROWS} rows" if _rows(part, config) > STEP_ROWS else paths.why_not_block(config, own)


def _row(part: str, reason: str | None, blocks: list[str], rows: int) -> dict[str, Any]:
    path = {"cuda": "modules" if reason else "kernels", "default": "modules", "reason": reason or "widths and types fit"}
    return {"part": part, "layers": layers(blocks), "count": len(blocks), "rows": rows, **path}


def costs(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Tensors that take more time or memory than their stored types must. Tensors of one class, type and reason share a row.

    Returns:
        Rows with kind (as by `contents.kind_of`), stored, layers, why, read (bytes that a decoded token reads of them on the
        device) and expanded. Where `why` is "float32 in memory", the device holds them as float32, and `expanded` is the bytes
        that this takes beyond the file's. Where it is "no kernel", the type has no kernel for few rows, and `expanded` is the
        bytes of float32 values that a step makes of them.
    """
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    blocks: dict[tuple[str, str, str], list[str]] = {}
    for tensor in checkpoint.tensors:
        why, expanded = _cost(tensor, checkpoint)
        if not why:
            continue
        key = (kind_of(tensor.name), tensor.stored, why)
        row = rows.setdefault(key, dict(zip(("kind", "stored", "why"), key, strict=True)) | {"read": 0, "expanded": 0})
        row["read"] += token_bytes(tensor, checkpoint.config)
        row["expanded"] += expanded
        blocks.setdefault(key, []).append(split_name(tensor.name)[0])
    return [row | {"layers": layers(blocks[key])} for key, row in rows.items()]


def _cost(tensor: Tensor, checkpoint: Checkpoint) -> tuple[str, int]:
    """Why a tensor costs more than it must, or an empty text, and the bytes that it is expanded to."""
    if tensor.form == "F32" and tensor.stored != "F32" and len(tensor.shape) > 1:
        return "float32 in memory", tensor.device_nbytes - tensor.nbytes
    if tensor.form in FORMATS and FORMATS[tensor.form] not in LANE_FORMATS and tensor.name not in TABLES:
        values = math.prod(tensor.shape) * token_bytes(tensor, checkpoint.config) // tensor.device_nbytes
        return "no kernel", values * FLOAT_BYTES
    return "", 0

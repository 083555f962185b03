"""GGUF files in llama.cpp's flavour, made from a small model with its MTP block under `mtp.0.`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Stored = tuple[np.ndarray, gguf.GGMLQuantizationType]
_RENAMED = {name: f"nextn.{name}" for name in ("e_proj.weight", "h_proj.weight", "enorm.weight", "hnorm.weight")}
_RENAMED["norm.weight"] = "nextn.shared_head_norm.weight"
HEAD = ("hc_head_fn.weight", "hc_head_base.weight", "hc_head_scale.weight")
COPIES = ("token_embd.weight", "output.weight", "output_norm.weight")


def main_part(whole: Path) -> dict[str, Stored]:
    """Stored tensors of the model without its block."""
    return {one.name: (one.data, one.tensor_type) for one in gguf.GGUFReader(whole).tensors if not one.name.startswith("mtp.")}


def block(whole: Path, layer: int, *, early: bool = False, head: str = "") -> dict[str, Stored]:
    """Stored tensors of the block under `blk.N.`.

    Args:
        early: two projections instead of a joined one.
        head: how to name the block's own head: "nextn", "output" or "" to leave it out.
    """
    made: dict[str, Stored] = {}
    for one in gguf.GGUFReader(whole).tensors:
        name = one.name.removeprefix("mtp.0.")
        if name == one.name:
            continue
        if name in HEAD:
            names = {"nextn": f"blk.{layer}.nextn.{name}", "output": name.replace("hc_head", "output_hc"), "": ""}
        else:
            names = {head: f"blk.{layer}.{_RENAMED.get(name, name)}"}
        if names[head]:
            made[names[head]] = (one.data, one.tensor_type)
    if not early:
        (e, kind), (h, _) = (made.pop(f"blk.{layer}.nextn.{name}_proj.weight") for name in "eh")
        # Rows of blocks: the embedding's half comes first.
        made[f"blk.{layer}.nextn.eh_proj.weight"] = (np.concatenate([e, h], axis=1), kind)
    return made


def write(
    path: Path,
    source: Path,
    tensors: Mapping[str, Stored],
    more: Mapping[str, Any],
    *,
    without: Collection[str] = (),
    architecture: str = "deepseek4",
) -> Path:
    """Write tensors with the metadata of another file and further keys; texts, integers and lists of integers."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, field in gguf.GGUFReader(source).fields.items():
        if not key.startswith("GGUF.") and key not in {"general.architecture", "deepseek4.vocab_size", *more, *without}:
            writer.add_key_value(key, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None)
    for key, value in more.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

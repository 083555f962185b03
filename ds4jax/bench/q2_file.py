"""Writes files of any size in the layout of the published q2 file, with random blocks, to time and test loading."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np

from ds4jax.config import Config
from ds4jax.loading.gguf_config import ARCHITECTURE
from ds4jax.loading.gguf_header import TENSOR_TYPES, TensorInfo
from ds4jax.loading.gguf_names import DENSE, EMBEDDING, SMALL, Slot, slots
from ds4jax.loading.gguf_write import ALIGNMENT, entries, header
from pallas_kernels.formats import FORMATS

# 435 MB; each tensor is smaller than a tenth of it.
WIDE = Config(
    vocab_size=8192,
    dim=2048,
    n_layers=3,
    n_heads=16,
    head_dim=128,
    rope_dim=32,
    q_lora_rank=512,
    o_groups=4,
    o_lora_rank=256,
    window=32,
    n_experts=64,
    moe_dim=1024,
    n_hash_layers=1,
    compress_ratios=(0, 4, 128, 0),
    original_context=1024,
    index_heads=4,
    index_dim=64,
    index_topk=64,
    max_context=16384,
    n_mtp=0,
)
# 2.9 GB, with tensors of up to 0.35 GB; V4-Flash's largest take 1.1 GB.
_LARGE = dataclasses.replace(WIDE, dim=4096, moe_dim=2048, n_experts=128)
# 29 MB.
_LITTLE = dataclasses.replace(WIDE, dim=512, moe_dim=256, n_experts=16)
_WIDTHS = (_LITTLE, WIDE, _LARGE)
_SINGLE: dict[str, np.dtype] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}


def config_of(nbytes: int) -> Config:
    """Configuration of a model whose tensors take about `nbytes` bytes, at least 29 MB.

    It takes the widest of a few shapes whose three layers take at most 1.25 `nbytes`, and adds layers to approach `nbytes`.
    """
    chosen = next((config for config in reversed(_WIDTHS) if stored_bytes(config) <= 1.25 * nbytes), _LITTLE)
    layer = stored_bytes(_deeper(chosen)) - stored_bytes(chosen)
    while stored_bytes(chosen) + layer / 2 <= nbytes:
        chosen = _deeper(chosen)
    return chosen


def _deeper(config: Config) -> Config:
    """Add one layer; the two kinds alternate."""
    ratio = 4 if config.n_layers % 2 else 128
    return dataclasses.replace(config, n_layers=config.n_layers + 1, compress_ratios=(*config.compress_ratios[:-1], ratio, 0))


def stored_type(slot: Slot) -> str:
    """The type of a parameter in the published q2 file."""
    if ".experts." in slot.name:
        return "Q2_K" if slot.name.endswith("w2.weight") else "IQ2_XXS"
    if slot.kind in (EMBEDDING, SMALL):
        return "F16"
    return "Q8_0" if slot.kind is DENSE else slot.types[0]


def info(slot: Slot) -> TensorInfo:
    """The tensor of a parameter, with offset 0."""
    stored = stored_type(slot)
    _, block, nbytes = next(row for row in TENSOR_TYPES.values() if row[0] == stored)
    return TensorInfo(slot.gguf_name, stored, slot.shape, 0, math.prod(slot.shape) // block * nbytes)


def stored_bytes(config: Config) -> int:
    """Total bytes of a model's tensors."""
    return sum(info(slot).nbytes for slot in slots(config))


def write_q2(path: Path, config: Config, seed: int = 0) -> int:
    """Write a model with one tensor in memory at a time. Returns the bytes of the largest tensor."""
    random = np.random.default_rng(seed)
    infos = [info(slot) for slot in slots(config)]
    with path.open("xb") as file:
        rows = [(one.name, one.shape, one.type, one.nbytes) for one in infos]
        file.write(header(ARCHITECTURE, entries(config), rows))
        for one in infos:
            file.write(_stored(random, one, config.n_experts).data)
            file.write(bytes(-one.nbytes % ALIGNMENT))
    return max(one.nbytes for one in infos)


def _stored(random: np.random.Generator, one: TensorInfo, n_experts: int) -> np.ndarray:
    """A tensor's bytes. Numbers and scales are small and finite."""
    count = math.prod(one.shape)
    if one.type == "I32":
        return random.integers(0, n_experts, count, np.int32)
    if one.type in _SINGLE:
        return (random.standard_normal(count, np.float32) * np.float32(0.02)).astype(_SINGLE[one.type])
    format = FORMATS[one.type]
    blocks = random.integers(0, 256, (count // format.BLOCK, format.BLOCK_BYTES), np.uint8)
    for first in format.FLOAT16:
        # Clear bits of the high byte: the scale is then below 2^-7, with either sign.
        blocks[:, first + 1] &= 0x9F
    return blocks

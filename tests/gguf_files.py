"""GGUF files that the tests of the loader share."""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from ds4jax.config import Config
from ds4jax.loading.gguf_names import slots
from ds4jax.loading.gguf_write import write_gguf

GOLDEN = Path(__file__).parent / "golden" / "gguf"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "golden_gguf"
MAIN, MTP = SHARED / "main.gguf", GOLDEN / "mtp.gguf"
needs_main = pytest.mark.skipif(
    not MAIN.exists(), reason=f"{MAIN.name} (7.5 MB) lies beside the checkout only where it was shared"
)
SMALL = Config(
    vocab_size=640,
    dim=64,
    n_layers=3,
    n_heads=2,
    head_dim=32,
    rope_dim=16,
    q_lora_rank=32,
    o_groups=2,
    o_lora_rank=16,
    window=8,
    n_experts=4,
    n_active=2,
    moe_dim=32,
    n_hash_layers=1,
    compress_ratios=(0, 4, 128, 0),
    original_context=64,
    index_heads=2,
    index_dim=16,
    index_topk=4,
    max_context=1024,
    qat=False,
)


@functools.cache
def vocabulary() -> dict[str, list[Any]]:
    """Tokens, merges and token types of the golden model, as `write_gguf` takes them."""
    return json.loads((GOLDEN / "vocabulary.json").read_text("utf-8"))


def unpacked(name: str, folder: Path) -> Path:
    """A file of the golden set of broken files, unpacked into a folder."""
    path = folder / name.removesuffix(".gz")
    path.write_bytes(gzip.decompress((GOLDEN / "bad" / name).read_bytes()))
    return path


def random_tensors(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """A float32 value of every parameter, expert tables int32."""
    random = np.random.default_rng(seed)
    return {
        slot.name: random.integers(0, config.n_experts, slot.shape, np.int32)
        if slot.name.endswith("tid2eid")
        else random.standard_normal(slot.shape, np.float32)
        for slot in slots(config)
    }


def write_small(path: Path, config: Config = SMALL, **options: Any) -> dict[str, np.ndarray]:
    """Write a small model with the golden vocabulary; returns the values before they were stored."""
    tensors = random_tensors(config)
    write_gguf(path, config, tensors, **vocabulary(), **options)
    return tensors


def rewrite(
    source: Path,
    target: Path,
    architecture: str,
    keep: Callable[[str], bool],
    *,
    keys: bool = True,
    add: str = "",
    more: dict[str, int | list[int]] | None = None,
) -> None:
    """Write the tensors that are kept into another file, last to first, with one more where `add` names it.

    Metadata is kept with `keys`; `more` are further keys, or other values.
    """
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, architecture)
    for key, field in reader.fields.items():
        if keys and not key.startswith("GGUF.") and key not in {"general.architecture", *(more or {})}:
            writer.add_key_value(key, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None)
    for key, value in (more or {}).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_uint32(key, value)
    if add:
        writer.add_tensor(add, np.zeros(4, np.float32))
    for tensor in reversed(reader.tensors):
        if keep(tensor.name):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

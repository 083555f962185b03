"""Small checkpoint directories with random weights, stored as V4-Flash is: FP8 matrices, FP4 experts, bfloat16 and float32.

`python -m ds4jax.random_models.hub FOLDER` writes one whose compression ratios are 0, 4 and 128 as V4-Flash's. llama.cpp loads no
others, so that both programs can run what `ds4jax convert` makes of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ds4jax.config import Config
from ds4jax.loading.dspark_names import hub_name
from ds4jax.loading.gguf_names import slots
from ds4jax.loading.hub import CONFIG, SINGLE, TOKENIZER
from ds4jax.loading.hub_values import FP4_GROUP, fp8_scale_shape
from ds4jax.loading.hub_write import config_json, safetensors_header
from ds4jax.loading.mainline import PADDING
from ds4jax.random_models.layouts import with_dspark
from ds4jax.text.tokenizer import BOS, BYTE_OF, EOS, build_bpe

SMALL_HUB = Config(
    vocab_size=384,
    dim=256,
    n_layers=4,
    n_heads=4,
    head_dim=96,
    rope_dim=32,
    q_lora_rank=64,
    o_groups=2,
    o_lora_rank=32,
    window=16,
    n_experts=8,
    n_active=2,
    moe_dim=256,
    n_hash_layers=1,
    compress_ratios=(0, 4, 128, 4, 0),
    original_context=64,
    index_heads=8,
    index_dim=64,
    index_topk=8,
    max_context=1024,
)
DRAFTERS = ("mtp", "dspark", "none")

_FP8 = re.compile(r"\.(wq_a|wq_b|wo_a|wo_b|attn\.wkv|[eh]_proj|main_proj|shared_experts\.w\d)\.weight$")
# Standard deviation of E4M3 codes as they are made, and of uniform E2M1 codes.
_E4M3, _E2M1 = 64.0, 2.93
_BIAS = 127

# Type, shape and bytes.
_Stored = tuple[str, tuple[int, ...], bytes]


def write_hub(folder: Path, config: Config = SMALL_HUB, drafter: str = "mtp", seed: int = 0) -> None:
    """Write a checkpoint directory with a tokenizer; the same seed gives the same bytes.

    Args:
        config: its shapes; a vocabulary of at most 934 tokens.
        drafter: "mtp" for an MTP block, "dspark" for a DSpark drafter of three layers, "none" for neither.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = _with(config, drafter)
    tensors: dict[str, _Stored] = {}
    for slot in slots(config):
        name = hub_name(slot.name, config.n_dspark)
        random = np.random.default_rng([seed, zlib.crc32(name.encode())])
        tensors |= _stored(random, name, slot.shape, config.n_experts)
    _write_safetensors(folder / SINGLE, tensors)
    (folder / CONFIG).write_text(json.dumps(config_json(config), indent=1))
    _write_tokenizer(folder / TOKENIZER, config.vocab_size)


def _with(config: Config, drafter: str) -> Config:
    """The configuration with this drafter alone."""
    if drafter != "dspark":
        return dataclasses.replace(config, n_mtp=int(drafter == "mtp"))
    return with_dspark(config, noise_id=5, rank=32)


def _stored(random: np.random.Generator, name: str, shape: tuple[int, ...], n_experts: int) -> dict[str, _Stored]:
    """A parameter's stored tensors."""
    if name.endswith("tid2eid"):
        ids = np.argsort(random.random((shape[0], n_experts)), axis=-1)[:, : shape[1]]
        return {name: ("I64", shape, ids.astype("<i8").tobytes())}
    head, experts, tail = name.partition(".ffn.experts.")
    if experts:
        parts = (_fp4(random, f"{head}{experts}{expert}.{tail}", shape[1:]) for expert in range(shape[0]))
        return {one: stored for part in parts for one, stored in part.items()}
    if _FP8.search(name):
        return _fp8(random, name, shape)
    if not name.endswith(".weight"):
        scale = 0.5 if name.endswith("_scale") else shape[-1] ** -0.5 if name.endswith("_fn") else 0.1
        return {name: ("F32", shape, (scale * random.standard_normal(shape)).astype("<f4").tobytes())}
    values = random.standard_normal(shape) * (1.0 if name == "embed.weight" else shape[-1] ** -0.5)
    values = 1 + values if len(shape) == 1 else values
    return {name: ("BF16", shape, values.astype(jnp.bfloat16).tobytes())}


def _fp8(random: np.random.Generator, name: str, shape: tuple[int, ...]) -> dict[str, _Stored]:
    codes = np.clip(random.standard_normal(shape) * _E4M3, -448, 448).astype(jnp.float8_e4m3fn)
    blocks = fp8_scale_shape(shape)
    return {name: ("F8_E4M3", shape, codes.tobytes()), **_scales(random, name, blocks, shape[-1] ** -0.5 / _E4M3)}


def _fp4(random: np.random.Generator, name: str, shape: tuple[int, ...]) -> dict[str, _Stored]:
    rows, columns = shape
    codes = random.integers(0, 256, (rows, columns // 2), np.uint8)
    groups = (rows, columns // FP4_GROUP)
    return {name: ("I8", codes.shape, codes.tobytes()), **_scales(random, name, groups, columns**-0.5 / _E2M1)}


def _scales(random: np.random.Generator, name: str, shape: tuple[int, ...], size: float) -> dict[str, _Stored]:
    """Powers of two about `size`, stored as exponents."""
    exponents = _BIAS + round(math.log2(size)) + random.integers(-1, 2, shape)
    return {name.replace(".weight", ".scale"): ("F8_E8M0", shape, exponents.astype(np.uint8).tobytes())}


def _write_safetensors(path: Path, tensors: dict[str, _Stored]) -> None:
    with path.open("wb") as file:
        file.write(safetensors_header((name, dtype, shape, len(content)) for name, (dtype, shape, content) in tensors.items()))
        for _, _, content in tensors.values():
            file.write(content)


def _write_tokenizer(path: Path, vocab_size: int) -> None:
    """A tokenizer of bytes, three markers, and pairs of letters for the rest."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [BOS, EOS, PADDING, *BYTE_OF]
    pairs = [(one, other) for one in letters for other in letters][: vocab_size - len(tokens)]
    merges = [f"{one} {other}" for one, other in pairs]
    build_bpe([*tokens, *map("".join, pairs)], merges, [BOS, EOS, PADDING]).save(str(path))


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m ds4jax.random_models.hub", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the directory to write")
    parser.add_argument("--drafter", choices=DRAFTERS, default="mtp", help="the drafter that the weights hold (mtp)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the weights (0)")
    options = parser.parse_args(arguments)
    write_hub(options.folder, drafter=options.drafter, seed=options.seed)


if __name__ == "__main__":
    main()

"""Models of random valid blocks, made on the device: speed does not depend on the values, and real weights are 87 GB to read."""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.loading.checkpoint import Checkpoint, Tensor
from ds4jax.loading.gguf_header import TENSOR_TYPES
from ds4jax.loading.gguf_names import DENSE, EXPERTS, TABLE, VECTOR, Slot, slots
from ds4jax.loading.plan import require_fit
from ds4jax.loading.reading import Reading
from ds4jax.model.block import initial_base
from ds4jax.model.parameters import Value, build
from ds4jax.model.transformer import Transformer
from pallas_kernels.formats import FORMATS, Quantized
from pallas_kernels.formats.iq2_xxs import GRID

SMALL_Q2 = Config(
    vocab_size=640,
    dim=256,
    n_layers=6,
    n_heads=4,
    head_dim=128,
    rope_dim=64,
    q_lora_rank=64,
    o_groups=2,
    o_lora_rank=32,
    window=16,
    n_experts=8,
    n_active=2,
    moe_dim=256,
    n_hash_layers=2,
    compress_ratios=(0, 0, 4, 128, 4, 128, 0),
    original_context=64,
    index_heads=8,
    index_dim=64,
    index_topk=8,
    max_context=4096,
)
# All have the types of the published q2 file.
LAYOUTS = {"flash-q2": Config(), "small-q2": SMALL_Q2}

# What a stored type becomes on the device, as the loader has it.
ON_DEVICE = {"F16": jnp.float16, "F32": jnp.float32, "I32": jnp.int32}
# Root mean square of what a block scale of 1 multiplies, for fields drawn uniformly, with the minimum's scale below.
_UNIT = {
    "Q8_0": math.sqrt((256**2 - 1) / 12),
    "IQ2_XXS": math.sqrt((32**2 - 1) / 3) * math.sqrt((GRID.astype(np.float64) ** 2).mean()) / 8,
    "Q2_K": 13.9,
    "Q4_K": 258.0,
}
# A minimum's scale in block scales, with which the mean weight is 0: the mean quant.
_MINIMUM = {"Q2_K": 1.5, "Q4_K": 7.5}
# Bits that a plane's words may have set; all where nothing is said. Q4_K's factors and offsets are of six bits.
_MASK = {("Q4_K", "groups"): 0x3F3F3F3F}
# Spread of what is not a matrix of spread K^-0.5.
_SPREAD = {"embed.weight": 1.0, "attn_sink": 1.0, "gate.bias": 0.01}
_CONSTANT = {"norm.weight": 1.0, "_scale": 0.1, "hc_head_base": 0.0}


def config_of(layout: str, layers: int | None = None) -> Config:
    """A layout's configuration, or its first layers alone.

    Raises:
        InputError: more layers than the layout has.
    """
    whole = LAYOUTS[layout]
    if layers is None or layers == whole.n_layers:
        return whole
    if not 1 <= layers < whole.n_layers:
        raise InputError(f"layers is {layers}; {layout} has {whole.n_layers}")
    return dataclasses.replace(
        whole,
        n_layers=layers,
        n_hash_layers=min(layers, whole.n_hash_layers),
        compress_ratios=(*whole.compress_ratios[:layers], whole.mtp_ratio),
    )


def stored_type(slot: Slot) -> str:
    """The type that the published q2 file, or the file of its MTP block, has for a parameter."""
    mtp = slot.name.startswith("mtp.")
    if slot.types is EXPERTS:
        if mtp:
            return "Q4_K"
        return "Q2_K" if slot.name.endswith("w2.weight") else "IQ2_XXS"
    if slot.types in (DENSE, VECTOR, TABLE):
        return slot.types[0]
    return "F32" if mtp else "F16"


def checkpoint(config: Config, layout: str) -> Checkpoint:
    """Every tensor of a model, to be made on the device when it is read."""
    tensors = tuple(_tensor(config, slot) for slot in slots(config))
    return Checkpoint(Path(layout), "synthetic", config, tensors, None, {})


def synthetic(checkpoint: Checkpoint) -> Transformer:
    """Make the model on the default device, tensor by tensor; none is in memory twice.

    Raises:
        InputError: it has no room for the weights.
    """
    require_fit(checkpoint)
    return build(checkpoint.config, ((tensor.name, tensor.read()) for tensor in checkpoint.tensors))


def _tensor(config: Config, slot: Slot) -> Tensor:
    stored, count = stored_type(slot), math.prod(slot.shape)
    _, block, nbytes = next(row for row in TENSOR_TYPES.values() if row[0] == stored)
    if stored in FORMATS:
        on_device = count // block * FORMATS[stored].DEVICE_BYTES
    else:
        on_device = count * jnp.dtype(ON_DEVICE[stored]).itemsize
    start = functools.partial(Reading.at_once, functools.partial(value, config, slot))
    return Tensor(slot.name, slot.shape, stored, stored, count // block * nbytes, on_device, start)


def value(config: Config, slot: Slot) -> Value:
    """A parameter's value, made on the device; the same in every run."""
    stored = stored_type(slot)
    seed = jnp.uint32(zlib.crc32(slot.name.encode()))
    if stored == "I32":
        return _expert_ids(slot.shape, config.n_experts, seed)
    if slot.name.endswith(("hc_attn_base", "hc_ffn_base")):
        layer = config.n_layers if slot.name.startswith("mtp.") else int(slot.name.split(".")[1])
        return initial_base(config, layer)
    for suffix, constant in _CONSTANT.items():
        if slot.name.endswith(suffix):
            return jnp.full(slot.shape, constant, ON_DEVICE[stored])
    given = (spread for suffix, spread in _SPREAD.items() if slot.name.endswith(suffix))
    spread = next(given, slot.shape[-1] ** -0.5)
    if stored in FORMATS:
        return _blocks(FORMATS[stored], slot.shape, spread, seed)
    return spread_numbers(slot.shape, ON_DEVICE[stored], spread, seed)


def random_bits(shape: tuple[int, ...], seed: jax.Array) -> jax.Array:
    """uint32 of any shape: a multiplicative hash of each value's index, a few operations where threefry takes a hundred."""
    x = jax.lax.iota(jnp.uint32, math.prod(shape)) * jnp.uint32(0x9E3779B1)
    x = ((x ^ (x >> 16)) ^ seed) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 15)) * jnp.uint32(0xC2B2AE35)
    return (x ^ (x >> 16)).reshape(shape)


def _unit(bits: jax.Array) -> jax.Array:
    """Bits to float32 in [0, 1)."""
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def spread_numbers(shape: tuple[int, ...], dtype: jnp.dtype, spread: float, seed: jax.Array) -> jax.Array:
    """Numbers drawn uniformly around 0 with a standard deviation of `spread`."""
    return ((_unit(random_bits(shape, seed)) - 0.5) * (math.sqrt(12) * spread)).astype(dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _expert_ids(shape: tuple[int, ...], n_experts: int, seed: jax.Array) -> jax.Array:
    """Distinct experts for each token, int32 [V, K]: equal steps that never go round to the first."""
    tokens, active = shape
    first = random_bits((tokens, 1), seed) % n_experts
    step = 1 + random_bits((tokens, 1), seed + 1) % (n_experts // active)
    return ((first + step * jnp.arange(active, dtype=jnp.uint32)) % n_experts).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _blocks(format: type[Quantized], shape: tuple[int, ...], spread: float, seed: jax.Array) -> Quantized:
    """A weight [..., N, K] of random blocks in the planes that the format has on the device.

    Scales are drawn within a quarter of one with which weights have a standard deviation of about `spread`.
    """
    name, (*lead, k) = format.__name__, shape
    stored = jax.ShapeDtypeStruct((*lead, k // format.BLOCK, format.BLOCK_BYTES), jnp.uint8)
    planes = jax.eval_shape(format.split, stored)
    made: dict[str, jax.Array] = {}
    for i, field in enumerate(dataclasses.fields(planes)):
        plane = getattr(planes, field.name)
        bits = random_bits(plane.shape, seed + jnp.uint32(0x2BE5AB * i))
        if plane.dtype == jnp.float16:
            scale = spread / _UNIT[name] * (_MINIMUM[name] if field.name == "minima" else 1.0)
            made[field.name] = ((0.75 + 0.5 * _unit(bits)) * scale).astype(jnp.float16)
        else:
            made[field.name] = _integers(bits & jnp.uint32(_MASK.get((name, field.name), 0xFFFFFFFF)), plane.dtype)
    return format(**made)


def _integers(bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """As many of the upper bits as an integer type has, as that type."""
    width = 8 * dtype.itemsize
    unsigned = (bits >> (32 - width)).astype(f"uint{width}")
    return jax.lax.bitcast_convert_type(unsigned, dtype)

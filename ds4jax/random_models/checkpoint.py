"""Models with random weights, made on the device. Speed does not depend on the values, and real weights are 87 GB to read."""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from ds4jax.bounds import own_drafter
from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.loading.checkpoint import Checkpoint, Tensor
from ds4jax.loading.gguf_header import TENSOR_TYPES
from ds4jax.loading.gguf_names import Slot, device_form, slots
from ds4jax.loading.placement import Placement, everywhere
from ds4jax.loading.plan import require_fit
from ds4jax.loading.tensor_reader import Reading
from ds4jax.model.block import initial_base
from ds4jax.model.parameters import Value, build
from ds4jax.model.transformer import Transformer
from ds4jax.random_models.layouts import LAYOUTS
from pallas_kernels.formats import FORMATS, Quantized
from pallas_kernels.formats.base import row_axes
from pallas_kernels.formats.codebook import codebook
from pallas_kernels.formats.iq2_xxs import GRID
from pallas_kernels.formats.mxfp4 import TWICE_E2M1
from pallas_kernels.linear.cut import AXIS

# Device type of each form.
ON_DEVICE = {"F16": jnp.float16, "BF16": jnp.bfloat16, "F32": jnp.float32, "I32": jnp.int32}
# Root mean square of 2 · factor + 1 for uniform four-bit factors.
_ODD = math.sqrt((32**2 - 1) / 3)
# Root mean square of a weight whose block scale is 1 and whose fields are uniform, with the scale of `_MINIMUM`. For formats with
# a codebook it is to be multiplied by that of the codebook.
_UNIT = {
    "Q8_0": math.sqrt((256**2 - 1) / 12),
    "IQ2_XXS": _ODD / 8,
    "IQ2_S": _ODD / 8,
    "IQ3_XXS": _ODD / 4,
    "Q2_K": 13.9,
    "Q4_K": 258.0,
    "Q5_K": 527.0,
    "Q6_K": 1366.0,
    "MXFP4": math.sqrt(np.mean(np.square(TWICE_E2M1, dtype=np.float64))),
}
# Scale of the minimum, as a multiple of the block scale. It is the mean quant, so the mean weight is 0.
_MINIMUM = {"Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}
# Mask of valid bits in a plane's words; by default all. Factors and offsets of Q4_K and Q5_K have six bits.
_MASK = {("Q4_K", "groups"): 0x3F3F3F3F, ("Q5_K", "groups"): 0x3F3F3F3F}
# Standard deviation of parameters by suffix; other parameters have K^-0.5.
_SPREAD = {"embed.weight": 1.0, "attn_sink": 1.0, "gate.bias": 0.01}
_CONSTANT = {"norm.weight": 1.0, "_scale": 0.1, "hc_head_base": 0.0}


def config_of(layout: str, layers: int | None = None) -> Config:
    """Configuration of a layout, with all layers or only the first `layers`.

    Raises:
        InputError: `layers` is below 1 or above the layout's number.
    """
    config = LAYOUTS[layout].config
    if layers is None or layers == config.n_layers:
        return config
    if not 1 <= layers < config.n_layers:
        raise InputError(f"layers is {layers}; {layout} has {config.n_layers}")
    # DSpark reads the last layers, each once.
    taps = len(config.dspark_layers)
    return dataclasses.replace(
        config,
        n_layers=layers,
        n_hash_layers=min(layers, config.n_hash_layers),
        compress_ratios=(*config.compress_ratios[:layers], *config.compress_ratios[config.n_layers :]),
        dspark_layers=tuple(max(layer, 0) for layer in range(layers - taps, layers)) if config.n_dspark else config.dspark_layers,
    )


def checkpoint(config: Config, layout: str) -> Checkpoint:
    """A checkpoint whose tensors are made on the device when they are read."""
    tensors = tuple(_tensor(config, slot, layout) for slot in slots(config))
    return Checkpoint(Path(layout), "synthetic", config, tensors, None, {}, drafter=own_drafter(config))


def synthetic(checkpoint: Checkpoint, devices: Sequence[jax.Device] = ()) -> Transformer:
    """Make the model tensor by tensor. No tensor is in memory twice.

    Args:
        devices: each makes its own rows of what is cut over them, with the values of one device; without any, the default device.

    Raises:
        InputError: the weights do not fit on the devices.
    """
    require_fit(checkpoint, max(len(devices), 1))
    if len(devices) < 2:
        return build(checkpoint.config, ((tensor.name, tensor.read()) for tensor in checkpoint.tensors))
    placement = Placement.of(checkpoint.config, devices)
    return build(checkpoint.config, ((tensor.name, _placed(tensor, placement)) for tensor in checkpoint.tensors))


def _placed(tensor: Tensor, placement: Placement) -> Value:
    """A parameter on all devices: parts of what is cut, copies of everything else."""
    mesh = placement.mesh
    assert isinstance(mesh, Mesh)
    if tensor.name not in placement.cut:
        whole: Value = everywhere(tensor.read(), mesh)
        return whole
    made: Value = _over(mesh, tensor.form, tensor.shape, _spread(tensor.name, tensor.shape), np.uint32(_seed(tensor.name)))
    return made


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _over(mesh: Mesh, form: str, shape: tuple[int, ...], spread: float, seed: jax.Array) -> Value:
    """A random matrix or stack cut over a mesh. All devices make their rows at the same time, in one program."""
    *lead, n, k = shape
    own = n // mesh.size

    def part(seed: jax.Array) -> Value:
        share = Share(jax.lax.axis_index(AXIS).astype(jnp.uint32) * own, n)
        return _random(form, (*lead, own, k), spread, seed, share)

    whole = jax.eval_shape(functools.partial(_random, form, shape, spread), seed)
    placed = Placement(mesh, frozenset({""})).abstract("", whole)
    specs = jax.tree.map(lambda plane: plane.sharding.spec, placed)
    made: Value = jax.shard_map(part, mesh=mesh, in_specs=PartitionSpec(), out_specs=specs, check_vma=False)(seed)
    return made


def _tensor(config: Config, slot: Slot, layout: str) -> Tensor:
    stored, count = LAYOUTS[layout].stored_type(slot, config.n_layers), math.prod(slot.shape)
    form = device_form(slot, stored)
    _, block, nbytes = next(row for row in TENSOR_TYPES.values() if row[0] == stored)
    if form in FORMATS:
        on_device = count // block * FORMATS[form].DEVICE_BYTES
    else:
        on_device = count * jnp.dtype(ON_DEVICE[form]).itemsize

    def start(rows: slice | None) -> Reading:
        return Reading.at_once(functools.partial(value, config, slot, layout, rows))

    return Tensor(slot.name, slot.shape, stored, form, count // block * nbytes, on_device, start)


def value(config: Config, slot: Slot, layout: str, rows: slice | None = None) -> Value:
    """A parameter's value, made on the device. It is the same in every run.

    Args:
        rows: make only these, of the second axis from the end; None stands for all.
    """
    form = device_form(slot, LAYOUTS[layout].stored_type(slot, config.n_layers))
    if form == "I32":
        return _expert_ids(slot.shape, config.n_experts, jnp.uint32(_seed(slot.name)))
    if slot.name.endswith(("hc_attn_base", "hc_ffn_base")):
        part, number = slot.name.removeprefix("dspark.").split(".")[:2]
        return jnp.asarray(initial_base(config, int(number) + (0 if part == "layers" else config.n_layers)))
    for suffix, constant in _CONSTANT.items():
        if slot.name.endswith(suffix):
            return jnp.full(slot.shape, constant, ON_DEVICE[form])
    shape, share = slot.shape, None
    if rows is not None:
        *lead, n, k = slot.shape
        shape, share = (*lead, rows.stop - rows.start, k), Share(jnp.uint32(rows.start), n)
    return _random(form, shape, _spread(slot.name, slot.shape), jnp.uint32(_seed(slot.name)), share)


def _seed(name: str) -> int:
    return zlib.crc32(name.encode())


def _spread(name: str, shape: tuple[int, ...]) -> float:
    """Standard deviation of a parameter with random values."""
    given = (spread for suffix, spread in _SPREAD.items() if name.endswith(suffix))
    return next(given, shape[-1] ** -0.5)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Share:
    """Says that an array is some rows of a larger one, whose values it gets.

    Attributes:
        first: uint32 [], the index of the first row.
        whole: static; the number of rows of the larger one.
    """

    first: jax.Array
    whole: int = dataclasses.field(metadata={"static": True})


def _random(form: str, shape: tuple[int, ...], spread: float, seed: jax.Array, share: Share | None = None) -> Value:
    """Random values [..., N, K] of any form."""
    if form in FORMATS:
        return random_weight(FORMATS[form], shape, spread, seed, share)
    return spread_numbers(shape, ON_DEVICE[form], spread, seed, share)


def random_bits(shape: tuple[int, ...], seed: jax.Array, share: Share | None = None, axis: int = -2) -> jax.Array:
    """Random uint32 of any shape: a multiplicative hash of each index. It takes a few operations; threefry takes a hundred.

    Args:
        share: makes the bits of these rows of a larger array, `axis` being the axis of rows from the end.
    """
    x = jax.lax.iota(jnp.uint32, math.prod(shape))
    if share is not None:
        # The index in the larger array.
        row = math.prod(shape[axis:][1:])
        between = (share.whole - shape[axis]) * row % 2**32
        x += x // jnp.uint32(shape[axis] * row) * jnp.uint32(between) + share.first * jnp.uint32(row)
    x *= jnp.uint32(0x9E3779B1)
    x = ((x ^ (x >> 16)) ^ seed) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 15)) * jnp.uint32(0xC2B2AE35)
    return (x ^ (x >> 16)).reshape(shape)


def _unit(bits: jax.Array) -> jax.Array:
    """float32 in [0, 1) from random bits."""
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def spread_numbers(
    shape: tuple[int, ...], dtype: jnp.dtype, spread: float, seed: jax.Array, share: Share | None = None
) -> jax.Array:
    """Uniform random numbers with mean 0 and standard deviation `spread`; with `share`, those of rows of a larger array."""
    return ((_unit(random_bits(shape, seed, share)) - 0.5) * (math.sqrt(12) * spread)).astype(dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _expert_ids(shape: tuple[int, ...], n_experts: int, seed: jax.Array) -> jax.Array:
    """Distinct experts for each token, int32 [V, K]: a random first expert, then equal steps too short to wrap to it."""
    tokens, active = shape
    first = random_bits((tokens, 1), seed) % n_experts
    step = 1 + random_bits((tokens, 1), seed + 1) % (n_experts // active)
    return ((first + step * jnp.arange(active, dtype=jnp.uint32)) % n_experts).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def random_weight(
    format: type[Quantized], shape: tuple[int, ...], spread: float, seed: jax.Array, share: Share | None = None
) -> Quantized:
    """A weight [..., N, K] of random blocks, in the format's planes on the device.

    Scales are within 25 % of the value that gives the weights a standard deviation of about `spread`. With `share`, the blocks
    are those of rows of a larger weight.
    """
    name, (*lead, k) = format.__name__, shape
    stored = jax.ShapeDtypeStruct((*lead, k // format.BLOCK, format.BLOCK_BYTES), jnp.uint8)
    planes = jax.eval_shape(format.split, stored)
    scale = spread / _unit_of(name)
    made: dict[str, jax.Array] = {}
    for i, (field, axis) in enumerate(zip(dataclasses.fields(planes), row_axes(format), strict=True)):
        plane = getattr(planes, field.name)
        bits = random_bits(plane.shape, seed + jnp.uint32(0x2BE5AB * i), share, axis)
        if plane.dtype == jnp.float16:
            multiple = scale * (_MINIMUM[name] if field.name == "minima" else 1.0)
            made[field.name] = ((0.75 + 0.5 * _unit(bits)) * multiple).astype(jnp.float16)
        elif field.name == "exponents":
            made[field.name] = _exponents(bits, scale)
        else:
            made[field.name] = _integers(bits & jnp.uint32(_MASK.get((name, field.name), 0xFFFFFFFF)), plane.dtype)
    return format(**made)


def _unit_of(name: str) -> float:
    """The entry of `_UNIT` for a format, with its codebook."""
    if not name.startswith("IQ"):
        return _UNIT[name]
    patterns = GRID if name == "IQ2_XXS" else codebook(name)
    return _UNIT[name] * math.sqrt((patterns.astype(np.float64) ** 2).mean())


def _exponents(bits: jax.Array, scale: float) -> jax.Array:
    """Exponents of MXFP4, uint8: the two powers of two around `scale`, so often that their mean square is its square."""
    lower = math.floor(math.log2(scale))
    share = (4.0 ** (math.log2(scale) - lower) - 1) / 3
    return (128 + lower + (_unit(bits) < share).astype(jnp.int32)).astype(jnp.uint8)


def _integers(bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The upper bits as an integer type, as many as it has."""
    width = 8 * dtype.itemsize
    unsigned = (bits >> (32 - width)).astype(f"uint{width}")
    return jax.lax.bitcast_convert_type(unsigned, dtype)

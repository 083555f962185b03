"""Stored bytes to parameter values and back, one function for each direction."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.errors import InputError
from ds4jax.loading.gguf_header import Header, TensorInfo, shown
from pallas_kernels.formats import FORMATS, Q8_0, Quantized

# Types of single numbers, as numpy reads them, and what they become on the device.
_PLAIN = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(jnp.bfloat16), "I32": np.dtype("<i4")}
_ON_DEVICE = {"F32": jnp.float32, "F16": jnp.float32, "BF16": jnp.bfloat16, "I32": jnp.int32}
# Numbers looked at together, so that the look at a large tensor takes no memory to speak of.
_CHUNK = 1 << 22


def device_nbytes(info: TensorInfo) -> int:
    """Bytes that a tensor takes on the device."""
    count = math.prod(info.shape)
    if info.type in FORMATS:
        return count // FORMATS[info.type].BLOCK * FORMATS[info.type].DEVICE_BYTES
    return count * jnp.dtype(_ON_DEVICE[info.type]).itemsize


def read_value(header: Header, info: TensorInfo, n_experts: int) -> jax.Array | Quantized:
    """Read a tensor onto the default device.

    F32 and F16 become float32, BF16 bfloat16, I32 int32; quantised blocks go to the device as they are and are split into
    planes there. Values are checked here, on first use: finite numbers and scales, and expert ids (all that I32 is used for)
    below `n_experts`.

    Raises:
        InputError: a value that no model can have.
    """
    where = f"{header.path}: {shown(info.name)}"
    raw = header.raw(info)
    if info.type in FORMATS:
        _require_finite_scales(raw, FORMATS[info.type], where)
        return FORMATS[info.type].from_bytes(raw.reshape(*info.shape[:-1], -1))
    array = raw.view(_PLAIN[info.type]).reshape(info.shape)
    if info.type == "I32":
        if array.min() < 0 or array.max() >= n_experts:
            wrong = array[(array < 0) | (array >= n_experts)][0]
            raise InputError(f"{where}: names expert {wrong}; the model has {n_experts}")
    else:
        _require_finite(array, where)
    return jnp.asarray(array, _ON_DEVICE[info.type])


def encode(value: jax.Array | np.ndarray | Quantized, stored: str, where: str) -> np.ndarray:
    """A value as a file stores it: numbers [...] of the stored type, or uint8 [..., bytes of a row] for blocks.

    Raises:
        ValueError: a value that is not finite in that type, or a quantised value asked for as another type.
    """
    if isinstance(value, Quantized) or stored == "Q8_0":
        raw = value.to_bytes() if isinstance(value, Quantized) else Q8_0.encode(value)
        if isinstance(value, Quantized) and type(value).__name__ != stored:
            raise ValueError(f"{where}: given as {type(value).__name__}, to be stored as {stored}")
        _require_finite_scales(raw.reshape(-1), FORMATS[stored], where)
        return raw
    with np.errstate(over="ignore"):
        array = np.asarray(value).astype(_PLAIN[stored])
    if stored != "I32":
        _require_finite(array, where)
    return array


def _require_finite(array: np.ndarray, where: str) -> None:
    flat = array.reshape(-1)
    for first in range(0, flat.size, _CHUNK):
        finite = np.isfinite(flat[first : first + _CHUNK])
        if not finite.all():
            index = np.unravel_index(first + int(finite.argmin()), array.shape)
            raise InputError(f"{where}: value {[int(i) for i in index]} is not finite")


def _require_finite_scales(raw: np.ndarray, format: type[Quantized], where: str) -> None:
    blocks = raw.reshape(-1, format.BLOCK_BYTES)
    for first in range(0, len(blocks), _CHUNK):
        broken = format.broken(blocks[first : first + _CHUNK])
        if broken.any():
            raise InputError(f"{where}: the scale of block {first + int(broken.argmax())} is not finite")

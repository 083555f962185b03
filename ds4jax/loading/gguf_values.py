"""Stored bytes to parameter values and back, one function for each direction."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.errors import InputError
from ds4jax.loading.gguf_header import Header, TensorInfo, shown
from pallas_kernels.formats import FORMATS, Q8_0, Quantized

# Types of single numbers, as numpy reads them and as they stay on the device.
_PLAIN = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(jnp.bfloat16), "I32": np.dtype("<i4")}
# The bits of an exponent: all ones in infinities and NaN. Whole numbers are looked at many times faster than halves.
_EXPONENT = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}
# Numbers looked at together, so that the look at a large tensor takes no memory to speak of.
_CHUNK = 1 << 20
# A CPU takes an array as it lies in the mapped file, without a copy, when it begins at a multiple of so many bytes.
_ALIGNED = 64
# A tensor of fewer bytes is copied on the host: that takes less time than compiling for where it begins.
_SMALL = 1 << 24


def device_nbytes(info: TensorInfo) -> int:
    """Bytes that a tensor takes on the device."""
    if info.type in FORMATS:
        return math.prod(info.shape) // FORMATS[info.type].BLOCK * FORMATS[info.type].DEVICE_BYTES
    return info.nbytes


def check_value(header: Header, info: TensorInfo, n_experts: int) -> None:
    """Look at every stored value of a tensor on the host, a part at a time: numbers and scales are finite, and expert ids (all
    that I32 is used for) below `n_experts`.

    Raises:
        InputError: a value that no model can have.
    """
    where, raw = f"{header.path}: {shown(info.name)}", header.raw(info)
    if info.type in FORMATS:
        _require_finite_scales(raw, FORMATS[info.type], where)
    elif info.type == "I32":
        ids = raw.view(_PLAIN["I32"])
        if ids.min() < 0 or ids.max() >= n_experts:
            wrong = ids[(ids < 0) | (ids >= n_experts)][0]
            raise InputError(f"{where}: names expert {wrong}; the model has {n_experts}")
    else:
        _require_finite(raw.view(_PLAIN[info.type]).reshape(info.shape), info.type, where)


def read_value(header: Header, info: TensorInfo, n_experts: int) -> jax.Array | Quantized:
    """Read a tensor onto the default device, after `check_value`.

    F32 becomes float32, F16 float16, BF16 bfloat16, I32 int32: whoever computes with halves widens them there, which is exact.
    Quantised blocks go to the device as they are and are split into planes there. The device may still be at work on the value
    that is returned.

    Raises:
        InputError: a value that no model can have.
    """
    check_value(header, info, n_experts)
    if info.type not in FORMATS:
        value = header.raw(info).view(_PLAIN[info.type]).reshape(info.shape)
        # A CPU takes memory that is aligned as it is, whatever `may_alias` says; a parameter must not change when somebody
        # writes to the file.
        return jax.device_put(value.copy() if jax.default_backend() == "cpu" else value)
    if info.nbytes < _SMALL:
        return _split(FORMATS[info.type], jnp.asarray(header.raw(info)), 0, info.shape[:-1])
    skip = info.offset % _ALIGNED
    stored = header.data[info.offset - skip : info.offset + info.nbytes]
    return _split(FORMATS[info.type], jax.device_put(stored), skip, info.shape[:-1])


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _split(format: type[Quantized], stored: jax.Array, skip: int, lead: tuple[int, ...]) -> Quantized:
    """Rows `lead` of blocks, which begin `skip` bytes into `stored`, in planes."""
    return format.split(stored[skip:].reshape(*lead, -1, format.BLOCK_BYTES))


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
        _require_finite(array, stored, where)
    return array


def _require_finite(array: np.ndarray, stored: str, where: str) -> None:
    bits, exponent = array.reshape(-1).view(f"<u{array.itemsize}"), _EXPONENT[stored]
    for first in range(0, bits.size, _CHUNK):
        broken = (bits[first : first + _CHUNK] & exponent) == exponent
        if broken.any():
            index = np.unravel_index(first + int(broken.argmax()), array.shape)
            raise InputError(f"{where}: value {[int(i) for i in index]} is not finite")


def _require_finite_scales(raw: np.ndarray, format: type[Quantized], where: str) -> None:
    blocks = raw.reshape(-1, format.BLOCK_BYTES)
    for first in range(0, len(blocks), _CHUNK):
        broken = format.broken(blocks[first : first + _CHUNK])
        if broken.any():
            raise InputError(f"{where}: the scale of block {first + int(broken.argmax())} is not finite")

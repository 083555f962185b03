"""Stored bytes to parameter values and back, one function for each direction."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.errors import InputError
from ds4jax.loading.gguf_header import Header, TensorInfo, shown
from pallas_kernels.formats import BLOCK_BYTES, Q8_0

# Types of single numbers, as numpy reads them.
_PLAIN = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(jnp.bfloat16), "I32": np.dtype("<i4")}
READABLE = (*_PLAIN, "Q8_0")


def require_readable(header: Header, info: TensorInfo) -> None:
    """Refuse a type that is legal but that this version cannot compute with."""
    if info.type not in READABLE:
        raise InputError(f"{header.path}: {shown(info.name)}: type {info.type} is not supported; only {', '.join(READABLE)} are")


def read_value(header: Header, info: TensorInfo, n_experts: int) -> jax.Array | Q8_0:
    """Read a tensor onto the default device.

    F32 and F16 become float32, BF16 bfloat16, I32 int32, Q8_0 stays as it is. Values are checked here, on first use: finite
    numbers and scales, and expert ids (all that I32 is used for) below `n_experts`.

    Raises:
        InputError: a value that no model can have, or a type that cannot be read.
    """
    require_readable(header, info)
    where = f"{header.path}: {shown(info.name)}"
    raw = header.raw(info)
    if info.type == "Q8_0":
        _require_finite_scales(raw, where)
        return Q8_0.from_bytes(raw.reshape(*info.shape[:-1], -1))
    array = raw.view(_PLAIN[info.type]).reshape(info.shape)
    if info.type == "I32":
        if array.min() < 0 or array.max() >= n_experts:
            wrong = array[(array < 0) | (array >= n_experts)][0]
            raise InputError(f"{where}: names expert {wrong}; the model has {n_experts}")
        return jnp.asarray(array, jnp.int32)
    _require_finite(array, where)
    return jnp.asarray(array, jnp.bfloat16 if info.type == "BF16" else jnp.float32)


def encode(value: jax.Array | np.ndarray | Q8_0, stored: str, where: str) -> np.ndarray:
    """A value as a file stores it: numbers [...] of the stored type, or uint8 [..., bytes of a row] for Q8_0.

    Raises:
        ValueError: a value that is not finite in that type, or a Q8_0 value asked for as another type.
    """
    if stored == "Q8_0":
        raw = (value if isinstance(value, Q8_0) else Q8_0.quantize(value)).to_bytes()
        _require_finite_scales(raw.reshape(-1), where)
        return raw
    if isinstance(value, Q8_0):
        raise ValueError(f"{where}: given as Q8_0, to be stored as {stored}")
    with np.errstate(over="ignore"):
        array = np.asarray(value).astype(_PLAIN[stored])
    if stored != "I32":
        _require_finite(array, where)
    return array


def _require_finite(array: np.ndarray, where: str) -> None:
    finite = np.isfinite(array)
    if not finite.all():
        index = np.unravel_index(int(finite.argmin()), array.shape)
        raise InputError(f"{where}: value {[int(i) for i in index]} is not finite")


def _require_finite_scales(raw: np.ndarray, where: str) -> None:
    # The exponent of the little-endian float16 at the start of each block, all ones for infinities and NaN.
    broken = (raw.reshape(-1, BLOCK_BYTES)[:, 1] & 0x7C) == 0x7C
    if broken.any():
        raise InputError(f"{where}: the scale of block {int(broken.argmax())} is not finite")

"""Stored bytes to parameter values and back, one function for each direction."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.errors import InputError
from ds4jax.loading.gguf_header import Header, TensorInfo, shown
from ds4jax.loading.reading import Reading
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
# Bytes of a large tensor that are looked at, put onto the device and split together, at most.
_PIECE = 1 << 25


def device_nbytes(info: TensorInfo) -> int:
    """Bytes that a tensor takes on the device."""
    if info.type in FORMATS:
        return math.prod(info.shape) // FORMATS[info.type].BLOCK * FORMATS[info.type].DEVICE_BYTES
    return info.nbytes


@dataclasses.dataclass(frozen=True)
class _Part:
    """`count` entries of a tensor's first axis, from `first` on."""

    header: Header
    info: TensorInfo
    first: int
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.count, *self.info.shape[1:])

    @property
    def before(self) -> int:
        """Bytes of the tensor that lie before this part."""
        return self.info.nbytes // self.info.shape[0] * self.first

    @property
    def raw(self) -> np.ndarray:
        """The stored bytes, uint8 [n], not copied."""
        return self.header.raw(self.info)[self.before :][: self.info.nbytes // self.info.shape[0] * self.count]

    @property
    def skip(self) -> int:
        """Bytes that a large part is taken with although they lie before it, so that a CPU need not copy it."""
        if self.info.nbytes < _SMALL or jax.default_backend() != "cpu":
            return 0
        return (self.info.offset + self.before) % _ALIGNED

    def check(self, n_experts: int) -> None:
        """As `check_value`."""
        where, stored = f"{self.header.path}: {shown(self.info.name)}", self.info.type
        if stored in FORMATS:
            _require_finite_scales(self.raw, FORMATS[stored], where, self.before // FORMATS[stored].BLOCK_BYTES)
        elif stored == "I32":
            ids = self.raw.view(_PLAIN["I32"])
            if ids.min() < 0 or ids.max() >= n_experts:
                wrong = ids[(ids < 0) | (ids >= n_experts)][0]
                raise InputError(f"{where}: names expert {wrong}; the model has {n_experts}")
        else:
            numbers = self.raw.view(_PLAIN[stored])
            _require_finite(numbers, stored, where, self.info.shape, self.before // numbers.itemsize)

    def fetch(self, n_experts: int) -> jax.Array:
        """The part on the default device after `check`: numbers as they are where it is the whole tensor, else stored bytes."""
        self.check(n_experts)
        if self.info.type in FORMATS or self.count < self.info.shape[0]:
            start = self.info.offset + self.before
            return jax.device_put(self.header.data[start - self.skip : start + self.raw.size])
        value = self.raw.view(_PLAIN[self.info.type]).reshape(self.shape)
        # A CPU takes memory that is aligned as it is, whatever `may_alias` says; a parameter must not change when somebody
        # writes to the file.
        return jax.device_put(value.copy() if jax.default_backend() == "cpu" else value)


def check_value(header: Header, info: TensorInfo, n_experts: int) -> None:
    """Look at every stored value of a tensor on the host, a part at a time: numbers and scales are finite, and expert ids (all
    that I32 is used for) below `n_experts`.

    Raises:
        InputError: a value that no model can have.
    """
    _Part(header, info, 0, info.shape[0]).check(n_experts)


def reading(header: Header, info: TensorInfo, n_experts: int) -> Reading:
    """Prepare to read a tensor onto the default device; every piece of it is looked at as by `check_value`.

    F32 becomes float32, F16 float16, BF16 bfloat16, I32 int32: whoever computes with halves widens them there, which is exact.
    Quantised blocks go to the device as they are and are split into planes there, stacks of matrices a few at a time: beside the
    planes, the device holds no more of a stack's stored bytes than the pieces that are on their way.
    """
    # The planes of a single matrix do not all begin with its rows.
    pieces = 1 if info.type in FORMATS and len(info.shape) < 3 else -(-info.nbytes // _PIECE)
    count = -(-info.shape[0] // pieces)
    # All are as long, so that one program splits them; the last begins inside the one before where they do not divide the tensor.
    firsts = sorted({min(first, info.shape[0] - count) for first in range(0, info.shape[0], count)})
    parts = [_Part(header, info, first, count) for first in firsts]
    return Reading(tuple(functools.partial(part.fetch, n_experts) for part in parts), functools.partial(_join, parts))


def _join(parts: Sequence[_Part], pieces: Iterator[jax.Array]) -> jax.Array | Quantized:
    """The value of a tensor from what `fetch` returns for its parts."""
    info = parts[0].info
    if len(parts) > 1:
        planes = _empty(info.type, info.shape)
        for part, piece in zip(parts, pieces, strict=True):
            planes = _put_in(planes, piece, np.int32(part.first), info.type, part.skip, part.shape)
        return planes
    return _decoded(next(pieces), info.type, parts[0].skip, info.shape) if info.type in FORMATS else next(pieces)


def _decode(stored: jax.Array, type: str, skip: int, shape: tuple[int, ...]) -> jax.Array | Quantized:
    """A value of shape `shape` from its bytes, which begin `skip` bytes into `stored`."""
    if type in FORMATS:
        return FORMATS[type].split(stored[skip:].reshape(*shape[:-1], -1, FORMATS[type].BLOCK_BYTES))
    return jax.lax.bitcast_convert_type(stored[skip:].reshape(*shape, -1), _PLAIN[type])


_decoded = functools.partial(jax.jit, static_argnums=(1, 2, 3))(_decode)


@functools.partial(jax.jit, static_argnums=(3, 4, 5), donate_argnums=0)
def _put_in(
    planes: jax.Array | Quantized, stored: jax.Array, first: jax.Array, type: str, skip: int, shape: tuple[int, ...]
) -> jax.Array | Quantized:
    """A value with a part of it, of shape `shape`, put in its place from `first` of the first axis on."""
    part = _decode(stored, type, skip, shape)
    return jax.tree.map(lambda whole, new: jax.lax.dynamic_update_slice_in_dim(whole, new, first, 0), planes, part)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _empty(type: str, shape: tuple[int, ...]) -> jax.Array | Quantized:
    """A value of zeros, to be filled."""
    row = shape[-1] // FORMATS[type].BLOCK * FORMATS[type].BLOCK_BYTES if type in FORMATS else shape[-1] * _PLAIN[type].itemsize
    stored = jax.ShapeDtypeStruct((math.prod(shape[:-1]) * row,), np.uint8)
    made = jax.eval_shape(functools.partial(_decode, type=type, skip=0, shape=shape), stored)
    return jax.tree.map(lambda plane: jnp.zeros(plane.shape, plane.dtype), made)


def encode(value: jax.Array | np.ndarray | Quantized, stored: str, where: str) -> np.ndarray:
    """A value as a file stores it: numbers [...] of the stored type, or uint8 [..., bytes of a row] for blocks.

    Raises:
        ValueError: a value that is not finite in that type, or a quantised value asked for as another type.
    """
    if isinstance(value, Quantized) or stored == "Q8_0":
        raw = value.to_bytes() if isinstance(value, Quantized) else Q8_0.encode(value)
        if isinstance(value, Quantized) and type(value).__name__ != stored:
            raise ValueError(f"{where}: given as {type(value).__name__}, to be stored as {stored}")
        _require_finite_scales(raw.reshape(-1), FORMATS[stored], where, 0)
        return raw
    with np.errstate(over="ignore"):
        array = np.asarray(value).astype(_PLAIN[stored])
    if stored != "I32":
        _require_finite(array, stored, where, array.shape, 0)
    return array


def _require_finite(array: np.ndarray, stored: str, where: str, shape: tuple[int, ...], before: int) -> None:
    """Refuse what is not finite in an array that begins `before` numbers into one of shape `shape`."""
    bits, exponent = array.reshape(-1).view(f"<u{array.itemsize}"), _EXPONENT[stored]
    for first in range(0, bits.size, _CHUNK):
        broken = (bits[first : first + _CHUNK] & exponent) == exponent
        if broken.any():
            index = np.unravel_index(before + first + int(broken.argmax()), shape)
            raise InputError(f"{where}: value {[int(i) for i in index]} is not finite")


def _require_finite_scales(raw: np.ndarray, format: type[Quantized], where: str, before: int) -> None:
    """Refuse blocks with a scale that is not finite; `before` blocks lie before them."""
    blocks = raw.reshape(-1, format.BLOCK_BYTES)
    for first in range(0, len(blocks), _CHUNK):
        broken = format.broken(blocks[first : first + _CHUNK])
        if broken.any():
            raise InputError(f"{where}: the scale of block {before + first + int(broken.argmax())} is not finite")

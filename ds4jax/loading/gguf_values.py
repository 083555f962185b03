"""Conversion of stored bytes to parameter values and back."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.errors import InputError
from ds4jax.loading.gguf_header import Header, TensorInfo
from ds4jax.loading.tensor_reader import Reading
from pallas_kernels.formats import FORMATS, Q8_0, Quantized

# Types of single numbers, as numpy reads them and as they stay on the device.
_PLAIN = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(jnp.bfloat16), "I32": np.dtype("<i4")}
# The exponent's bits: all ones in infinities and NaN. Comparing integers is many times faster than comparing float16.
_EXPONENT = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}
# Numbers checked at once. Bounds the temporary memory for a large tensor.
_CHUNK = 1 << 20
# A CPU uses an array of the mapped file without a copy when it begins at a multiple of this many bytes.
_ALIGNED = 64
# A smaller tensor is copied on the host, which is faster than compiling a program for its alignment.
_SMALL = 1 << 24
# Maximum bytes of a piece of a large tensor. A piece is checked, put onto the device and split at once.
_PIECE = 1 << 25


def device_nbytes(info: TensorInfo, form: str | None = None, columns: slice | None = None) -> int:
    """Bytes that a tensor takes on the device; arguments as for `reading`."""
    form, values = form or info.type, math.prod(_shape(info, columns))
    if form in FORMATS:
        return values // FORMATS[form].BLOCK * FORMATS[form].DEVICE_BYTES
    return values * _PLAIN[form].itemsize


def stored_nbytes(info: TensorInfo, columns: slice | None = None) -> int:
    """Bytes in the file of a tensor's columns."""
    return info.nbytes * _shape(info, columns)[-1] // info.shape[-1]


def _shape(info: TensorInfo, columns: slice | None) -> tuple[int, ...]:
    """Shape of a tensor's columns."""
    return (*info.shape[:-1], len(range(*columns.indices(info.shape[-1])))) if columns else info.shape


def _block(info: TensorInfo) -> int:
    """Values that are stored together."""
    return FORMATS[info.type].BLOCK if info.type in FORMATS else 1


@dataclasses.dataclass(frozen=True)
class _Source:
    """A tensor, which of its columns and rows are wanted, and the form that they get on the device."""

    header: Header
    info: TensorInfo
    form: str
    columns: slice | None = None
    rows: slice | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        shape = _shape(self.info, self.columns)
        return shape if self.rows is None else (*shape[:-2], self.rows.stop - self.rows.start, shape[-1])

    @property
    def entry(self) -> int:
        """Stored bytes of an entry of the first axis."""
        return self.info.nbytes // self.info.shape[0]

    @property
    def row(self) -> int:
        """Stored bytes of a row, the last axis."""
        return self.info.nbytes // math.prod(self.info.shape[:-1])

    @property
    def is_copy(self) -> bool:
        """Whether the value has the numbers of the file, so that the device has nothing to do."""
        return self.form == self.info.type and self.form not in FORMATS and self.columns is None

    def cut(self) -> list[_Part]:
        """Parts of one length, so that one program decodes them; the last one overlaps the one before if needed."""
        # A single matrix in planes is not cut: some of its planes do not have rows as their first axis.
        widened = 0 if self.form == self.info.type else device_nbytes(self.info, self.form)
        nbytes = max(self.info.nbytes, widened) * math.prod(self.shape) // math.prod(self.info.shape)
        pieces = 1 if self.form in FORMATS and len(self.info.shape) < 3 else -(-nbytes // _PIECE)
        entries = self.shape[0]
        count = -(-entries // pieces)
        firsts = sorted({min(first, entries - count) for first in range(0, entries, count)})
        return [_Part(self, first, count) for first in firsts]


@dataclasses.dataclass(frozen=True)
class _Part:
    """`count` entries of a tensor's first axis, from `first` on."""

    source: _Source
    first: int
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.count, *self.source.shape[1:])

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where the part's bytes begin and end in the tensor: one span, or one for each matrix of which some rows are wanted."""
        source, rows = self.source, self.source.rows
        if rows is None:
            return [(source.entry * self.first, source.entry * (self.first + self.count))]
        if len(source.info.shape) == 2:
            first = rows.start + self.first
            return [(source.row * first, source.row * (first + self.count))]
        matrices = (source.entry * number for number in range(self.first, self.first + self.count))
        return [(matrix + source.row * rows.start, matrix + source.row * rows.stop) for matrix in matrices]

    def raw(self, skip: int = 0) -> np.ndarray:
        """The stored bytes of all columns, uint8 [n]. One span is not copied, and `skip` bytes before it come with it."""
        spans = [self.source.header.raw(self.source.info, first - skip, end) for first, end in self.spans]
        return spans[0] if len(spans) == 1 else np.concatenate(spans)

    @property
    def skip(self) -> int:
        """Bytes before a large part that are read with it, so that it begins aligned and a CPU need not copy it."""
        info = self.source.info
        if info.nbytes < _SMALL or self.source.columns is not None or jax.default_backend() != "cpu" or len(self.spans) > 1:
            return 0
        return (info.offset + self.spans[0][0]) % _ALIGNED

    def check(self, n_experts: int) -> None:
        """As `check_value`."""
        for first, end in self.spans:
            self._check(self.source.header.raw(self.source.info, first, end), first, n_experts)

    def _check(self, raw: np.ndarray, before: int, n_experts: int) -> None:
        """Check stored bytes that lie `before` bytes into the tensor."""
        info = self.source.info
        where, stored = self.source.header.where(info), info.type
        if stored in FORMATS:
            _require_finite_scales(raw, FORMATS[stored], where, before // FORMATS[stored].BLOCK_BYTES)
        elif stored == "I32":
            ids = raw.view(_PLAIN["I32"])
            if ids.min() < 0 or ids.max() >= n_experts:
                wrong = ids[(ids < 0) | (ids >= n_experts)][0]
                raise InputError(f"{where}: names expert {wrong}; the model has {n_experts}")
        else:
            numbers = raw.view(_PLAIN[stored])
            _require_finite(numbers, stored, where, info.shape, before // numbers.itemsize)

    def fetch(self, n_experts: int) -> jax.Array:
        """The checked part on the default device: numbers if they are the entire value, else stored bytes."""
        self.check(n_experts)
        source = self.source
        if source.columns is not None:
            return jax.device_put(self._columns(source.columns))
        if not source.is_copy or self.count < source.shape[0]:
            return jax.device_put(self.raw(self.skip))
        value = self.raw().view(_PLAIN[source.form]).reshape(self.shape)
        # A CPU uses aligned memory without a copy, even if `may_alias` is False; a parameter must not change when another
        # program writes to the file.
        return jax.device_put(value.copy() if jax.default_backend() == "cpu" else value)

    def _columns(self, columns: slice) -> np.ndarray:
        """The stored bytes of some columns side by side, uint8 [n]."""
        block, rows = _block(self.source.info), math.prod(self.shape[:-1])
        first, last, _ = columns.indices(self.source.info.shape[-1])
        blocks = self.raw().reshape(rows, self.source.info.shape[-1] // block, -1)
        return blocks[:, first // block : last // block].reshape(-1)


def check_value(header: Header, info: TensorInfo, n_experts: int) -> None:
    """Check every stored value of a tensor on the host: numbers and scales are finite, expert ids are below `n_experts`.

    Only expert ids are stored as I32.

    Raises:
        InputError: a value that no model can have.
    """
    _Part(_Source(header, info, info.type), 0, info.shape[0]).check(n_experts)


def reading(
    header: Header, info: TensorInfo, n_experts: int, form: str | None = None, columns: slice | None = None,
    rows: slice | None = None,
) -> Reading:  # fmt: skip
    """Prepare to read a tensor onto the default device; every piece is checked as by `check_value`.

    F32 becomes float32, F16 float16, BF16 bfloat16, I32 int32. Quantised blocks are copied to the device and split into planes
    there, stacks of matrices a few at a time: the device then holds the planes and only a few pieces of the stored bytes.

    Args:
        form: how the device will hold it; None stands for the stored type. "F32" dequantises blocks there, some rows at a time,
            to the bits of ggml's dequantisation, and widens F16 and BF16.
        columns: part of the last axis, of whole blocks and in steps of one; None stands for all.
        rows: part of the axis before it, with start and stop; None stands for all.

    Raises:
        ValueError: another form, or columns that are not whole blocks.
    """
    form = form or info.type
    if form != info.type and (form != "F32" or info.type == "I32"):
        raise ValueError(f"{info.name}: {info.type} cannot be read as {form}")
    if columns is not None:
        block = _block(info)
        first, last, step = columns.indices(info.shape[-1])
        if step != 1 or first % block or last % block or first >= last:
            raise ValueError(f"{info.name}: columns {first} to {last} are not whole blocks of {block}")
    parts = _Source(header, info, form, columns, rows).cut()
    return Reading(tuple(functools.partial(part.fetch, n_experts) for part in parts), functools.partial(_join, parts))


def _join(parts: Sequence[_Part], pieces: Iterator[jax.Array]) -> jax.Array | Quantized:
    """The value of a tensor, from the results of `fetch` for its parts."""
    source = parts[0].source
    types = source.info.type, source.form
    if len(parts) > 1:
        value = _empty(*types, source.shape)
        for part, piece in zip(parts, pieces, strict=True):
            value = _put_in(value, piece, np.int32(part.first), *types, part.skip, part.shape)
        return value
    return next(pieces) if source.is_copy else _decoded(next(pieces), *types, parts[0].skip, source.shape)


def _decode(stored: jax.Array, type: str, form: str, skip: int, shape: tuple[int, ...]) -> jax.Array | Quantized:
    """A value of shape `shape` from its bytes of a stored type, which begin `skip` bytes into `stored`."""
    if type in FORMATS:
        planes = FORMATS[type].split(stored[skip:].reshape(*shape[:-1], -1, FORMATS[type].BLOCK_BYTES))
        return planes if form == type else planes.dequantize()
    return jax.lax.bitcast_convert_type(stored[skip:].reshape(*shape, -1), _PLAIN[type]).astype(_PLAIN[form])


_decode_there = jax.jit(_decode, static_argnums=(1, 2, 3, 4))


def _decoded(stored: jax.Array, *how: Any) -> jax.Array | Quantized:
    """As `_decode`, compiled for the device of the bytes."""
    # Late, so that a file that cannot be used is refused before large imports.
    from ds4jax.engine.compile import begin, wait

    value: jax.Array | Quantized
    # The programs of `begin` run on the first device of this process.
    if stored.device != jax.local_devices()[0]:
        value = _decode_there(stored, *how)
        return value

    def lower() -> jax.stages.Lowered:
        return _decode_there.lower(jax.ShapeDtypeStruct(stored.shape, stored.dtype), *how)

    (program,) = wait([begin(("decode", stored.shape, *how), lower)])
    value = program(stored)
    return value


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6), donate_argnums=0)
def _put_in(
    value: jax.Array | Quantized, stored: jax.Array, first: jax.Array, type: str, form: str, skip: int, shape: tuple[int, ...]
) -> jax.Array | Quantized:
    """A value with one part of it, of shape `shape`, written from index `first` of the first axis on."""
    part = _decode(stored, type, form, skip, shape)
    return jax.tree.map(lambda plane, new: jax.lax.dynamic_update_slice_in_dim(plane, new, first, 0), value, part)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(type: str, form: str, shape: tuple[int, ...]) -> jax.Array | Quantized:
    """A value of zeros, to be filled."""
    row = shape[-1] // FORMATS[type].BLOCK * FORMATS[type].BLOCK_BYTES if type in FORMATS else shape[-1] * _PLAIN[type].itemsize
    stored = jax.ShapeDtypeStruct((math.prod(shape[:-1]) * row,), np.uint8)
    made = jax.eval_shape(functools.partial(_decode, type=type, form=form, skip=0, shape=shape), stored)
    return jax.tree.map(lambda plane: jnp.zeros(plane.shape, plane.dtype), made)


def encode(value: jax.Array | np.ndarray | Quantized, stored: str, where: str) -> np.ndarray:
    """A value in stored form: numbers [...] of the stored type, or uint8 [..., bytes of a row] for blocks.

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
    """Refuse values that are not finite. The array begins `before` numbers into a tensor of shape `shape`."""
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

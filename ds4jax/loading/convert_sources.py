"""Where the tensors of a file that is written come from: each is a shape, a stored type, and its bytes a few rows at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType, quants

from ds4jax.errors import InputError
from ds4jax.loading.gguf_header import TENSOR_TYPES, Header, TensorInfo
from pallas_kernels.formats import Q8_0

# Values in a block and its bytes, by type.
BLOCKS = {name: (block, nbytes) for name, block, nbytes in TENSOR_TYPES.values()}
_NUMBERS = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(jnp.bfloat16)}
# Bytes that are copied at once.
_PIECE = 1 << 24


class Source(Protocol):
    """A tensor to write.

    Attributes:
        shape: slowest axis first.
        form: the type that the file stores, by its name in GGUF.
        nbytes: bytes in the file.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def form(self) -> str: ...

    @property
    def nbytes(self) -> int: ...

    def pieces(self) -> Iterator[np.ndarray]:
        """Rows in order as the file stores them, uint8 [n, bytes of a row]. It may raise InputError."""
        ...


@dataclasses.dataclass(frozen=True)
class SideBySide:
    """Matrices [N, K] of one type as one [N, 2K]: a row of the first, then the same row of the second."""

    parts: tuple[Source, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and all columns."""
        return (*self.parts[0].shape[:-1], sum(part.shape[-1] for part in self.parts))

    @property
    def form(self) -> str:
        """The type of the parts."""
        return self.parts[0].form

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    def pieces(self) -> Iterator[np.ndarray]:
        """Rows of all parts, joined. Parts of equal shape and type come in pieces of equal length."""
        for rows in zip(*(part.pieces() for part in self.parts), strict=True):
            yield np.concatenate(rows, axis=-1)


@dataclasses.dataclass(frozen=True)
class Copied:
    """A tensor of a GGUF file, or the same part of every row of it, as it is stored.

    Attributes:
        row: bytes of a row that are copied, from the first up to the last.
    """

    header: Header
    info: TensorInfo
    shape: tuple[int, ...]
    row: slice

    @property
    def form(self) -> str:
        """The stored type."""
        return self.info.type

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return math.prod(self.shape[:-1]) * (self.row.stop - self.row.start)

    def pieces(self) -> Iterator[np.ndarray]:
        """Rows, copied from the mapped file when they are written."""
        yield from self.rows(0, math.prod(self.shape[:-1]))

    def rows(self, first: int, end: int) -> Iterator[np.ndarray]:
        """As `pieces`, from row `first` up to row `end`."""
        width = self.info.nbytes // math.prod(self.shape[:-1])
        step = max(_PIECE // width, 1)
        for start in range(first, end, step):
            stop = min(start + step, end)
            yield self.header.raw(self.info, start * width, stop * width).reshape(stop - start, width)[:, self.row]


def copied(header: Header, info: TensorInfo, columns: slice | None = None) -> Copied:
    """A tensor of a GGUF file as a source, or `columns` of it.

    Raises:
        InputError: the columns begin or end inside a block of the type.
    """
    *lead, width = info.shape
    columns = columns or slice(0, width)
    block, nbytes = BLOCKS[info.type]
    if columns.start % block or columns.stop % block:
        raise InputError(f"{header.where(info)}: its halves end inside blocks of {info.type}; give --requantise f32")
    row = slice(columns.start // block * nbytes, columns.stop // block * nbytes)
    return Copied(header, info, (*lead, columns.stop - columns.start), row)


@dataclasses.dataclass(frozen=True)
class Requantised:
    """A tensor of a GGUF file whose values are stored in another type: "F32", "F16", "BF16" or "Q8_0"."""

    source: Copied
    form: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""
        return self.source.shape

    @property
    def nbytes(self) -> int:
        """Bytes in the new type."""
        block, nbytes = BLOCKS[self.form]
        return math.prod(self.shape) // block * nbytes

    def pieces(self) -> Iterator[np.ndarray]:
        """Rows, each value rounded once to the new type.

        Raises:
            InputError: a value that is not finite, or too large for the new type.
        """
        for raw in self.source.pieces():
            values = quants.dequantize(np.ascontiguousarray(raw), GGMLQuantizationType[self.source.form])
            with np.errstate(over="ignore"):
                rows = Q8_0.encode(values) if self.form == "Q8_0" else values.astype(_NUMBERS[self.form]).view(np.uint8)
            scales = rows.reshape(-1, Q8_0.BLOCK_BYTES) if self.form == "Q8_0" else None
            numbers = values if scales is not None else rows.view(_NUMBERS[self.form]).astype(np.float32)
            if not np.isfinite(numbers).all() or (scales is not None and Q8_0.broken(scales).any()):
                where = self.source.header.where(self.source.info)
                raise InputError(f"{where}: holds values that are not finite in {self.form}; f32 holds all finite values")
            yield rows


def requantised(source: Source, form: str) -> Source:
    """A tensor in another type, or matrices side by side each in that type.

    Raises:
        InputError: its rows are no multiple of the type's block.
    """
    if isinstance(source, SideBySide):
        return SideBySide(tuple(requantised(part, form) for part in source.parts))
    assert isinstance(source, Copied)
    block, _ = BLOCKS[form]
    if source.shape[-1] % block:
        where = source.header.where(source.info)
        raise InputError(f"{where}: rows of {source.shape[-1]} values; {form} needs a multiple of {block}, bf16 does not")
    return Requantised(source, form)

"""Read parameters of a hub checkpoint a few rows at a time, as the bytes of GGUF tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.errors import InputError
from ds4jax.files import open_regular
from ds4jax.loading import hub_values, safetensors_header
from pallas_kernels.formats import FORMATS, MXFP4, Q8_0, Quantized

INTEGERS = ("I64", "I32")
_PLAIN = {"F32": "<f4", "I64": "<i8", "I32": "<i4"}
_NUMBERS = {"F32": np.dtype("<f4"), "BF16": np.dtype(jnp.bfloat16), "I32": np.dtype("<i4")}
# Values dequantised at once: 16 MB in float32.
_VALUES = 1 << 22


@dataclasses.dataclass(frozen=True)
class Entry(safetensors_header.Entry):
    """A tensor with its shard."""

    file: Path
    name: str


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor with its scales; `shape` is the shape of its values."""

    entry: Entry
    scale: Entry | None
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file, scales included."""
        return self.entry.nbytes + (self.scale.nbytes if self.scale else 0)


@dataclasses.dataclass(frozen=True)
class Source:
    """A parameter: its stored tensors, one for each expert of a stack, and the GGUF type that it becomes.

    Attributes:
        form: "F32", "BF16", "I32", "Q8_0", or "MXFP4" where all parts are FP4.
        n_experts: bound of the ids in an I32 table.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Stored, ...]
    form: str
    n_experts: int

    @property
    def row_nbytes(self) -> int:
        """Bytes of a row, which is the last axis."""
        if self.form in FORMATS:
            return self.shape[-1] // FORMATS[self.form].BLOCK * FORMATS[self.form].BLOCK_BYTES
        return self.shape[-1] * _NUMBERS[self.form].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes in a GGUF file and on the device."""
        return math.prod(self.shape[:-1]) * self.row_nbytes

    def pieces(self) -> Iterator[np.ndarray]:
        """Rows in order as a GGUF file stores them, uint8 [n, bytes of a row], of a few million values at a time.

        Raises:
            InputError: a file that cannot be read, or values that are not valid in a model.
        """
        for part in self.parts:
            yield from self._of(part, None)

    def _of(self, part: Stored, wanted: slice | None) -> Iterator[np.ndarray]:
        """The wanted rows of a part as by `pieces`; None stands for all."""
        rows = math.prod(part.shape[:-1])
        begin, end = (wanted.start, wanted.stop) if wanted else (0, rows)
        step = max(_VALUES // part.shape[-1] // hub_values.FP8_BLOCK, 1) * hub_values.FP8_BLOCK
        # FP8 scales belong to blocks of rows, so a piece begins with a block.
        for first in range(begin - begin % hub_values.FP8_BLOCK, end, step):
            piece = self._piece(part, rows, first, min(step, end - first))
            yield piece[max(begin - first, 0) :]

    def read(self, wanted: slice | None = None) -> jax.Array | Quantized:
        """The parameter on the default device. Host memory holds one copy of it, in its final type.

        Args:
            wanted: part of the second axis from the end, with start and stop; None stands for all.

        Raises:
            InputError: as for `pieces`.
        """
        shape = self.shape if wanted is None else (*self.shape[:-2], wanted.stop - wanted.start, self.shape[-1])
        raw = np.empty((math.prod(shape[:-1]), self.row_nbytes), np.uint8)
        first = 0
        for piece in (piece for part in self.parts for piece in self._of(part, wanted)):
            raw[first : first + len(piece)] = piece
            first += len(piece)
        if self.form in FORMATS:
            return FORMATS[self.form].from_bytes(raw.reshape(*shape[:-1], -1))
        return jnp.asarray(raw.view(_NUMBERS[self.form]).reshape(shape))

    def _piece(self, part: Stored, rows: int, first: int, count: int) -> np.ndarray:
        """`count` of the `rows` rows of a part, uint8 [count, bytes of a row]."""
        raw = _bytes(part.entry, rows, first, count)
        if self.form == "I32":
            return _expert_ids(part.entry, raw, self.n_experts)
        if self.form == "MXFP4":
            assert part.scale is not None
            blocks = hub_values.to_mxfp4(raw, _bytes(part.scale, rows, first, count))
            _require(not MXFP4.broken(blocks.reshape(-1, MXFP4.BLOCK_BYTES)).any(), part.entry)
            return blocks
        values = _values(part, raw, rows, first)
        _require(bool(np.isfinite(values).all()), part.entry)
        return _encoded(values, self.form, part.entry)


def _values(part: Stored, raw: np.ndarray, rows: int, first: int) -> np.ndarray:
    """Values float32 [n, K] of the rows from `first` on, from their bytes `raw` [n, bytes of a row]."""
    entry, count = part.entry, len(raw)
    # The caller refuses values that overflow, with the name of the tensor.
    with np.errstate(over="ignore", invalid="ignore"):
        if entry.dtype == "F8_E4M3":
            assert part.scale is not None
            block = hub_values.FP8_BLOCK
            scales = _bytes(part.scale, part.scale.shape[0], first // block, -(-count // block))
            return hub_values.from_fp8(raw, scales)
        if entry.dtype == "I8":
            assert part.scale is not None
            return hub_values.from_fp4(raw, _bytes(part.scale, rows, first, count))
        if entry.dtype == "BF16":
            return hub_values.from_bf16(raw.view("<u2"))
    return raw.view(_PLAIN[entry.dtype])


def _encoded(values: np.ndarray, form: str, entry: Entry) -> np.ndarray:
    """Values float32 [n, K] as a GGUF file stores them, uint8 [n, bytes of a row]."""
    with np.errstate(over="ignore"):
        if form == "Q8_0":
            raw = Q8_0.encode(values)
            finite = not Q8_0.broken(raw.reshape(-1, Q8_0.BLOCK_BYTES)).any()
        else:
            numbers = values.astype(_NUMBERS[form], copy=False)
            finite = bool(np.isfinite(numbers).all())
            raw = numbers.view(np.uint8)
    if not finite:
        raise InputError(f"{entry.file}: {entry.name}: holds values too large for {form}; keep dense matrices as f32")
    return raw


def _expert_ids(entry: Entry, raw: np.ndarray, n_experts: int) -> np.ndarray:
    """Rows of the table of a hash-routed layer as int32, uint8 [n, bytes of a row]."""
    ids = raw.view(_PLAIN[entry.dtype])
    outside = ids[(ids < 0) | (ids >= n_experts)]
    if len(outside):
        raise InputError(f"{entry.file}: {entry.name}: names expert {outside[0]} of {n_experts}")
    return ids.astype("<i4").view(np.uint8)


def _require(finite: bool, entry: Entry) -> None:
    if not finite:
        raise InputError(f"{entry.file}: {entry.name}: holds values that are not finite; fetch the shard again")


def _bytes(entry: Entry, rows: int, first: int, count: int) -> np.ndarray:
    """Bytes of `count` rows from `first` on, of a tensor with `rows` rows, uint8 [count, bytes of a row]."""
    row_nbytes = entry.nbytes // rows
    try:
        with open_regular(entry.file) as stream:
            raw = np.fromfile(stream, np.uint8, count * row_nbytes, offset=entry.offset + first * row_nbytes)
    except OSError as error:
        raise InputError(f"{entry.file}: {entry.name}: cannot be read ({error.strerror})") from error
    if len(raw) < count * row_nbytes:
        raise InputError(f"{entry.file}: {entry.name}: the file ends inside it; it has become shorter since it was opened")
    return raw.reshape(count, row_nbytes)

"""The header of a GGUF file: metadata and tensor table, every count and length checked against the bytes that are left.

The `gguf` package's own reader accepts broken files and takes seconds on a large vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from ds4jax.errors import InputError
from ds4jax.files import open_regular
from ds4jax.loading.unfinished import require_finished

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
# What the specification allows for a key; nothing else bounds a name that is about to appear in a message.
MAX_NAME_BYTES = 65535

# Value type id -> name and struct code.
_SCALARS = {
    0: ("u8", "B"),
    1: ("i8", "b"),
    2: ("u16", "H"),
    3: ("i16", "h"),
    4: ("u32", "I"),
    5: ("i32", "i"),
    6: ("f32", "f"),
    7: ("bool", "B"),
    10: ("u64", "Q"),
    11: ("i64", "q"),
    12: ("f64", "d"),
}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")

# Tensor type id -> name, values in a block, bytes of a block: the types that ggml stores, also those that only a tensor without
# use may have. Their sizes are needed to tell whether such a tensor lies inside the file and beside the others.
TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}
# The quantised types that can be multiplied out, with the values in a block: those of `pallas_kernels.formats.FORMATS`, without
# its import of JAX.
QUANTISED = {name: block for name, block, _ in TENSOR_TYPES.values() if block > 1 and name not in ("TQ1_0", "TQ2_0", "NVFP4")}


@dataclasses.dataclass(frozen=True)
class Value:
    """A metadata value and its stored type: "u32", "f32", "bool", "str" and so on; arrays as "i32[]".

    An array of strings is a list, any other array a numpy view of the file.
    """

    type: str
    value: Any


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        shape: the fastest axis last, as numpy has it.
        offset: bytes from the start of its file.
        shard: its file, an index into `Header.shards`.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    shard: int = 0

    @property
    def place(self) -> tuple[int, int]:
        """File and offset. Tensors in this order are read front to back."""
        return self.shard, self.offset


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file, mapped read-only: `data` is uint8 [bytes]."""

    path: Path
    data: np.ndarray


@dataclasses.dataclass(frozen=True)
class Header:
    """Metadata and tensor table of a GGUF file, or of the shards of a split one.

    Attributes:
        path: the file; of a set, the first shard.
        shards: the file, or every file of the set in order.
    """

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]
    shards: tuple[Shard, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """The file, or every file of the set in order."""
        return tuple(shard.path for shard in self.shards)

    def raw(self, info: TensorInfo, first: int = 0, last: int | None = None) -> np.ndarray:
        """Stored bytes of a tensor from `first` up to `last`, or up to its end: uint8 [bytes], not copied.

        A negative `first` begins before the tensor, in the same file.
        """
        last = info.nbytes if last is None else last
        return self.shards[info.shard].data[info.offset + first : info.offset + last]

    def where(self, info: TensorInfo) -> str:
        """The file and the name of a tensor, the beginning of a message about it."""
        return f"{self.shards[info.shard].path}: {shown(info.name)}"


def read_header(path: Path) -> Header:
    """Read and check the header of one GGUF file; tensor data is mapped, not read. `gguf_split.open_set` opens models.

    Raises:
        InputError: a file that cannot be opened, is not GGUF version 3, is truncated, or whose header contradicts itself.

    Source: `docs/gguf.md` of the ggml project.
    """
    cursor = _Cursor(path, _map(path))
    magic = cursor.take(4, "magic")
    require_finished(path, magic)
    if magic != MAGIC:
        raise InputError(f"{path}: not a GGUF file: its magic is {magic!r}")
    version = cursor.number("I", "version")
    if version != VERSION:
        raise InputError(f"{path}: GGUF version {version}; only version {VERSION}, little-endian, can be read")
    # The smallest record has an empty name: tensors one dimension, metadata a value of one byte.
    tensor_count = cursor.count("tensor count", 8 + 4 + 8 + 4 + 8)
    metadata_count = cursor.count("metadata count", 8 + 4 + 1)
    metadata: dict[str, Value] = {}
    for index in range(metadata_count):
        key = cursor.string(f"metadata key {index}", MAX_NAME_BYTES)
        if key in metadata:
            raise InputError(f"{path}: {shown(key)}: this metadata key appears twice")
        metadata[key] = cursor.value(shown(key))
    infos = _tensor_table(cursor, tensor_count)
    tensors = _placed(cursor, infos, _alignment(path, metadata))
    return Header(path, metadata, tensors, (Shard(path, np.frombuffer(cursor.data, np.uint8)),))


def shown(name: str) -> str:
    """A name from a file, escaped and shortened for one line of a message."""
    short = name if len(name) <= 100 else name[:100] + "..."
    return short if short.isprintable() and short else ascii(short)


def _map(path: Path) -> mmap.mmap:
    try:
        with open_regular(path) as file:
            if not os.fstat(file.fileno()).st_size:
                raise InputError(f"{path}: the file is empty")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: not a file; give a GGUF file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


class _Cursor:
    """Reads forward through a mapped file and never past its end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path = path
        self.data = data
        self.position = 0

    def take(self, count: int, what: str) -> bytes:
        left = len(self.data) - self.position
        if count > left:
            raise InputError(f"{self.path}: {what}: truncated, {count} bytes needed, {left} left before the end of file")
        self.position += count
        return self.data[self.position - count : self.position]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def count(self, what: str, min_bytes: int) -> int:
        """The number of records, each of `min_bytes` or more; refused if they cannot fit in the rest of the file."""
        count = self.number("Q", what)
        left = len(self.data) - self.position
        if count * min_bytes > left:
            raise InputError(f"{self.path}: {what} is {count}, more than fits in the {left} bytes before the end of file")
        return count

    def string(self, what: str, max_bytes: int | None = None) -> str:
        length = self.count(f"{what}: string length", 1)
        if max_bytes is not None and length > max_bytes:
            raise InputError(f"{self.path}: {what}: string length is {length}; a name has at most {max_bytes} bytes")
        return self._decoded(self.take(length, what), what)

    def value(self, key: str) -> Value:
        kind = self.number("I", key)
        if kind in _SCALARS:
            name, code = _SCALARS[kind]
            return Value(name, self._checked_bools(name, self.number(code, key), key))
        if kind == _STRING:
            return Value("str", self.string(key))
        if kind == _ARRAY:
            return self._array(key)
        raise InputError(f"{self.path}: {key}: unknown metadata value type {kind}")

    def _array(self, key: str) -> Value:
        kind = self.number("I", key)
        if kind == _STRING:
            return Value("str[]", self._strings(key, self.count(f"{key}: array length", 8)))
        if kind not in _SCALARS:
            what = "arrays of arrays are not supported" if kind == _ARRAY else f"unknown metadata value type {kind}"
            raise InputError(f"{self.path}: {key}: {what}")
        name, code = _SCALARS[kind]
        dtype = np.dtype("<" + code)
        count = self.count(f"{key}: array length", dtype.itemsize)
        array = np.frombuffer(self.data, dtype, count, self.position)
        self.position += array.nbytes
        return Value(f"{name}[]", self._checked_bools(name, array, key))

    def _strings(self, key: str, count: int) -> list[str]:
        # A vocabulary has about 100,000 strings: one Python call for each is affordable, more are not.
        data, size, position = self.data, len(self.data), self.position
        values = []
        for index in range(count):
            start = position + _LENGTH.size
            position = start + _LENGTH.unpack_from(data, position)[0] if start <= size else start
            if position > size:
                raise InputError(f"{self.path}: {key}[{index}]: truncated, the string runs past the end of file")
            values.append(self._decoded(data[start:position], key))
        self.position = position
        return values

    def _decoded(self, raw: bytes, what: str) -> str:
        # GGUF strings are UTF-8, and byte-level vocabularies spell every byte as a printable character: anything else is damage.
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path}: {what}: not valid UTF-8 at byte {error.start}") from error

    def _checked_bools(self, name: str, value: Any, key: str) -> Any:
        if name != "bool":
            return value
        if np.any(np.asarray(value) > 1):
            raise InputError(f"{self.path}: {key}: a bool must be stored as 0 or 1")
        return value.view(np.bool_) if isinstance(value, np.ndarray) else bool(value)


def _tensor_table(cursor: _Cursor, count: int) -> list[TensorInfo]:
    """Tensor records as stored: `offset` counts from the start of the data."""
    infos: dict[str, TensorInfo] = {}
    for index in range(count):
        name = cursor.string(f"name of tensor {index}", MAX_NAME_BYTES)
        where = f"{cursor.path}: {shown(name)}"
        n_dims = cursor.number("I", shown(name))
        if not 1 <= n_dims <= MAX_DIMS:
            raise InputError(f"{where}: {n_dims} dimensions; a tensor has 1 to {MAX_DIMS}")
        dims = struct.unpack(f"<{n_dims}Q", cursor.take(8 * n_dims, shown(name)))
        type_id, offset = cursor.number("I", shown(name)), cursor.number("Q", shown(name))
        if type_id not in TENSOR_TYPES:
            fork = "llama.cpp has no such type, and only the program that wrote the file can read it"
            raise InputError(f"{where}: tensor type {type_id} is not supported: {fork}; get the file in another type")
        kind, block, block_bytes = TENSOR_TYPES[type_id]
        if not 0 < math.prod(dims) < 2**63:
            raise InputError(f"{where}: dimensions {list(dims)} make no valid number of values")
        if dims[0] % block:
            raise InputError(f"{where}: rows of {dims[0]} values; {kind} needs a multiple of {block}")
        if name in infos:
            raise InputError(f"{where}: this tensor appears twice")
        infos[name] = TensorInfo(name, kind, dims[::-1], offset, math.prod(dims) // block * block_bytes)
    return list(infos.values())


def _alignment(path: Path, metadata: dict[str, Value]) -> int:
    value = metadata.get("general.alignment", Value("u32", DEFAULT_ALIGNMENT))
    if value.type != "u32" or value.value < 8 or value.value & (value.value - 1):
        raise InputError(f"{path}: general.alignment: it must be a u32 power of two from 8 on")
    return value.value


def _placed(cursor: _Cursor, infos: list[TensorInfo], alignment: int) -> dict[str, TensorInfo]:
    """Tensors with absolute offsets; checks that each is aligned, inside the file and overlaps no other."""
    start, size = -(-cursor.position // alignment) * alignment, len(cursor.data)
    placed = {}
    for info in infos:
        where = f"{cursor.path}: {shown(info.name)}"
        if info.offset % alignment:
            raise InputError(f"{where}: data offset {info.offset} is not a multiple of the alignment {alignment}")
        offset = start + info.offset
        if offset + info.nbytes > size:
            raise InputError(f"{where}: its data ends at byte {offset + info.nbytes}, past the end of file at {size}; truncated?")
        placed[info.name] = dataclasses.replace(info, offset=offset)
    by_offset = sorted(placed.values(), key=lambda info: info.offset)
    for before, after in itertools.pairwise(by_offset):
        if before.offset + before.nbytes > after.offset:
            raise InputError(f"{cursor.path}: {shown(after.name)}: its data overlaps that of {shown(before.name)}")
    return placed

"""The file of a saved session: safetensors with a digest of all its bytes, written whole or not at all, read without trust.

Nothing here needs JAX, so that a command can look at a file before it loads a model.

Source: the safetensors format, github.com/huggingface/safetensors: eight bytes with the header's length, a JSON header padded
with spaces, then the tensors' bytes, in order and without gaps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from ds4jax.errors import InputError
from ds4jax.files import remove_abandoned, replacing

FORMAT, VERSION = "ds4jax session", 1
# The digest's place in a file whose digest is being taken.
_NONE = "0" * 64
_LARGEST_HEADER = 1 << 24
_PIECE = 1 << 20
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in an open file: `offset` counts from the file's beginning."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Opened:
    """A session's file whose header has been read and found whole.

    Attributes:
        path: for messages.
        fields: metadata by name, texts.
        tensors: by name.
    """

    path: Path
    fields: dict[str, str]
    tensors: dict[str, Tensor]
    _stream: BinaryIO = dataclasses.field(repr=False)

    def check_bytes(self) -> None:
        """Compare the digest that the file names with that of all its other bytes.

        Raises:
            InputError: they differ.
        """
        self._stream.seek(0)
        head = self._stream.read(8)
        header = self._stream.read(int.from_bytes(head, "little"))
        digest = hashlib.sha256(head + header.replace(self.fields["digest"].encode(), _NONE.encode(), 1))
        while piece := self._stream.read(_PIECE):
            digest.update(piece)
        if digest.hexdigest() != self.fields["digest"]:
            raise InputError(f"{self.path}: digest: its bytes are not those that were saved; save the session again")

    def read(self, name: str) -> np.ndarray:
        """One tensor.

        Raises:
            InputError: the file has become shorter since it was opened.
        """
        tensor = self.tensors[name]
        array = np.empty(tensor.shape, tensor.dtype)
        self._stream.seek(tensor.offset)
        view = array.reshape(-1).view(np.uint8).data
        if self._stream.readinto(view) < tensor.nbytes:  # type: ignore[attr-defined]
            raise InputError(f"{self.path}: {name}: the file ends inside it; save the session again")
        return array


def write(path: Path, fields: dict[str, str], arrays: Iterable[tuple[str, Any, Callable[[], np.ndarray]]]) -> None:
    """Write a file that is there complete or, after any failure, as it was before.

    Args:
        fields: metadata; `format`, `version` and `digest` are added.
        arrays: name, anything with the shape and dtype, and what gives the values, asked for one tensor at a time.

    Raises:
        OSError: it cannot be written; the old file is as it was, and nothing is left beside it.
    """
    listed = list(arrays)
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "version": str(VERSION), "digest": _NONE} | fields}
    offset = 0
    for name, like, _ in listed:
        dtype = np.dtype(like.dtype)
        end = offset + math.prod(like.shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(like.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    remove_abandoned(path)
    try:
        with replacing(path) as unfinished, unfinished.open("xb") as stream:
            _write(stream, len(text).to_bytes(8, "little") + text, (read() for _, _, read in listed))
    except OSError as error:
        raise OSError(error.errno, f"cannot be saved ({error.strerror}); what was there before still is", str(path)) from error


def _write(stream: BinaryIO, head: bytes, arrays: Iterable[np.ndarray]) -> None:
    digest = hashlib.sha256(head)
    stream.write(head)
    for array in arrays:
        view = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        digest.update(view)
        stream.write(view)
    stream.seek(head.index(_NONE.encode()))
    stream.write(digest.hexdigest().encode())
    stream.flush()
    # Before the file takes the old one's name: a machine that loses power must not be left with the name of a file without bytes.
    os.fsync(stream.fileno())


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Opened]:
    """Read and check a header; nothing of the size that it names is allocated.

    Raises:
        InputError: no such file, not a saved session, one of a newer version, or a size that differs from what the header says.
    """
    with contextlib.ExitStack() as stack:
        try:
            stream = stack.enter_context(path.open("rb"))
            found = _header(path, stream)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); give the file of a saved session") from error
        yield found


def _header(path: Path, stream: BinaryIO) -> Opened:
    size = os.fstat(stream.fileno()).st_size
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or not 2 <= length <= min(size - 8, _LARGEST_HEADER):
        raise InputError(f"{path}: header: {_bytes(length)} in a file of {_bytes(size)}; give the file of a saved session")
    try:
        header = json.loads(stream.read(length))
        fields = header.pop("__metadata__")
        if fields["format"] != FORMAT:
            raise InputError(f"{path}: format: {fields['format']!r}, not {FORMAT!r}; give the file of a saved session")
        version = int(fields["version"])
        if len(fields["digest"]) != len(_NONE) or not all(isinstance(value, str) for value in fields.values()):
            raise ValueError("a field that is not what it should be")
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(f"{path}: header: not that of a saved session; give the file of one, or save it again") from None
    if version != VERSION:
        advice = "use a newer ds4jax" if version > VERSION else "save the session again"
        raise InputError(f"{path}: version: {version}; this ds4jax reads {VERSION}; {advice}")
    tensors, end = {}, 8 + length
    for name, entry in header.items():
        tensors[name] = tensor = _tensor(path, name, entry, 8 + length, end)
        end += tensor.nbytes
    if end != size:
        raise InputError(f"{path}: the file has {_bytes(size)}, and its header tells of {_bytes(end)}; save the session again")
    return Opened(path, fields, tensors, stream)


def _tensor(path: Path, name: str, entry: Any, data: int, offset: int) -> Tensor:
    """The next tensor, which must begin where the last one ends."""
    try:
        shape = tuple(entry["shape"])
        if not all(type(axis) is int and 0 <= axis < 1 << 40 for axis in shape) or len(shape) > 8:
            raise ValueError("no shape")
        tensor = Tensor(DTYPES[entry["dtype"]], shape, offset)
        if entry["data_offsets"] != [offset - data, offset - data + tensor.nbytes]:
            raise ValueError("not where it should be")
    except (ValueError, TypeError, KeyError, AttributeError):
        line = " ".join(str(name).split())[:100]
        raise InputError(f"{path}: {line}: type, shape and place do not agree; save the session again") from None
    return tensor


def _bytes(count: int) -> str:
    return f"{count:,} bytes"

"""The file of a saved session: safetensors with a digest of all bytes. Written atomically, and checked completely when read.

The library's own writer needs all tensors in memory; this one writes one tensor at a time. `safetensors_header` reads.
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

import numpy as np

from ds4jax.errors import InputError
from ds4jax.files import open_regular, replacing
from ds4jax.loading.safetensors_header import BadLength, entry, read_header

FORMAT, VERSION = "ds4jax session", 2
# Stands for the digest while the digest is computed.
_NONE = "0" * 64
_MAX_HEADER = 1 << 24
_PIECE = 1 << 20
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Type, shape and position of a tensor in an open file; `offset` is in bytes from the start of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Opened:
    """A session's file with a header that was read and checked.

    Attributes:
        path: the file, for messages.
        fields: metadata texts by name.
        tensors: tensors by name.
    """

    path: Path
    fields: dict[str, str]
    tensors: dict[str, Tensor]
    _stream: BinaryIO = dataclasses.field(repr=False)

    def check_bytes(self) -> None:
        """Compare the digest in the file with the digest of all its other bytes.

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
            raise InputError(f"{self.path}: digest: the bytes differ from the saved ones; save the session again")

    def read(self, name: str) -> np.ndarray:
        """Read one tensor.

        Raises:
            InputError: the file is shorter than when it was opened.
        """
        tensor = self.tensors[name]
        array = np.empty(tensor.shape, tensor.dtype)
        self._stream.seek(tensor.offset)
        view = array.reshape(-1).view(np.uint8).data
        if self._stream.readinto(view) < tensor.nbytes:  # type: ignore[attr-defined]
            raise InputError(f"{self.path}: {name}: the file ends inside it; save the session again")
        return array


def write(
    path: Path, fields: dict[str, str], arrays: Iterable[tuple[str, Any, Callable[[], np.ndarray]]], kind: str = FORMAT
) -> None:
    """Write a file atomically. After a failure the old file is unchanged.

    Args:
        kind: what the file is, its `format`.
        fields: metadata; `format`, `version` and `digest` are added.
        arrays: for each tensor its name, an object with its shape and dtype, and a function that returns its values. The
            functions are called one after another.

    Raises:
        OSError: the file cannot be written. The old file is unchanged, and no temporary file is left.
    """
    listed = list(arrays)
    header: dict[str, Any] = {"__metadata__": {"format": kind, "version": str(VERSION), "digest": _NONE} | fields}
    offset = 0
    for name, like, _ in listed:
        dtype = np.dtype(like.dtype)
        end = offset + math.prod(like.shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(like.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    left = "the old file is unchanged" if os.path.lexists(path) else "no file was written"
    try:
        with replacing(path) as unfinished, unfinished.open("wb") as stream:
            _write(stream, len(text).to_bytes(8, "little") + text, (read() for _, _, read in listed))
    except OSError as error:
        raise OSError(error.errno, f"cannot be saved ({error.strerror}); {left}", str(path)) from error


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
    # Sync before the file is renamed. Otherwise a power failure could leave an empty file under the name.
    os.fsync(stream.fileno())


@contextlib.contextmanager
def opened(path: Path, kind: str = FORMAT) -> Iterator[Opened]:
    """Read and check a header. Memory is only allocated after its sizes are checked.

    Args:
        kind: what the file must be, as for `write`.

    Raises:
        InputError: the file does not exist, is not of that kind, has a newer version, or has another size than the header
            says.
    """
    with contextlib.ExitStack() as stack:
        try:
            stream = stack.enter_context(open_regular(path))
            found = _header(path, stream, kind)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); give the file of a saved session") from error
        yield found


def _header(path: Path, stream: BinaryIO, kind: str) -> Opened:
    try:
        header, data = read_header(stream, _MAX_HEADER)
        fields = header.pop("__metadata__")
        if fields["format"] != kind:
            raise InputError(f"{path}: format: {fields['format']!r}, not {kind!r}; give the file of a saved session")
        version = int(fields["version"])
        if len(fields["digest"]) != len(_NONE) or not all(isinstance(value, str) for value in fields.values()):
            raise ValueError("an invalid field")
    except InputError:
        raise
    except BadLength as error:
        raise InputError(f"{path}: header: {error}; give the file of a saved session") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"{path}: header: not a saved session; give the file of one, or save it again") from None
    if version != VERSION:
        advice = "use a newer ds4jax" if version > VERSION else "save the session again"
        raise InputError(f"{path}: version: {version}; this ds4jax reads {VERSION}; {advice}")
    tensors, end = {}, data
    for name, info in header.items():
        tensors[name] = tensor = _tensor(path, name, info, data, end)
        end += tensor.nbytes
    size = os.fstat(stream.fileno()).st_size
    if end != size:
        raise InputError(f"{path}: the file has {_bytes(size)}, and its header describes {_bytes(end)}; save the session again")
    return Opened(path, fields, tensors, stream)


def _tensor(path: Path, name: str, info: Any, data: int, offset: int) -> Tensor:
    """The next tensor. It must start at the end of the last one."""
    try:
        found = entry(info, data)
        tensor = Tensor(DTYPES[found.dtype], found.shape, offset)
        if (found.offset, found.nbytes) != (offset, tensor.nbytes):
            raise ValueError("not where it should be")
    except (ValueError, KeyError):
        line = " ".join(str(name).split())[:100]
        raise InputError(f"{path}: {line}: type, shape and position do not agree; save the session again") from None
    return tensor


def _bytes(count: int) -> str:
    return f"{count:,} bytes"

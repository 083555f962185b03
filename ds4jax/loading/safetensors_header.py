"""The header of a safetensors file, read without trust: nothing of a size that it names is allocated.

Source: the safetensors format, github.com/huggingface/safetensors: eight bytes with the header's length, a JSON header padded
with spaces, then the tensors' bytes, in order and without gaps.
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any, BinaryIO

# Maximum bytes of a header, as in the format's own library.
MAX_HEADER = 100_000_000
# Maximum length of an axis, and number of axes.
MAX_AXIS, MAX_AXES = 1 << 40, 8


class BadLength(Exception):
    """The header's length is not possible in a file of this size; the message gives both."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor: its type as the format names it, and its bytes; `offset` counts from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(stream: BinaryIO, max_bytes: int = MAX_HEADER) -> tuple[dict[str, Any], int]:
    """The header of an open file as its JSON object, and the offset of the first tensor's bytes.

    Raises:
        BadLength: a length beyond the file's end or `max_bytes`.
        ValueError: not a JSON object.
        OSError: the file cannot be read.
    """
    size = os.fstat(stream.fileno()).st_size
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or not 2 <= length <= min(size - 8, max_bytes):
        raise BadLength(f"{length:,} bytes in a file of {size:,} bytes")
    try:
        header = json.loads(stream.read(length))
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(header, dict):
        raise ValueError("not a JSON object")
    return header, 8 + length


def entry(info: Any, data: int) -> Entry:
    """One tensor's entry; `data` is the offset of the first tensor's bytes.

    Raises:
        ValueError: no object of type, shape and place. Whether they agree is for the caller to check.
    """
    try:
        dtype, shape, (start, end) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError("not an object with type, shape and place") from error
    if not isinstance(dtype, str) or not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
        raise ValueError("a type that is no text, or a number that is none")
    if len(shape) > MAX_AXES or any(axis >= MAX_AXIS for axis in shape):
        raise ValueError("an impossible shape")
    return Entry(dtype, shape, data + start, end - start)

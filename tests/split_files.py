"""Split GGUF files that tests make: whole sets as bytes, one entry a shard."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds4jax.loading.gguf_header import TENSOR_TYPES, Header, TensorInfo, read_header

BAD = Path(__file__).parent / "golden" / "mainline" / "bad"
# Broken and tricky files of the mainline flavour, by name.
CASES: dict[str, dict[str, Any]] = {case["name"]: case for case in json.loads((BAD / "index.json").read_text())}
_IDS = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}
_ALIGNMENT = 32


def unpacked(name: str, folder: Path) -> Path:
    """The files of a case, in a folder; returns the one to open."""
    for file, stored in CASES[name]["unpack"].items():
        (folder / file).write_bytes(gzip.decompress((BAD / stored).read_bytes()))
    return folder / CASES[name]["open"]


def key(name: str, code: str, value: int) -> bytes:
    """A metadata entry of an integer: "H" is u16, "i" is i32."""
    return _string(name) + struct.pack("<I" + code, {"H": 2, "I": 4, "i": 5}[code], value)


def split_keys(no: int, count: int, tensors: int) -> list[bytes]:
    """The three entries of a shard, as llama.cpp types them."""
    return [key("split.no", "H", no), key("split.count", "H", count), key("split.tensors.count", "i", tensors)]


def shards(source: Path, sizes: Sequence[int]) -> list[bytes]:
    """Cut a file into shards with so many tensors each, the rest in one more; all metadata is in the first."""
    header = read_header(source)
    infos, cut = list(header.tensors.values()), []
    for size in sizes:
        cut.append(infos[:size])
        infos = infos[size:]
    cut.append(infos)
    made = []
    for no, members in enumerate(cut):
        entries = split_keys(no, len(cut), len(header.tensors))
        made.append(shard(header, members, entries, metadata=not no))
    return made


def shard(header: Header, infos: Sequence[TensorInfo], entries: Sequence[bytes], *, metadata: bool) -> bytes:
    """A file with some tensors of another one, further metadata entries, and the other one's metadata if wanted."""
    records, data = b"", b""
    for info in infos:
        data += bytes(-len(data) % _ALIGNMENT)
        dims = struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *info.shape[::-1])
        records += _string(info.name) + dims + struct.pack("<IQ", _IDS[info.type], len(data))
        data += header.raw(info).tobytes()
    old = _entries(header) if metadata else b""
    count = len(entries) + (len(header.metadata) if metadata else 0)
    raw = b"GGUF" + struct.pack("<IQQ", 3, len(infos), count) + old + b"".join(entries) + records
    return raw + bytes(-len(raw) % _ALIGNMENT) + data


def write_set(folder: Path, raw: Sequence[bytes], stem: str = "set") -> list[Path]:
    """Write shards under their names."""
    paths = [folder / f"{stem}-{number:05}-of-{len(raw):05}.gguf" for number in range(1, len(raw) + 1)]
    for path, one in zip(paths, raw, strict=True):
        path.write_bytes(one)
    return paths


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _entries(header: Header) -> bytes:
    """The metadata entries of a file as stored: they end where the tensor table begins."""
    raw = header.shards[0].data.tobytes()
    return raw[24 : raw.index(_string(next(iter(header.tensors))))]

"""Checkpoints in the hub's form: a directory of config.json, safetensors shards with an index, and perhaps tokenizer.json."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.loading import hub_values
from ds4jax.loading.checkpoint import Checkpoint, Tensor
from ds4jax.loading.hub_config import read_config, read_json, with_mtp
from ds4jax.loading.mtp_file import DSPARK, drafter
from ds4jax.model.parameters import shapes

if TYPE_CHECKING:
    from ds4jax.tokenizer import Tokenizer

CONFIG, INDEX, SINGLE, TOKENIZER = "config.json", "model.safetensors.index.json", "model.safetensors", "tokenizer.json"
EXPERTS = ".ffn.experts."

# What may store a table of expert ids, a matrix, and everything else.
INTEGERS = ("I64", "I32")
MATRICES = ("F8_E4M3", "I8", "BF16", "F32")
VECTORS = ("BF16", "F32")
SCALED = ("F8_E4M3", "I8")
# I8 holds two FP4 codes a byte.
FORMAT = {"I8": "F4_E2M1"}
PLAIN = {"F32": "<f4", "I64": "<i8", "I32": "<i4"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a shard: where its bytes are."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor with the scales that belong to it; `shape` is that of its values."""

    entry: Entry
    scale: Entry | None
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file, scales included."""
        return self.entry.nbytes + (self.scale.nbytes if self.scale else 0)


def open_hub(path: Path, *, dtype: DTypeLike = jnp.float32) -> Checkpoint:
    """Open a checkpoint directory: config and headers are read and checked, no tensor is.

    Values are exact: FP8 and FP4 weights are multiplied out, experts of a layer are stacked. The model gets an MTP block when the
    weights hold one, whatever the config claims.

    Args:
        dtype: float32, or bfloat16 for the matrices (all named `.weight`); published matrices are exact in both.

    Raises:
        InputError: a file is missing or broken, or a tensor is missing, mis-shaped or stored in an unsupported way; names file
            and key or tensor.
        ValueError: `dtype` is something else.

    Source: file layout and tensor inventory of the V4-Flash checkpoint.
    """
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"dtype is {jnp.dtype(dtype).name}; it must be float32 or bfloat16")
    config, metadata = read_config(path / CONFIG)
    source, entries = _entries(path)
    kind = drafter(entries)
    if kind == "mtp":
        config = with_mtp(config, path / CONFIG)
    used: set[str] = set()
    tensors = []
    for name, shape in shapes(config).items():
        parts = [_stored(source, entries, part, size) for part, size in _parts(name, shape)]
        used.update(entry.name for part in parts for entry in (part.entry, part.scale) if entry)
        tensors.append((parts[0].entry, _tensor(name, shape, parts, config, dtype)))
    tensors.sort(key=lambda pair: (pair[0].file, pair[0].offset))
    return Checkpoint(
        path=path,
        kind="hub",
        config=config,
        tensors=tuple(tensor for _, tensor in tensors),
        tokenizer=_tokenizer(path / TOKENIZER, config),
        metadata=metadata,
        ignored=tuple(sorted(entries.keys() - used)),
        no_mtp={"mtp": "", "dspark": DSPARK, "": "these weights have no MTP block"}[kind],
    )


def _tokenizer(path: Path, config: Config) -> Tokenizer | None:
    if not path.exists():
        return None
    from ds4jax.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(f"{path}: has {tokenizer.vocab_size} tokens; the model of {CONFIG} has {config.vocab_size}")
    return tokenizer


def _entries(directory: Path) -> tuple[Path, dict[str, Entry]]:
    """The file that says which tensors there are, and every tensor by name."""
    index, single = directory / INDEX, directory / SINGLE
    if not index.exists():
        if not single.exists():
            raise InputError(f"{directory}: has neither {INDEX} nor {SINGLE}; fetch the weights")
        return single, _header(single)
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise InputError(f"{index}: weight_map: missing or not a table of tensor names and shard files; fetch the file again")
    entries: dict[str, Entry] = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard:
            raise InputError(f"{index}: weight_map: names the shard {shard!r}; a shard lies beside the index")
        for name, entry in _header(directory / shard).items():
            if name in entries or places.get(name, shard) != shard:
                other = entries[name].file.name if name in entries else places[name]
                raise InputError(f"{directory / shard}: {name!r}: also in {other!r}; the index must give each tensor one shard")
            entries[name] = entry
    for name, shard in places.items():
        if name not in entries:
            raise InputError(f"{index}: {name!r}: listed in {shard!r}, which does not hold it; fetch both again")
    return index, entries


def _header(file: Path) -> dict[str, Entry]:
    """Tensors of one safetensors file.

    The library checks that the offsets fill the file and agree with types and shapes. It cannot give FP8 values to numpy, so the
    bytes of every type are read in one way, at the offsets that it has checked.
    """
    if not file.is_file():
        raise InputError(f"{file}: no such file, though the checkpoint needs it; fetch the shard")
    try:
        with safe_open(file, framework="numpy"):
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a whole safetensors file ({' '.join(str(error).split())}); fetch it again") from error
    header.pop("__metadata__", None)
    return {name: _entry(file, name, info, 8 + length) for name, info in header.items()}


def _entry(file: Path, name: str, info: Any, data: int) -> Entry:
    if not isinstance(info, dict):
        raise InputError(f"{file}: {name!r}: described by {info!r}, which is not an object; fetch the file again")
    start, end = info["data_offsets"]
    return Entry(file, name, info["dtype"], tuple(info["shape"]), data + start, end - start)


def _parts(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each stored tensor that makes up a parameter: one for every expert of a stack, else itself."""
    head, experts, tail = name.partition(EXPERTS)
    if not experts:
        yield name, shape
        return
    # One at a time: the first that is missing ends the search, however many a broken config asks for.
    for expert in range(shape[0]):
        yield f"{head}{EXPERTS}{expert}.{tail}", shape[1:]


def _stored(source: Path, entries: dict[str, Entry], name: str, shape: tuple[int, ...]) -> Stored:
    """Find one tensor and its scales and check their types and shapes."""
    entry = entries.get(name)
    if entry is None:
        raise InputError(f"{source}: {name}: missing; the model of {CONFIG} needs it")
    is_matrix = name.endswith(".weight") and len(shape) == 2
    allowed = INTEGERS if name.endswith("tid2eid") else MATRICES if is_matrix else VECTORS
    if entry.dtype not in allowed:
        raise InputError(f"{entry.file}: {name}: has type {entry.dtype}; supported here are {', '.join(allowed)}")
    scale_name = f"{name.removesuffix('.weight')}.scale"
    scale = entries.get(scale_name)
    if entry.dtype not in SCALED:
        if scale is not None:
            raise InputError(f"{scale.file}: {scale_name}: scales of {entry.dtype} values, which have none")
        _check_shape(entry, shape)
        return Stored(entry, None, shape)
    if scale is None:
        raise InputError(f"{source}: {scale_name}: missing; {name} is stored as {entry.dtype} and needs it")
    if scale.dtype != "F8_E8M0":
        raise InputError(f"{scale.file}: {scale_name}: has type {scale.dtype}; supported here is F8_E8M0")
    rows, columns = shape
    if entry.dtype == "F8_E4M3":
        _check_shape(entry, shape)
        _check_shape(scale, hub_values.fp8_scale_shape(shape))
    else:
        if columns % hub_values.FP4_GROUP:
            raise InputError(f"{entry.file}: {name}: rows of {columns} values; FP4 needs a multiple of {hub_values.FP4_GROUP}")
        _check_shape(entry, (rows, columns // 2))
        _check_shape(scale, (rows, columns // hub_values.FP4_GROUP))
    return Stored(entry, scale, shape)


def _check_shape(entry: Entry, expected: tuple[int, ...]) -> None:
    if entry.shape != expected:
        raise InputError(f"{entry.file}: {entry.name}: has shape {list(entry.shape)}; {CONFIG} makes it {list(expected)}")


def _tensor(name: str, shape: tuple[int, ...], parts: list[Stored], config: Config, dtype: DTypeLike) -> Tensor:
    stored = "+".join(sorted({FORMAT.get(part.entry.dtype, part.entry.dtype) for part in parts}))
    nbytes = sum(part.nbytes for part in parts)
    if parts[0].entry.dtype in INTEGERS:
        read_ids = functools.partial(_read_expert_ids, parts[0], config.n_experts)
        return Tensor(name, shape, stored, nbytes, math.prod(shape) * jnp.dtype(jnp.int32).itemsize, read_ids)
    is_matrix = name.endswith(".weight") and len(shape) > 1
    into = jnp.dtype(dtype if is_matrix else jnp.float32)
    read = functools.partial(_read_values, shape, parts, into)
    return Tensor(name, shape, stored, nbytes, math.prod(shape) * into.itemsize, read)


def _read_values(shape: tuple[int, ...], parts: list[Stored], dtype: np.dtype) -> jax.Array:
    """Read a tensor, or its parts one by one into the only array of its full size."""
    values = np.empty((len(parts), *parts[0].shape), dtype)
    for slot, part in zip(values, parts, strict=True):
        slot[...] = _dequantized(part)
    return jnp.asarray(values.reshape(shape))


def _dequantized(stored: Stored) -> np.ndarray:
    """Values of one tensor, float32."""
    entry, raw = stored.entry, _bytes(stored.entry)
    if stored.scale is not None:
        multiply_out = hub_values.from_fp8 if entry.dtype == "F8_E4M3" else hub_values.from_fp4
        scales = _bytes(stored.scale).reshape(stored.scale.shape)
        # Codes that overflow are refused below, with the name of the tensor.
        with np.errstate(over="ignore", invalid="ignore"):
            values = multiply_out(raw.reshape(entry.shape), scales)
    elif entry.dtype == "BF16":
        values = hub_values.from_bf16(raw.view("<u2")).reshape(entry.shape)
    else:
        values = raw.view(PLAIN[entry.dtype]).reshape(entry.shape)
    if not np.isfinite(values).all():
        raise InputError(f"{entry.file}: {entry.name}: holds values that are not finite; fetch the shard again")
    return values


def _read_expert_ids(stored: Stored, n_experts: int) -> jax.Array:
    """The table of a hash-routed layer, int32."""
    entry = stored.entry
    ids = _bytes(entry).view(PLAIN[entry.dtype]).reshape(entry.shape)
    outside = ids[(ids < 0) | (ids >= n_experts)]
    if len(outside):
        raise InputError(f"{entry.file}: {entry.name}: names expert {outside[0]} of {n_experts}")
    return jnp.asarray(ids.astype(np.int32))


def _bytes(entry: Entry) -> np.ndarray:
    """A tensor's bytes as the file holds them, uint8 [nbytes]."""
    try:
        raw = np.fromfile(entry.file, np.uint8, entry.nbytes, offset=entry.offset)
    except OSError as error:
        raise InputError(f"{entry.file}: {entry.name}: cannot be read ({error.strerror})") from error
    if len(raw) < entry.nbytes:
        raise InputError(f"{entry.file}: {entry.name}: the file ends inside it; it has become shorter since it was opened")
    return raw

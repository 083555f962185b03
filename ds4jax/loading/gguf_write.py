"""Write a model as a GGUF file with the published tensor names."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.files import replacing
from ds4jax.loading import gguf_config
from ds4jax.loading.gguf_header import DEFAULT_ALIGNMENT
from ds4jax.loading.gguf_names import DENSE, EMBEDDING, EXPERTS, SMALL, TABLE, Slot, slots
from ds4jax.loading.gguf_values import encode
from ds4jax.text.tokenizer import KIND, MERGES_KEY, PRE_TOKENIZER, TOKENS_KEY, TYPES_KEY
from pallas_kernels.formats import Quantized

# Multiple of bytes at which the data of each tensor begins.
ALIGNMENT = DEFAULT_ALIGNMENT

# Key, type and value of one piece of metadata. Types are named as in `gguf_header.Value`.
Entry = tuple[str, str, Any]

_VALUE_TYPES = {
    "u8": GGUFValueType.UINT8,
    "i8": GGUFValueType.INT8,
    "u16": GGUFValueType.UINT16,
    "i16": GGUFValueType.INT16,
    "u32": GGUFValueType.UINT32,
    "i32": GGUFValueType.INT32,
    "u64": GGUFValueType.UINT64,
    "i64": GGUFValueType.INT64,
    "f32": GGUFValueType.FLOAT32,
    "f64": GGUFValueType.FLOAT64,
    "bool": GGUFValueType.BOOL,
    "str": GGUFValueType.STRING,
}
_TYPE_OF = {bool: "bool", int: "i64", float: "f64", str: "str"}


def write_gguf(
    path: str | Path,
    config: Config,
    tensors: Mapping[str, jax.Array | np.ndarray | Quantized],
    *,
    tokens: Sequence[str] = (),
    merges: Sequence[str] = (),
    token_types: Sequence[int] = (),
    metadata: Mapping[str, str | bool | int | float] | None = None,
    quantize: bool = False,
    small: str = "F16",
    embedding: str = "F16",
) -> None:
    """Write a model, its MTP block included, as one GGUF file. After an error there is no new file.

    Args:
        tensors: every parameter by its name in the published checkpoint. Quantised values are stored as they are.
        tokens, merges, token_types: the vocabulary by id, its merges ("a b", best first) and ggml's type of each token
            (1 normal, 3 control, 4 user defined); without tokens the file holds no tokenizer.
        metadata: further keys; integers are stored as i64, reals as f64.
        quantize: store dense matrices and experts that are not quantised yet as Q8_0, instead of BF16 where they are bfloat16
            and F32 elsewhere.
        small: type of hyper-connection functions, routers, compressors and indexers: F16, BF16 or F32.
        embedding: type of the embedding: F16, BF16, F32 or Q8_0.

    Raises:
        InputError: a path that cannot be written.
        ValueError: tensors that do not fit the configuration or the chosen types.
    """
    stored = stored_tensors(slots(config), tensors, quantize=quantize, small=small, embedding=embedding)
    write_tensors(path, gguf_config.ARCHITECTURE, entries(config, tokens, merges, token_types, metadata or {}), stored)


# Name, values as they are stored, and type of a tensor.
StoredTensor = tuple[str, np.ndarray, str]


def stored_tensors(
    wanted: Iterable[Slot],
    tensors: Mapping[str, jax.Array | np.ndarray | Quantized],
    *,
    quantize: bool,
    small: str,
    embedding: str,
) -> list[StoredTensor]:  # fmt: skip
    """The tensors of these parameters under their own GGUF names; other arguments and errors as for `write_gguf`."""
    rest, made = dict(tensors), []
    for slot in wanted:
        if slot.name not in rest:
            raise ValueError(f"{slot.name}: no value given")
        value = rest.pop(slot.name)
        if tuple(value.shape) != slot.shape:
            raise ValueError(f"{slot.name}: shape {list(value.shape)}, the configuration asks for {list(slot.shape)}")
        stored = _stored_type(slot, value, quantize=quantize, small=small, embedding=embedding)
        made.append((slot.gguf_name, encode(value, stored, slot.name), stored))
    if rest:
        raise ValueError(f"{min(rest)}: the model has no such parameter")
    return made


def write_tensors(path: str | Path, architecture: str, metadata: Iterable[Entry], tensors: Iterable[StoredTensor]) -> None:
    """Write a GGUF file with these tensors in their order. After an error there is no new file.

    Raises:
        InputError: a path that cannot be written.
    """
    writer = _writer(architecture, metadata)
    for name, array, stored in tensors:
        writer.add_tensor(name, array, raw_dtype=GGMLQuantizationType[stored])
    _write_atomically(writer, Path(path))


def header(architecture: str, metadata: Iterable[Entry], tensors: Iterable[tuple[str, tuple[int, ...], str, int]]) -> bytes:
    """Bytes of a GGUF file before its data. The tensors follow in this order, each padded to `ALIGNMENT` bytes.

    Args:
        architecture: the value of the first key, `general.architecture`.
        metadata: all other keys, in the order of the file.
        tensors: GGUF name, shape, stored type and number of bytes of each.
    """
    writer = _writer(architecture, metadata)
    for name, shape, stored, nbytes in tensors:
        # With a stored type the writer keeps the shape, for every dtype but uint8.
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=GGMLQuantizationType[stored])
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(writer):
        path = Path(folder) / "header.gguf"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        content = path.read_bytes()
    return content + bytes(-len(content) % ALIGNMENT)


def entries(
    config: Config,
    tokens: Sequence[str] = (),
    merges: Sequence[str] = (),
    token_types: Sequence[int] = (),
    metadata: Mapping[str, str | bool | int | float] | None = None,
) -> list[Entry]:
    """Metadata of a file as the ds4 project publishes it; the arguments are those of `write_gguf`."""
    own = [(key, _TYPE_OF[type(value)], value) for key, value in (metadata or {}).items()]
    quantization = ("general.quantization_version", "u32", 2)
    return [quantization, *gguf_config.metadata(config), *vocabulary_entries(tokens, merges, token_types), *own]


def vocabulary_entries(tokens: Sequence[str], merges: Sequence[str], token_types: Sequence[int]) -> list[Entry]:
    """Metadata of a vocabulary, as for `write_gguf`; empty without tokens."""
    if not tokens:
        return []
    return [
        *((key, "str", value) for key, value in (KIND, PRE_TOKENIZER)),
        (TOKENS_KEY, "str[]", list(tokens)),
        (MERGES_KEY, "str[]", list(merges)),
        (TYPES_KEY, "i32[]", list(token_types)),
    ]


def _writer(architecture: str, metadata: Iterable[Entry]) -> GGUFWriter:
    """A writer with all metadata and no tensors."""
    writer = GGUFWriter(None, architecture)
    for key, kind, value in metadata:
        if kind.endswith("[]"):
            items = value.tolist() if isinstance(value, np.ndarray) else value
            writer.add_key_value(key, items, GGUFValueType.ARRAY, _VALUE_TYPES[kind[:-2]])
        else:
            writer.add_key_value(key, value, _VALUE_TYPES[kind])
    return writer


def _stored_type(slot: Slot, value: jax.Array | np.ndarray | Quantized, *, quantize: bool, small: str, embedding: str) -> str:
    if isinstance(value, Quantized):
        stored = type(value).__name__
    elif slot.kind is EMBEDDING:
        stored = embedding
    elif slot.kind is SMALL:
        stored = small
    elif slot.kind in (DENSE, EXPERTS) and quantize:
        stored = "Q8_0"
    elif slot.kind in (DENSE, EXPERTS) and value.dtype == jnp.bfloat16:
        stored = "BF16"
    else:
        stored = "I32" if slot.kind is TABLE else "F32"
    if stored not in slot.types:
        raise ValueError(f"{slot.name}: cannot be stored as {stored}; it must be {' or '.join(slot.types)}")
    return stored


def _write_atomically(writer: GGUFWriter, path: Path) -> None:
    try:
        with replacing(path) as unfinished, contextlib.closing(writer):
            writer.write_header_to_file(unfinished)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error

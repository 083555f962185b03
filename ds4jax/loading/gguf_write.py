"""Writing a model as a GGUF file in the published naming."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.files import replacing
from ds4jax.loading import gguf_config
from ds4jax.loading.gguf_header import DEFAULT_ALIGNMENT
from ds4jax.loading.gguf_names import EMBEDDING, SMALL, Slot, slots
from ds4jax.loading.gguf_values import encode
from ds4jax.tokenizer import KIND, MERGES_KEY, PRE_TOKENIZER, TOKENS_KEY, TYPES_KEY
from pallas_kernels.formats import Quantized

# Multiple of bytes at which the data of each tensor begins.
ALIGNMENT = DEFAULT_ALIGNMENT

_VALUE_TYPES = {
    "u32": GGUFValueType.UINT32,
    "i32": GGUFValueType.INT32,
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
    """Write a model, its MTP block included, as one GGUF file; the file is there complete or not at all.

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
    path = Path(path)
    writer = _writer(config, tokens, merges, token_types, metadata or {})
    rest = dict(tensors)
    for slot in slots(config):
        if slot.name not in rest:
            raise ValueError(f"{slot.name}: no value given")
        value = rest.pop(slot.name)
        if tuple(value.shape) != slot.shape:
            raise ValueError(f"{slot.name}: shape {list(value.shape)}, the configuration asks for {list(slot.shape)}")
        stored = _stored_type(slot, value, quantize=quantize, small=small, embedding=embedding)
        array = encode(value, stored, slot.name)
        writer.add_tensor(slot.gguf_name, array, raw_dtype=GGMLQuantizationType[stored])
    if rest:
        raise ValueError(f"{min(rest)}: the model has no such parameter")
    _write_atomically(writer, path)


def header(
    config: Config,
    tensors: Sequence[tuple[str, tuple[int, ...], str, int]],
    *,
    tokens: Sequence[str] = (),
    merges: Sequence[str] = (),
    token_types: Sequence[int] = (),
    metadata: Mapping[str, str | bool | int | float] | None = None,
) -> bytes:
    """All of a GGUF file that comes before its data, whose tensors follow in this order, each padded to `ALIGNMENT` bytes.

    Args:
        tensors: of each its GGUF name, shape, stored type and bytes.
        tokens, merges, token_types, metadata: as for `write_gguf`.
    """
    writer = _writer(config, tokens, merges, token_types, metadata or {})
    for name, shape, stored, nbytes in tensors:
        # With the stored type given, the writer takes the shape as it is for any type but uint8.
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=GGMLQuantizationType[stored])
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(writer):
        path = Path(folder) / "header.gguf"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        content = path.read_bytes()
    return content + bytes(-len(content) % ALIGNMENT)


def _writer(
    config: Config,
    tokens: Sequence[str],
    merges: Sequence[str],
    token_types: Sequence[int],
    metadata: Mapping[str, str | bool | int | float],
) -> GGUFWriter:
    """A writer that has all metadata and no tensor yet."""
    writer = GGUFWriter(None, gguf_config.ARCHITECTURE)
    writer.add_quantization_version(2)
    for key, kind, value in gguf_config.metadata(config):
        _add(writer, key, kind, value)
    if tokens:
        _add_tokenizer(writer, tokens, merges, token_types)
    for key, value in metadata.items():
        _add(writer, key, _TYPE_OF[type(value)], value)
    return writer


def _stored_type(slot: Slot, value: jax.Array | np.ndarray | Quantized, *, quantize: bool, small: str, embedding: str) -> str:
    if isinstance(value, Quantized):
        stored = type(value).__name__
    elif slot.types is EMBEDDING:
        stored = embedding
    elif slot.types is SMALL:
        stored = small
    elif "Q8_0" in slot.types and quantize:
        stored = "Q8_0"
    elif "BF16" in slot.types and value.dtype == jnp.bfloat16:
        stored = "BF16"
    else:
        stored = "I32" if "I32" in slot.types else "F32"
    if stored not in slot.types:
        raise ValueError(f"{slot.name}: cannot be stored as {stored}; it must be {' or '.join(slot.types)}")
    return stored


def _add(writer: GGUFWriter, key: str, kind: str, value: object) -> None:
    if kind.endswith("[]"):
        writer.add_key_value(key, value, GGUFValueType.ARRAY, _VALUE_TYPES[kind[:-2]])
    else:
        writer.add_key_value(key, value, _VALUE_TYPES[kind])


def _add_tokenizer(writer: GGUFWriter, tokens: Sequence[str], merges: Sequence[str], token_types: Sequence[int]) -> None:
    for key, value in (KIND, PRE_TOKENIZER):
        _add(writer, key, "str", value)
    _add(writer, TOKENS_KEY, "str[]", list(tokens))
    _add(writer, MERGES_KEY, "str[]", list(merges))
    _add(writer, TYPES_KEY, "i32[]", list(token_types))


def _write_atomically(writer: GGUFWriter, path: Path) -> None:
    try:
        with replacing(path) as unfinished, contextlib.closing(writer):
            writer.write_header_to_file(unfinished)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error

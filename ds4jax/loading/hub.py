"""Checkpoints in the hub's form: a directory of config.json, safetensors shards with an index, and perhaps tokenizer.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.loading import hub_values
from ds4jax.loading.checkpoint import Checkpoint, Tensor
from ds4jax.loading.gguf_names import DENSE, EXPERTS, TABLE, slots
from ds4jax.loading.hub_config import read_config, read_json, with_mtp
from ds4jax.loading.hub_read import INTEGERS, Entry, Source, Stored
from ds4jax.loading.mtp_file import DSPARK, drafter
from ds4jax.loading.reading import Reading
from ds4jax.model.parameters import shapes
from pallas_kernels.formats import Q8_0

if TYPE_CHECKING:
    from ds4jax.tokenizer import Tokenizer

CONFIG, INDEX, SINGLE, TOKENIZER = "config.json", "model.safetensors.index.json", "model.safetensors", "tokenizer.json"
EXPERTS_IN = ".ffn.experts."

# What may store a matrix, and everything else but a table of expert ids.
MATRICES = ("F8_E4M3", "I8", "BF16", "F32")
VECTORS = ("BF16", "F32")
SCALED = ("F8_E4M3", "I8")
# I8 holds two FP4 codes a byte.
FORMAT = {"I8": "F4_E2M1"}
# What `dense` may be, and the GGUF type that it stands for.
DENSE_FORMS = {"q8_0": "Q8_0", "bf16": "BF16", "f32": "F32"}


@dataclasses.dataclass(frozen=True)
class Hub:
    """A checkpoint directory whose headers were read and agree with its config.

    Attributes:
        metadata: everything that `config.json` says.
        sources: every parameter once, in the order of the files.
        ignored: tensors that the model has no use for.
        no_mtp: as in `Checkpoint`.
    """

    path: Path
    config: Config
    metadata: dict[str, Any]
    sources: tuple[Source, ...]
    ignored: tuple[str, ...]
    no_mtp: str


def open_hub(path: Path, *, dense: str | None = None) -> Checkpoint:
    """Open a checkpoint directory: config and headers are read and checked, no tensor is.

    The model gets an MTP block when the weights hold one, whatever the config claims.

    Args:
        dense: None multiplies everything out to exact float32. "q8_0", "bf16" or "f32" keeps FP4 experts as MXFP4, which loses
            nothing, and makes dense matrices of that type. Then the embedding, the router's matrix and those of compressors and
            indexers become bfloat16, in which published values are exact; where the files have float32, or with "f32",
            float32. All else is float32: norms, biases, sinks, hyper-connections.

    Raises:
        InputError: a file is missing or broken, or a tensor is missing, mis-shaped, stored in an unsupported way or not to be had
            as `dense`; names file and key or tensor.

    Source: file layout and tensor inventory of the V4-Flash checkpoint.
    """
    hub = read_hub(path, dense=dense)
    return Checkpoint(
        path=path,
        kind="hub",
        config=hub.config,
        tensors=tuple(_tensor(source) for source in hub.sources),
        tokenizer=_tokenizer(path / TOKENIZER, hub.config),
        metadata=hub.metadata,
        ignored=hub.ignored,
        no_mtp=hub.no_mtp,
    )


def read_hub(path: Path, *, dense: str | None = None) -> Hub:
    """What `open_hub` makes a checkpoint of: config and headers, and where and how each parameter is to be read.

    Raises:
        InputError: as for `open_hub`, the tokenizer aside.
    """
    if dense is not None and dense not in DENSE_FORMS:
        raise InputError(f"dense is {dense!r}; it must be {', '.join(DENSE_FORMS)}")
    config, metadata = read_config(path / CONFIG)
    source, entries = _entries(path)
    kind = drafter(entries)
    if kind == "mtp":
        config = with_mtp(config, path / CONFIG)
    found = {
        name: tuple(_stored(source, entries, part, size) for part, size in _parts(name, shape))
        for name, shape in shapes(config).items()
    }
    forms = _forms(config, found, dense)
    used = {entry.name for parts in found.values() for part in parts for entry in (part.entry, part.scale) if entry}
    in_order = sorted(found.items(), key=lambda one: (one[1][0].entry.file, one[1][0].entry.offset))
    return Hub(
        path=path,
        config=config,
        metadata=metadata,
        sources=tuple(_source(name, parts, forms[name], config) for name, parts in in_order),
        ignored=tuple(sorted(entries.keys() - used)),
        no_mtp={"mtp": "", "dspark": DSPARK, "": "these weights have no MTP block"}[kind],
    )


def _forms(config: Config, found: dict[str, tuple[Stored, ...]], dense: str | None) -> dict[str, str]:
    """The type that each parameter becomes."""
    fp4 = {name for name, parts in found.items() if all(part.entry.dtype == "I8" for part in parts)}
    forms = {}
    for slot in slots(config):
        # Gate and up of an expert have one type.
        partner = slot.name.replace(".experts.w1.", ".experts.w3.") if ".w1." in slot.name else slot.name.replace(".w3.", ".w1.")
        if slot.types is TABLE:
            form = "I32"
        elif dense is None or not slot.name.endswith(".weight") or len(slot.shape) == 1:
            form = "F32"
        elif slot.types is EXPERTS and {slot.name, partner} <= fp4:
            form = "MXFP4"
        elif slot.types in (DENSE, EXPERTS):
            form = DENSE_FORMS[dense]
        else:
            is_float32 = dense == "f32" or any(part.entry.dtype == "F32" for part in found[slot.name])
            form = "F32" if is_float32 else "BF16"
        forms[slot.name] = form
    return forms


def _source(name: str, parts: tuple[Stored, ...], form: str, config: Config) -> Source:
    shape = parts[0].shape if EXPERTS_IN not in name else (len(parts), *parts[0].shape)
    if form == "Q8_0" and shape[-1] % Q8_0.BLOCK:
        file = parts[0].entry.file
        raise InputError(f"{file}: {name}: rows of {shape[-1]} values; Q8_0 needs a multiple of {Q8_0.BLOCK}, bf16 does not")
    return Source(name, shape, parts, form, config.n_experts)


def _tensor(source: Source) -> Tensor:
    stored = "+".join(sorted({FORMAT.get(part.entry.dtype, part.entry.dtype) for part in source.parts}))
    nbytes = sum(part.nbytes for part in source.parts)
    return Tensor(source.name, source.shape, stored, source.form, nbytes, source.nbytes, lambda: Reading.at_once(source.read))


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
    head, experts, tail = name.partition(EXPERTS_IN)
    if not experts:
        yield name, shape
        return
    # One at a time: the first that is missing ends the search, however many a broken config asks for.
    for expert in range(shape[0]):
        yield f"{head}{EXPERTS_IN}{expert}.{tail}", shape[1:]


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

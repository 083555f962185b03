"""Hub checkpoints: a directory with config.json, safetensors shards, their index, and optionally tokenizer.json."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ds4jax.bounds import DENSE_FORMS
from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.files import open_regular
from ds4jax.loading import hub_values, safetensors_header
from ds4jax.loading.checkpoint import Checkpoint, Tensor
from ds4jax.loading.drafter_choice import NOT_WANTED, WITH_DSPARK, kinds, lacking
from ds4jax.loading.dspark_names import hub_name
from ds4jax.loading.gguf_names import DENSE, EXPERTS, TABLE, contradiction, slots
from ds4jax.loading.hub_config import KEYS, read_config, read_json, with_fields, with_mtp
from ds4jax.loading.hub_dspark import read_dspark
from ds4jax.loading.hub_read import INTEGERS, Entry, Source, Stored
from ds4jax.loading.mtp_file import NONE_INSIDE, is_named_drafter, no_block
from ds4jax.loading.mtp_names import drafter as drafter_of
from ds4jax.loading.tensor_reader import Reading
from ds4jax.model.parameters import shapes
from pallas_kernels.formats import Q8_0

if TYPE_CHECKING:
    from ds4jax.text.tokenizer import Tokenizer

CONFIG, INDEX, SINGLE, TOKENIZER = "config.json", "model.safetensors.index.json", "model.safetensors", "tokenizer.json"
EXPERTS_IN = ".ffn.experts."

# Types that may store a matrix, and types of all other tensors but tables of expert ids.
MATRICES = ("F8_E4M3", "I8", "BF16", "F32")
VECTORS = ("BF16", "F32")
SCALED = ("F8_E4M3", "I8")
# I8 holds two FP4 codes a byte.
FORMAT = {"I8": "F4_E2M1"}


@dataclasses.dataclass(frozen=True)
class Hub:
    """A checkpoint directory with headers that were read and agree with its config.

    Attributes:
        metadata: the content of `config.json`.
        sources: every parameter once, in the order of the files.
        index: the file that lists the tensors.
        entries: every stored tensor by name.
        files: every file of the directory that belongs to the checkpoint.
        ignored: tensors that the model does not use.
        drafter, no_mtp: as in `Checkpoint`.
    """

    path: Path
    config: Config
    metadata: dict[str, Any]
    sources: tuple[Source, ...]
    index: Path
    entries: dict[str, Entry]
    files: tuple[Path, ...]
    ignored: tuple[str, ...]
    drafter: str
    no_mtp: str


def open_hub(path: Path, *, dense: str | None = None, drafter: str = "auto") -> Checkpoint:
    """Open a checkpoint directory: config and headers are read and checked, tensors are not.

    The tensors decide whether the model has an MTP block or a DSpark drafter, whatever the config says.

    Args:
        drafter: which drafter's weights are read, as for `ds4jax.load`.
        dense: None, "q8_0", "bf16" or "f32". Decides the type of each tensor:

            | tensors                                | None    | "q8_0", "bf16"                      | "f32"   |
            |----------------------------------------|---------|-------------------------------------|---------|
            | FP4 experts                            | float32 | MXFP4, exact                        | MXFP4   |
            | dense matrices, other experts          | float32 | Q8_0 or bfloat16, as asked          | float32 |
            | embedding, router, compressor, indexer | float32 | as stored, bfloat16 or float32      | float32 |
            | norms, biases, sinks, hyper-connections| float32 | float32                             | float32 |

    Raises:
        InputError: a file is missing or broken, or a tensor is missing, has a wrong shape or type or cannot become `dense`; the
            message names file and key or tensor.

    Source: file layout and tensor inventory of the V4-Flash checkpoint.
    """
    hub = read_hub(path, dense=dense, drafter=drafter)
    return Checkpoint(
        path=path,
        kind="hub",
        config=hub.config,
        tensors=tuple(_tensor(source) for source in hub.sources),
        tokenizer=_tokenizer(path / TOKENIZER, hub.config),
        metadata=hub.metadata,
        ignored=hub.ignored,
        files=hub.files,
        drafter=hub.drafter,
        no_mtp=hub.no_mtp,
    )


def read_hub(path: Path, *, dense: str | None = None, mainline: bool = False, drafter: str = "auto") -> Hub:
    """Read config and headers, and find where and how each parameter is stored.

    Args:
        mainline: give each parameter the type of `mainline_form` instead of the table of `open_hub`.
        drafter: as for `open_hub`.

    Raises:
        InputError: as for `open_hub`, except errors of the tokenizer.
    """
    if dense is not None and dense not in DENSE_FORMS:
        raise InputError(f"dense is {dense!r}; it must be {', '.join(DENSE_FORMS)}")
    if not os.path.lexists(path / CONFIG) and any(path.glob("*.gguf")):
        # A model before the files that only a drafter's name tells from one.
        first = min(path.glob("*.gguf"), key=lambda file: (is_named_drafter(file), file)).name
        raise InputError(f"{path}: a folder with GGUF files, and no {CONFIG}; give the name of a file, such as {first}")
    config, metadata = read_config(path / CONFIG)
    source, entries = _entries(path)
    kind, no_mtp = _drafter(path, entries, drafter)
    if kind == "mtp":
        config = with_mtp(config, path / CONFIG)
    elif kind == "dspark":
        numbers = read_dspark(path / CONFIG, config, metadata, source, entries)
        config = with_fields(config, path / CONFIG, numbers.fields)
    found = {
        name: tuple(_stored(source, entries, part, size) for part, size in _parts(hub_name(name, config.n_dspark), shape))
        for name, shape in shapes(config).items()
    }
    if mainline:
        forms = {name: mainline_form(name, parts, dense or "q8_0") for name, parts in found.items()}
    else:
        forms = _forms(config, found, dense)
    used = {entry.name for parts in found.values() for part in parts for entry in (part.entry, part.scale) if entry}
    # A drafter that was not wanted is not unknown.
    known = "mtp." if no_mtp == NOT_WANTED else None
    ignored = tuple(sorted(name for name in entries.keys() - used if known is None or not name.startswith(known)))
    wrong = contradiction(config, ignored)
    if wrong is not None:
        raise InputError(f"{path / CONFIG}: {KEYS[wrong[0]]}: {wrong[1]}")
    in_order = sorted(found.items(), key=lambda one: (one[1][0].entry.file, one[1][0].entry.offset))
    return Hub(
        path=path,
        config=config,
        metadata=metadata,
        sources=tuple(_source(name, parts, forms[name], config) for name, parts in in_order),
        index=source,
        entries=entries,
        ignored=ignored,
        files=(path / CONFIG, source, *{entry.file: None for entry in entries.values()}, path / TOKENIZER),
        drafter=kind,
        no_mtp=no_mtp,
    )


def _drafter(path: Path, entries: dict[str, Entry], wanted: str) -> tuple[str, str]:
    """The drafter of the weights, as `drafter` and `no_mtp` of `Hub`.

    Raises:
        InputError: a kind that the weights do not have is wanted.
    """
    if not kinds(wanted):
        return wanted, NOT_WANTED
    own = drafter_of(entries)
    if own in kinds(wanted):
        return own, WITH_DSPARK if own == "dspark" else ""
    reason = no_block(entries, NONE_INSIDE)
    if wanted != "auto":
        raise InputError(f"{path}: {lacking(wanted, reason if wanted == 'mtp' else '')}")
    return "none", reason


def _forms(config: Config, found: dict[str, tuple[Stored, ...]], dense: str | None) -> dict[str, str]:
    """The type that each parameter becomes."""
    fp4 = {name for name, parts in found.items() if all(part.entry.dtype == "I8" for part in parts)}
    forms = {}
    for slot in slots(config):
        # Gate and up of an expert have one type.
        partner = slot.name.replace(".experts.w1.", ".experts.w3.") if ".w1." in slot.name else slot.name.replace(".w3.", ".w1.")
        if slot.kind is TABLE:
            form = "I32"
        elif dense is None or not slot.name.endswith(".weight") or len(slot.shape) == 1:
            form = "F32"
        elif slot.kind is EXPERTS and {slot.name, partner} <= fp4:
            form = "MXFP4"
        elif slot.kind in (DENSE, EXPERTS):
            form = DENSE_FORMS[dense]
        else:
            is_float32 = dense == "f32" or any(part.entry.dtype == "F32" for part in found[slot.name])
            form = "F32" if is_float32 else "BF16"
        forms[slot.name] = form
    return forms


def mainline_form(name: str, parts: tuple[Stored, ...], dense: str) -> str:
    """The type that llama.cpp's converter gives a parameter.

    FP4 experts become MXFP4, FP8 matrices `dense`; bfloat16 matrices stay unless `dense` is "f32"; all else is float32.

    Args:
        parts: its stored tensors, one for each expert of a stack.
        dense: "q8_0" as the converter does, "bf16", which holds FP8 values without loss, or "f32".
    """
    kinds = {part.entry.dtype for part in parts}
    if kinds <= set(INTEGERS):
        return "I32"
    if not name.endswith(".weight") or len(parts[0].shape) == 1:
        return "F32"
    if EXPERTS_IN in name and kinds == {"I8"}:
        return "MXFP4"
    if kinds & set(SCALED):
        return DENSE_FORMS[dense]
    return "F32" if "F32" in kinds or dense == "f32" else "BF16"


def _source(name: str, parts: tuple[Stored, ...], form: str, config: Config) -> Source:
    shape = parts[0].shape if EXPERTS_IN not in name else (len(parts), *parts[0].shape)
    if form == "Q8_0" and shape[-1] % Q8_0.BLOCK:
        file = parts[0].entry.file
        raise InputError(f"{file}: {name}: rows of {shape[-1]} values; Q8_0 needs a multiple of {Q8_0.BLOCK}, bf16 does not")
    return Source(name, shape, parts, form, config.n_experts)


def _tensor(source: Source) -> Tensor:
    stored = "+".join(sorted({FORMAT.get(part.entry.dtype, part.entry.dtype) for part in source.parts}))
    nbytes = sum(part.nbytes for part in source.parts)

    def start(rows: slice | None) -> Reading:
        return Reading.at_once(functools.partial(source.read, rows))

    return Tensor(source.name, source.shape, stored, source.form, nbytes, source.nbytes, start)


def _tokenizer(path: Path, config: Config) -> Tokenizer | None:
    if not os.path.lexists(path):
        return None
    from ds4jax.text.tokenizer import Tokenizer

    return Tokenizer.from_file(path, config.vocab_size)


def _entries(directory: Path) -> tuple[Path, dict[str, Entry]]:
    """The file that lists the tensors, and every tensor by name."""
    index, single = directory / INDEX, directory / SINGLE
    if not os.path.lexists(index):
        if not os.path.lexists(single):
            raise InputError(f"{directory}: has neither {INDEX} nor {SINGLE}; fetch the weights")
        return single, _header(single)
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise InputError(f"{index}: weight_map: missing or not a table of tensor names and shard files; fetch the file again")
    entries: dict[str, Entry] = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard or shard in ("", ".."):
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
    bytes of every type are read at the offsets that it has checked.
    """
    try:
        stream = open_regular(file)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}), though the checkpoint needs it; fetch the shard") from error
    try:
        with stream, safe_open(file, framework="numpy"):
            header, data = safetensors_header.read_header(stream)
    except (SafetensorError, safetensors_header.BadLength, ValueError, OSError) as error:
        raise InputError(f"{file}: not a whole safetensors file ({' '.join(str(error).split())}); fetch it again") from error
    header.pop("__metadata__", None)
    return {name: _entry(file, name, info, data) for name, info in header.items()}


def _entry(file: Path, name: str, info: Any, data: int) -> Entry:
    try:
        found = safetensors_header.entry(info, data)
    except ValueError:
        raise InputError(f"{file}: {name!r}: described by {info!r}, which is not an object; fetch the file again") from None
    return Entry(found.dtype, found.shape, found.offset, found.nbytes, file, name)


def _parts(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each stored tensor of a parameter: one for each expert of a stack, else one."""
    head, experts, tail = name.partition(EXPERTS_IN)
    if not experts:
        yield name, shape
        return
    # A generator: the first missing tensor ends the search, however many experts a broken config has.
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

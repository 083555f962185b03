"""What a GGUF file becomes: its shards in one file, the other flavour, or dense matrices in another type."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ds4jax.bounds import REQUANTISED_FORMS
from ds4jax.errors import InputError
from ds4jax.loading import mainline
from ds4jax.loading.convert_sources import Source, copied, requantised
from ds4jax.loading.convert_write import DSPARK_PREFIX, MTP_PREFIX, Plan, digest, drafters_of, joined, output
from ds4jax.loading.dspark_names import DFLASH
from ds4jax.loading.flavour import ANTIREZ, MAINLINE, flavour_of
from ds4jax.loading.gguf_config import ARCHITECTURE, PREFIX, dspark_metadata, read_config
from ds4jax.loading.gguf_header import Header
from ds4jax.loading.gguf_model import GgufModel, check_model
from ds4jax.loading.gguf_names import DENSE, EMBEDDING, EXPERTS, SMALL, VECTOR, slots
from ds4jax.loading.gguf_read import open_gguf
from ds4jax.loading.gguf_split import open_set
from ds4jax.loading.gguf_write import Entry, entries
from ds4jax.loading.mtp_file import DSPARK_ARCHITECTURE, INSIDE
from ds4jax.text.tokenizer import MERGES_KEY, NORMAL, TOKENS_KEY, TYPES_KEY

MERGED_KEY, FLAVOUR_KEY, REQUANTISED_KEY = "ds4jax.merged_shards", "ds4jax.converted_flavour", "ds4jax.requantised"
# Matrices that --requantise leaves as they are: experts, routers, hyper-connection functions, positions of compressed rows.
_KEPT = re.compile(r"_exps\.|ffn_gate_inp\.|(^|\.)(output_)?hc_|_ape\.")
# Types that the ds4 project's reader takes, where it does not take all.
_ANTIREZ_TYPES = {
    DENSE: ("Q8_0", "BF16", "F32"),
    EMBEDDING: ("F16", "BF16", "F32", "Q8_0"),
    SMALL: ("F16", "BF16", "F32"),
    VECTOR: ("F32",),
    EXPERTS: ("IQ2_XXS", "Q2_K", "Q4_K", "MXFP4", "Q8_0"),
}


def plan_gguf(
    path: Path, out: Path, *, flavour: str | None = None, requantise: str | None = None, drafter: Path | None = None
) -> Plan:
    """Read the headers of a GGUF file, or of all its shards, and lay out the file that it becomes.

    Without `requantise` every stored value is copied. In another flavour, the MTP block goes into a file of its own for
    "mainline", and into the model's file for "antirez". A DSpark drafter goes into a file of its own for both.

    Args:
        flavour: "mainline" or "antirez"; None keeps the file's own.
        requantise: "q8_0", "bf16", "f16" or "f32": the new type of all matrices but experts, routers and hyper-connections.
        drafter: the drafter's own file, as for `check_model`.

    Raises:
        InputError: the file cannot be read, or it cannot become `flavour` without loss.
    """
    checked = check_model(open_set(path), drafter)
    model, checkpoint = checked.header, open_gguf(checked)
    own = ANTIREZ if flavour_of(checkpoint.metadata) == ANTIREZ else MAINLINE
    files, notes = list(model.files), [checkpoint.note]
    changes: list[Entry] = [(MERGED_KEY, "u32", len(model.files))] if len(model.files) > 1 else []
    if flavour in (None, own):
        if checkpoint.drafter_path is not None:
            notes = [f"{INSIDE[checkpoint.drafter]} stays in {checkpoint.drafter_path.name}"]
        made = [_Made(out, _kept(model), {name: copied(model, info) for name, info in model.tensors.items()})]
    else:
        changes.append((FLAVOUR_KEY, "str", f"{flavour} from {own}"))
        side = checked.pairing.side(model)
        if side is not None:
            files += side.files
            notes.append(f"{INSIDE[checkpoint.drafter]} is taken from {side.path.name}")
        made = (_as_antirez if flavour == ANTIREZ else _as_mainline)(checked, out)
    if requantise is not None:
        changes.append((REQUANTISED_KEY, "str", _requantise(made, REQUANTISED_FORMS[requantise])))
    if flavour == ANTIREZ != own:
        _require_antirez_types(model, made[0])
    outputs = [output(one.path, one.architecture, _with(one.metadata, changes), one.sources) for one in made]
    return Plan(tuple(outputs), digest(outputs, files), checkpoint.files, "; ".join(filter(None, notes)), drafters_of(out))


@dataclasses.dataclass(frozen=True)
class _Made:
    """A file before its header is laid out."""

    path: Path
    metadata: list[Entry]
    sources: dict[str, Source]
    architecture: str = ARCHITECTURE


def _requantise(made: Iterable[_Made], form: str) -> str:
    """Replace the sources of matrices by sources in another type, and say which types they had."""
    count: collections.Counter[str] = collections.Counter()
    for one in made:
        for name, source in one.sources.items():
            if source.form == form or not _can_change(name, source):
                continue
            count[source.form] += 1
            one.sources[name] = requantised(source, form)
    kinds = ", ".join(f"{number} from {kind}" for kind, number in sorted(count.items()))
    return f"{form}: {kinds or 'no tensor'}"


def _can_change(name: str, source: Source) -> bool:
    """Whether --requantise gives a tensor its type."""
    return len(source.shape) > 1 and source.form != "I32" and not _KEPT.search(name)


def _as_mainline(checked: GgufModel, out: Path) -> list[_Made]:
    model, config, by_name = checked.header, checked.config, parameters(checked)
    name = str(model.metadata["general.name"].value) if "general.name" in model.metadata else out.stem
    experts, known = by_name["layers.0.ffn.experts.w1.weight"].form, vocabulary(model)
    metadata = mainline.metadata(config, name, experts, known)
    made = [_Made(out, _merged(model, metadata), joined(mainline.model_names(config), by_name))]
    if config.n_mtp:
        path = out.with_name(MTP_PREFIX + out.name)
        metadata = mainline.metadata(config, name, experts, known, mtp=True)
        made.append(_Made(path, _merged(model, metadata), joined(mainline.mtp_names(config), by_name)))
    if config.n_dspark:
        path = out.with_name(DSPARK_PREFIX + out.name)
        metadata = mainline.metadata(config, name, experts, known, dspark=True)
        made.append(_Made(path, _merged(model, metadata), joined(mainline.dspark_names(config), by_name), DFLASH))
    return made


def _as_antirez(checked: GgufModel, out: Path) -> list[_Made]:
    model, config, by_name = checked.header, checked.config, parameters(checked)
    kept = dataclasses.replace(config, n_dspark=0)
    names = {slot.gguf_name: (slot.name,) for slot in slots(kept)}
    known = vocabulary(model)
    tokens, merges, types = (known.get(field, []) for field in ("tokens", "merges", "token_types"))
    made = [_Made(out, _merged(model, entries(kept, tokens, merges, types)), joined(names, by_name))]
    if config.n_dspark:
        sources = {slot.gguf_name: by_name[slot.name] for slot in slots(config) if slot.name.startswith("dspark.")}
        named = [entry for entry in _kept(model) if entry[0].startswith("general.")]
        path = out.with_name(DSPARK_PREFIX + out.name)
        made.append(_Made(path, [*named, *dspark_metadata(config)], sources, DSPARK_ARCHITECTURE))
    return made


def parameters(checked: GgufModel) -> dict[str, Source]:
    """Every parameter where it is stored."""
    return {one.slot.name: copied(one.header, one.info, one.columns) for one in checked.found}


def _kept(header: Header) -> list[Entry]:
    """The file's own metadata. The writer gives architecture and alignment, and an empty list cannot be written."""
    return [
        (key, value.type, value.value)
        for key, value in header.metadata.items()
        if key not in ("general.architecture", "general.alignment") and not (value.type.endswith("[]") and not len(value.value))
    ]


def _merged(header: Header, made: list[Entry]) -> list[Entry]:
    """The file's own metadata with the model's keys of another flavour in place of its own."""
    kept = [entry for entry in _kept(header) if not entry[0].startswith(PREFIX)]
    known = {key for key, _, _ in kept}
    return [*kept, *(entry for entry in made if entry[0] not in known)]


def _with(metadata: list[Entry], changes: list[Entry]) -> list[Entry]:
    """Metadata with further keys, which replace those of an earlier conversion."""
    new = {key for key, _, _ in changes}
    return [*(entry for entry in metadata if entry[0] not in new), *changes]


def vocabulary(header: Header) -> dict[str, list[Any]]:
    """Tokens, merges and token types of a file, as for `write_gguf`; empty without a tokenizer."""
    found = header.metadata
    if TOKENS_KEY not in found:
        return {}
    tokens = found[TOKENS_KEY].value
    types = found[TYPES_KEY].value.tolist() if TYPES_KEY in found else [NORMAL] * len(tokens)
    return {"tokens": tokens, "merges": found[MERGES_KEY].value, "token_types": types}


def _require_antirez_types(model: Header, made: _Made) -> None:
    """Refuse a type that the ds4 project's reader does not take for a tensor."""
    for slot in slots(read_config(model)):
        source, allowed = made.sources[slot.gguf_name], _ANTIREZ_TYPES.get(slot.kind)
        form = source.form
        where = f"{model.path}: {slot.gguf_name}"
        if allowed is not None and form not in allowed:
            can = _can_change(slot.gguf_name, source)
            advice = "give --requantise f32, which keeps every value" if can else "it has no conversion"
            raise InputError(f"{where}: type {form} is not one of antirez's flavour for it, {', '.join(allowed)}; {advice}")
        up = made.sources[slot.gguf_name.replace("ffn_gate_exps", "ffn_up_exps")].form
        if form != up:
            raise InputError(f"{where}: type {form}, and its up projection {up}; antirez's flavour has one type for both")

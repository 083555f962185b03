"""What a checkpoint directory becomes: the tensors and metadata of a model's GGUF file and of its drafter's."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds4jax.errors import InputError
from ds4jax.loading import mainline
from ds4jax.loading.checkpoint import note
from ds4jax.loading.convert_sources import Source
from ds4jax.loading.convert_write import DSPARK_PREFIX, MTP_PREFIX, Output, Plan, digest, drafters_of, joined, output
from ds4jax.loading.dspark_names import DFLASH
from ds4jax.loading.gguf_config import ARCHITECTURE, dspark_metadata
from ds4jax.loading.gguf_names import slots
from ds4jax.loading.gguf_write import Entry, entries
from ds4jax.loading.hub import CONFIG, TOKENIZER, Hub, read_hub
from ds4jax.loading.mtp_file import DSPARK_ARCHITECTURE

DENSE_KEY = "ds4jax.converted_dense"


def plan_hub(directory: Path, out: Path, *, flavour: str = "mainline", dense: str = "q8_0") -> Plan:
    """Read all headers of a checkpoint directory and lay out the GGUF files.

    Args:
        flavour: "mainline" lays them out as llama.cpp's converter does, the drafter in a file of its own beside `out`; "antirez"
            as the ds4 project does, the MTP block inside and a DSpark drafter beside.
        dense: "q8_0", "bf16" or "f32": the type of FP8 matrices, in antirez's flavour of all dense matrices.

    Raises:
        InputError: the directory is not a checkpoint, or cannot be converted.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: not a directory; give a checkpoint directory with {CONFIG} in it")
    hub = read_hub(directory, dense=dense, mainline=flavour == "mainline")
    vocabulary = _vocabulary(hub)
    if flavour == "antirez":
        outputs = _antirez(hub, out, vocabulary, dense)
    else:
        outputs = _mainline(hub, out, vocabulary, dense)
    read = {part.entry.file for source in hub.sources for part in source.parts}
    return Plan(tuple(outputs), digest(outputs, read), hub.files, note(hub.ignored, hub.no_mtp), drafters_of(out))


def _antirez(hub: Hub, out: Path, vocabulary: Mapping[str, list[Any]], dense: str) -> list[Output]:
    """The model's file with its MTP block, and the file of its DSpark drafter if it has one."""
    by_name: dict[str, Source] = {source.name: source for source in hub.sources}
    kept = dataclasses.replace(hub.config, n_dspark=0)
    sources = {slot.gguf_name: by_name[slot.name] for slot in slots(kept)}
    outputs = [output(out, ARCHITECTURE, entries(kept, **vocabulary, metadata={DENSE_KEY: dense}), sources)]
    if hub.config.n_dspark:
        own = [("general.name", "str", hub.path.resolve().name), (DENSE_KEY, "str", dense), *dspark_metadata(hub.config)]
        sources = {slot.gguf_name: by_name[slot.name] for slot in slots(hub.config) if slot.name.startswith("dspark.")}
        outputs.append(output(out.with_name(DSPARK_PREFIX + out.name), DSPARK_ARCHITECTURE, own, sources))
    return outputs


def _mainline(hub: Hub, out: Path, vocabulary: Mapping[str, list[Any]], dense: str) -> list[Output]:
    """The model's file, and the file of its MTP block or DSpark drafter if it has one."""
    name = hub.path.resolve().name
    own: list[Entry] = [(DENSE_KEY, "str", dense)]
    by_name: dict[str, Source] = {source.name: source for source in hub.sources}
    experts = by_name["layers.0.ffn.experts.w1.weight"].form

    def file(path: Path, architecture: str, names: mainline.Names, **kind: Any) -> Output:
        metadata = [*mainline.metadata(hub.config, name, experts, vocabulary, **kind), *own]
        return output(path, architecture, metadata, joined(names, by_name))

    outputs = [file(out, ARCHITECTURE, mainline.model_names(hub.config))]
    if hub.config.n_mtp:
        path = out.with_name(MTP_PREFIX + out.name)
        outputs.append(file(path, ARCHITECTURE, mainline.mtp_names(hub.config), mtp=True))
    elif hub.config.n_dspark:
        path = out.with_name(DSPARK_PREFIX + out.name)
        outputs.append(file(path, DFLASH, mainline.dspark_names(hub.config), dspark=True))
    return outputs


def _vocabulary(hub: Hub) -> dict[str, list[Any]]:
    if not os.path.lexists(hub.path / TOKENIZER):
        return {}
    from ds4jax.loading.hub_vocabulary import read_vocabulary

    return read_vocabulary(hub.path / TOKENIZER, hub.config)

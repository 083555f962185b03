"""What a GGUF file becomes as a checkpoint directory: MXFP4 experts as FP4, every other value in a type that holds it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ds4jax.errors import InputError
from ds4jax.loading.convert_gguf import parameters, vocabulary
from ds4jax.loading.convert_sources import Copied, Source, requantised
from ds4jax.loading.convert_write import Output, Plan, digest
from ds4jax.loading.dspark_names import hub_name
from ds4jax.loading.gguf_config import QAT_KEY
from ds4jax.loading.gguf_model import check_model
from ds4jax.loading.gguf_read import open_gguf
from ds4jax.loading.gguf_split import open_set
from ds4jax.loading.hub import CONFIG, EXPERTS_IN, INDEX, SINGLE, TOKENIZER
from ds4jax.loading.hub_values import FP4_GROUP, from_mxfp4
from ds4jax.loading.hub_write import config_json, safetensors_header, tokenizer_json
from ds4jax.loading.mtp_file import INSIDE

# Types of a hub checkpoint by those of GGUF; values of all other types become float32.
_SAME = {"F32": "F32", "BF16": "BF16", "I32": "I32"}


@dataclasses.dataclass(frozen=True)
class _Half:
    """The codes or the scales of one expert of an MXFP4 stack: `which` is 0 or 1 of what `from_mxfp4` returns."""

    stack: Copied
    expert: int
    which: int

    @property
    def form(self) -> str:
        """The type in a hub checkpoint."""
        return ("I8", "F8_E8M0")[self.which]

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows, and bytes of a row."""
        _, rows, columns = self.stack.shape
        return rows, columns // (2, FP4_GROUP)[self.which]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return math.prod(self.shape)

    def pieces(self) -> Iterator[np.ndarray]:
        """Rows as a hub checkpoint stores them, a few million values at a time."""
        rows = self.shape[0]
        for raw in self.stack.rows(self.expert * rows, (self.expert + 1) * rows):
            yield from_mxfp4(raw)[self.which]


def plan_to_hub(path: Path, folder: Path, drafter: Path | None = None) -> Plan:
    """Read the headers of a GGUF file, or of all its shards, and lay out the checkpoint directory that it becomes.

    The drafter goes with it, inside the model or in a file beside it. Quantised matrices other than experts become float32,
    which holds their values.

    Args:
        drafter: the drafter's own file, as for `check_model`.

    Raises:
        InputError: the file cannot be read; its experts are not MXFP4; or it says that it was trained without rounding, which a
            checkpoint directory cannot say.
    """
    checked = check_model(open_set(path), drafter)
    model, config, checkpoint = checked.header, checked.config, open_gguf(checked)
    if not config.qat:
        raise InputError(f"{path}: {QAT_KEY}: is false, which a checkpoint directory cannot say")
    tensors: dict[str, tuple[str, Source]] = {}
    for own_name, source in parameters(checked).items():
        name = hub_name(own_name, config.n_dspark)
        if EXPERTS_IN in name:
            tensors |= _experts(name, source)
        else:
            kept = source if source.form in _SAME else requantised(source, "F32")
            tensors[name] = (_SAME[kept.form], kept)
    rows = [(name, dtype, source.shape, source.nbytes) for name, (dtype, source) in tensors.items()]
    sources = {name: source for name, (_, source) in tensors.items()}
    outputs = [Output(folder / SINGLE, safetensors_header(rows), sources, alignment=1)]
    outputs.append(_text(folder / CONFIG, json.dumps(config_json(config), indent=1)))
    known: dict[str, Any] = vocabulary(model)
    if known:
        outputs.append(_text(folder / TOKENIZER, tokenizer_json(**known)))
    side = checkpoint.drafter_path
    notes = [checkpoint.note, f"{INSIDE[checkpoint.drafter]} is taken from {side.name}" if side is not None else ""]
    beside = (folder / INDEX, folder / TOKENIZER)
    return Plan(tuple(outputs), digest(outputs, checkpoint.files), checkpoint.files, "; ".join(filter(None, notes)), beside)


def _experts(name: str, source: Source) -> dict[str, tuple[str, Source]]:
    """Codes and scales of each expert of a stack."""
    assert isinstance(source, Copied)
    if source.form != "MXFP4":
        where = source.header.where(source.info)
        raise InputError(f"{where}: type {source.form}; only MXFP4 experts can become FP4 without loss")
    head, _, tail = name.partition(EXPERTS_IN)
    found: dict[str, tuple[str, Source]] = {}
    for expert in range(source.shape[0]):
        for which, end in enumerate((".weight", ".scale")):
            half = _Half(source, expert, which)
            found[f"{head}{EXPERTS_IN}{expert}.{tail.removesuffix('.weight')}{end}"] = (half.form, half)
    return found


def _text(path: Path, content: str) -> Output:
    """A file of text."""
    return Output(path, content.encode(), {}, alignment=1)

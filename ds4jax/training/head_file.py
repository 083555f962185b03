"""Writes a trained draft head as a GGUF file of its own, laid out as llama.cpp's converter does."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ds4jax.loading import mainline
from ds4jax.loading.convert_gguf import vocabulary
from ds4jax.loading.dspark_names import DFLASH
from ds4jax.loading.gguf_config import ARCHITECTURE
from ds4jax.loading.gguf_names import slots
from ds4jax.loading.gguf_split import open_set
from ds4jax.loading.gguf_write import Entry, StoredTensor, stored_tensors, write_tensors
from ds4jax.model.parameters import values
from ds4jax.training.head_recipe import HeadRecipe
from ds4jax.training.head_run import HeadTraining

NAME_KEY = "general.name"
TYPES: dict[str, Any] = {"quantize": True, "small": "F16", "embedding": "Q8_0"}


@dataclasses.dataclass(frozen=True)
class HeadFile:
    """The file of a head in training.

    Attributes:
        path: where it is written.
        name: "dspark" or "mtp".
        model: the model's file, for its name and vocabulary.
        command, recipe, corpus: how the head is trained, and the SHA-256 of the text.
    """

    path: Path
    name: str
    model: Path
    command: str
    recipe: HeadRecipe
    corpus: str

    def write(self, training: HeadTraining, figures: Mapping[str, float]) -> None:
        """Write the averaged weights, large matrices as Q8_0, and the figures of the validation.

        Raises:
            InputError: the path cannot be written.
        """
        model, header = training.model, open_set(self.model)
        config, known = model.config, values(model)
        names = mainline.dspark_names(config) if self.name == "dspark" else mainline.mtp_names(config)
        parts = {part for parts in names.values() for part in parts}
        wanted = [slot for slot in slots(config) if slot.name in parts]
        made = stored_tensors(wanted, {slot.name: known[slot.name] for slot in wanted}, **TYPES)
        own = dict(zip((slot.name for slot in wanted), made, strict=True))
        tensors = [_joined(name, [own[part] for part in parts]) for name, parts in names.items()]
        called = str(header.metadata[NAME_KEY].value) if NAME_KEY in header.metadata else self.model.stem
        kind = {"mtp": self.name == "mtp", "dspark": self.name == "dspark"}
        metadata = mainline.metadata(config, called, "Q8_0", vocabulary(header), **kind)
        architecture = DFLASH if self.name == "dspark" else ARCHITECTURE
        write_tensors(self.path, architecture, [*metadata, *self._record(int(training.state.step), figures)], tensors)

    def _record(self, steps: int, figures: Mapping[str, float]) -> list[Entry]:
        recipe = json.dumps(dataclasses.asdict(self.recipe) | {"text": Path(self.recipe.text).name})
        return [
            ("ds4jax.trained_with", "str", self.command),
            ("ds4jax.recipe", "str", recipe),
            ("ds4jax.training_steps", "i64", steps),
            ("ds4jax.training_seed", "i64", self.recipe.seed),
            ("ds4jax.corpus_sha256", "str", self.corpus),
            *((f"ds4jax.validation_{name}", "f64", value) for name, value in figures.items()),
        ]


def _joined(name: str, parts: list[StoredTensor]) -> StoredTensor:
    return name, np.concatenate([array for _, array, _ in parts], axis=-1), parts[0][2]

"""Writes trained weights to a GGUF file: the type of each tensor, the size of the file and its metadata."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from ds4jax.config import Config
from ds4jax.loading.gguf_names import SMALL, TABLE, VECTOR, slots
from ds4jax.text.tokenizer import CONTROL, NORMAL
from ds4jax.training.checkpoint import Run
from ds4jax.training.data import Vocabulary
from pallas_kernels.formats import BLOCK, BLOCK_BYTES, Q8_0

NAME = "ds4jax tiny"
LICENSE = "MIT; trained on the King James Version of 1611, which is in the public domain"
ALIGNMENT = 32
# Approximate bytes of the configuration, the licence and the training record.
HEADER = 6000


def stored_types(config: Config) -> dict[str, str]:
    """Type of each tensor in the exported file: Q8_0 for large matrices, F16 for small ones."""
    types = {}
    for slot in slots(config):
        types[slot.name] = {SMALL: "F16", VECTOR: "F32", TABLE: "I32"}.get(slot.kind, "Q8_0")
    return types


def file_size(config: Config, vocabulary: Vocabulary) -> int:
    """Size of the exported file in bytes: exact for the tensors, to about a kilobyte for the header.

    Raises:
        ValueError: Q8_0 cannot hold a matrix.
    """
    types, total = stored_types(config), HEADER
    for slot in slots(config):
        count = int(np.prod(slot.shape))
        if types[slot.name] == "Q8_0" and slot.shape[-1] % BLOCK:
            raise ValueError(f"{slot.name} is {list(slot.shape)}; Q8_0 needs a last dimension that is a multiple of {BLOCK}")
        size = (
            count * 2 if types[slot.name] == "F16" else count // BLOCK * BLOCK_BYTES if types[slot.name] == "Q8_0" else count * 4
        )
        total += -(-size // ALIGNMENT) * ALIGNMENT
        total += len(slot.gguf_name) + 24 + 8 * len(slot.shape)
    for text in (*vocabulary.tokens, *vocabulary.merges):
        total += 8 + len(text.encode())
    return total + 4 * len(vocabulary.tokens)


def as_stored(config: Config, weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The weights as the exported file holds them, converted back to float32."""
    rounded = {}
    for name, kind in stored_types(config).items():
        value = weights[name]
        if kind == "Q8_0":
            value = Q8_0.quantize(np.asarray(value)).dequantize()
        elif kind == "F16":
            value = value.astype(np.float16).astype(np.float32)
        rounded[name] = value
    return rounded


def export_gguf(run: Run, weights: dict[str, np.ndarray], path: Path, extra: dict[str, str | bool | int | float]) -> None:
    """Write a Q8_0 GGUF file with the weights, the tokenizer and the record of the training.

    Args:
        weights: float32 arrays by canonical name.
        extra: further metadata.

    Raises:
        InputError: the path cannot be written.
    """
    # Imported here: the training machine may lack the package that writes GGUF files.
    from ds4jax.loading.gguf_write import write_gguf

    specials = set(run.vocabulary.specials)
    write_gguf(
        path,
        run.recipe.model_config(),
        weights,
        tokens=run.vocabulary.tokens,
        merges=run.vocabulary.merges,
        token_types=[CONTROL if token in specials else NORMAL for token in run.vocabulary.tokens],
        metadata=record(run) | extra,
        quantize=True,
        small="F16",
        embedding="Q8_0",
    )


def record(run: Run) -> dict[str, str | bool | int | float]:
    """The file's metadata about its training: name, licence, command, recipe, steps, seed, corpus and figures."""
    metadata: dict[str, str | bool | int | float] = {
        "general.name": NAME,
        "general.license": LICENSE,
        "ds4jax.trained_with": run.command,
        "ds4jax.recipe": json.dumps(dataclasses.asdict(run.recipe) | {"text": Path(run.recipe.text).name}),
        "ds4jax.training_steps": run.step,
        "ds4jax.training_seed": run.recipe.seed,
        "ds4jax.corpus_sha256": run.corpus,
        "ds4jax.tokenizer_vocabulary": len(run.vocabulary.tokens),
    }
    return metadata | {f"ds4jax.{name}": value for name, value in run.figures.items()}

"""Who wrote a GGUF file of a V4 model: the ds4 project, llama.cpp's converter, or unsloth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ds4jax.text.tokenizer import KIND, VOCAB_SIZE_KEY

ANTIREZ, MAINLINE, UNSLOTH = "antirez", "mainline", "unsloth UD"
# What llama.cpp calls a file without a tokenizer. Only such a file of its flavour tells the size of the vocabulary.
NO_TOKENIZER = "none"
_ORIGINS = ("general.quantized_by", "general.repo_url", "quantize.imatrix.file")


def flavour_of(metadata: Mapping[str, Any]) -> str:
    """The flavour of a model's file by its metadata: unsloth's files are mainline's with types chosen by layer."""
    if VOCAB_SIZE_KEY in metadata and metadata.get(KIND[0]) != NO_TOKENIZER:
        return ANTIREZ
    said = " ".join(str(metadata[key]) for key in _ORIGINS if key in metadata)
    return UNSLOTH if "unsloth" in said.lower() else MAINLINE

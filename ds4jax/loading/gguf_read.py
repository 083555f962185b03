"""Opening a GGUF file of architecture `deepseek4`."""

from __future__ import annotations

import functools
from pathlib import Path

from ds4jax.loading.checkpoint import Checkpoint, Tensor
from ds4jax.loading.gguf_config import plain_metadata, read_config
from ds4jax.loading.gguf_header import read_header
from ds4jax.loading.gguf_names import match
from ds4jax.loading.gguf_values import read_value, require_readable
from ds4jax.tokenizer import TOKENS_KEY, Tokenizer


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file: read its header and check every name, type and shape, but read no tensor.

    Raises:
        InputError: a damaged file, another architecture, or metadata and tensors that do not make a model; the message names
            the file and the key or tensor.
    """
    header = read_header(path)
    config = read_config(header)
    found, ignored = match(header, config)
    metadata = plain_metadata(header)
    tokenizer = Tokenizer.from_gguf(metadata, path) if TOKENS_KEY in metadata else None
    tensors = []
    for slot, info in sorted(found, key=lambda pair: pair[1].offset):
        require_readable(header, info)
        read = functools.partial(read_value, header, info, config.n_experts)
        tensors.append(Tensor(slot.name, slot.shape, info.type, info.nbytes, read))
    return Checkpoint(path, "gguf", config, tuple(tensors), tokenizer, metadata, ignored)

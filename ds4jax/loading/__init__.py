"""Model files to a configuration, a tokenizer and named tensors, read one at a time."""

from __future__ import annotations

import os
from pathlib import Path

from ds4jax.loading.checkpoint import Checkpoint, Tensor
from ds4jax.loading.gguf_read import open_gguf

__all__ = ["Checkpoint", "Tensor", "open_checkpoint"]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a GGUF file or a checkpoint directory in the hub's form; only headers are read.

    Raises:
        InputError: nothing there, or files that cannot be used; one line that names the file and what is wrong.
    """
    path = Path(path)
    if os.path.isdir(path):
        # Looking into a GGUF file needs neither safetensors nor the modules of the model.
        from ds4jax.loading.hub import open_hub

        return open_hub(path)
    return open_gguf(path)

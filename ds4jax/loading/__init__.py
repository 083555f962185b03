"""Model files to a configuration, a tokenizer and named tensors, read one at a time."""

from __future__ import annotations

import os
from pathlib import Path

from ds4jax.errors import InputError
from ds4jax.loading.checkpoint import Checkpoint, Tensor
from ds4jax.loading.gguf_read import open_gguf

__all__ = ["Checkpoint", "Tensor", "open_checkpoint"]


def open_checkpoint(path: str | Path, mtp_file: str | Path | None = None, *, dense: str | None = None) -> Checkpoint:
    """Open a GGUF file or a checkpoint directory in the hub's form; only headers are read.

    Args:
        mtp_file: the GGUF file with the MTP block of a GGUF model. None looks for one beside a model that has none: with "mtp"
            as a word in its name, and a support file by its architecture.
        dense: what dense matrices of a checkpoint directory become, as for `open_hub`; a GGUF file is taken as it is.

    Raises:
        InputError: nothing there, or files that cannot be used; one line that names the file and what is wrong.
    """
    path, mtp_path = Path(path), Path(mtp_file) if mtp_file is not None else None
    if os.path.isdir(path):
        # Looking into a GGUF file needs neither safetensors nor the modules of the model.
        from ds4jax.loading.hub import open_hub

        if mtp_path is not None:
            raise InputError(f"{mtp_path}: mtp file: it goes with a GGUF model; {path} is a checkpoint directory")
        return open_hub(path, dense=dense)
    return open_gguf(path, mtp_path)

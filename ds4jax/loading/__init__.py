"""Model files to a configuration, a tokenizer and named tensors, read one at a time."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ds4jax.bounds import AND_NGRAM, DRAFTERS, SHIPPED, SHIPPED_DSPARK
from ds4jax.errors import InputError
from ds4jax.loading.gguf_model import check_model
from ds4jax.loading.gguf_split import open_set

if TYPE_CHECKING:
    from ds4jax.loading.checkpoint import Checkpoint

__all__ = ["open_checkpoint"]


def open_checkpoint(
    path: str | Path, drafter_file: str | Path | None = None, *, dense: str | None = None, drafter: str = "auto"
) -> Checkpoint:
    """Open a GGUF file, any shard of a split one, or a checkpoint directory in the hub's form; only headers are read.

    Args:
        drafter_file: the GGUF file with the MTP block or the DSpark drafter of a GGUF model. None takes the one inside the model,
            or else searches the model's folder for such a file with "mtp", "dspark" or "dflash" as a word in its name. The tiny
            model's DSpark drafter is found, too, if `drafter` asks for it.
        dense: type of the dense matrices of a checkpoint directory, as for `open_hub`; refused for a GGUF file.
        drafter: which drafter's weights are read, as for `ds4jax.load`.

    Raises:
        InputError: no such file, or a file that cannot be used; one line names the file and the reason.
    """
    if drafter in DRAFTERS and drafter.endswith(AND_NGRAM):
        first = open_checkpoint(path, drafter_file, dense=dense, drafter=drafter.removesuffix(AND_NGRAM))
        return dataclasses.replace(first, second=AND_NGRAM)
    path, side = Path(path), Path(drafter_file) if drafter_file is not None else None
    if side is None and drafter == "dspark" and path == SHIPPED:
        side = SHIPPED_DSPARK
    if os.path.isdir(path):
        # Imported on demand: reading a GGUF header needs neither safetensors nor the model's modules.
        from ds4jax.loading.hub import open_hub

        if side is not None:
            raise InputError(f"{side}: drafter file: it goes with a GGUF model; {path} is a checkpoint directory")
        return open_hub(path, dense=dense, drafter=drafter)
    header = open_set(path)
    if dense is not None:
        raise InputError(f"{path}: dense: it is for a checkpoint directory; the matrices of a GGUF file keep their types")
    model = check_model(header, side, drafter)
    # Imports JAX, which a file that is refused need not wait for.
    from ds4jax.loading.gguf_read import open_gguf

    return open_gguf(model)

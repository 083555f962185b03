"""Check every stored value of a model on the host, without an accelerator."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax

from ds4jax.loading.checkpoint import Checkpoint
from ds4jax.loading.gguf_model import check_model
from ds4jax.loading.gguf_split import open_set
from ds4jax.loading.gguf_values import check_value, stored_nbytes


def check_values(checkpoint: Checkpoint, progress: Callable[[int, int], None] | None = None) -> None:
    """Check every tensor on the host: numbers and scales are finite, and the model has the experts of all expert ids.

    A GGUF file is checked in its memory map, a part of a tensor at a time. A hub checkpoint is read into host memory as a model
    would be, one tensor at a time.

    Args:
        progress: called after each tensor with the bytes checked so far and the bytes of all tensors.

    Raises:
        InputError: the first value that no model can have, with file and tensor.
    """
    done, total = 0, sum(tensor.nbytes for tensor in checkpoint.tensors)
    for nbytes in _gguf(checkpoint) if checkpoint.kind == "gguf" else _hub(checkpoint):
        done += nbytes
        if progress is not None:
            progress(done, total)


def _gguf(checkpoint: Checkpoint) -> Iterator[int]:
    """Check each tensor in the order of the files and yield its bytes."""
    model = check_model(open_set(checkpoint.path), checkpoint.drafter_path, checkpoint.drafter)
    for one in model.in_order():
        check_value(one.header, one.info, model.config.n_experts)
        yield stored_nbytes(one.info, one.columns)


def _hub(checkpoint: Checkpoint) -> Iterator[int]:
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        for tensor in checkpoint.tensors:
            tensor.read()
            yield tensor.nbytes

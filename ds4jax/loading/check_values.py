"""Looking at every stored value of a model without an accelerator."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax

from ds4jax.loading.checkpoint import Checkpoint
from ds4jax.loading.gguf_header import read_header
from ds4jax.loading.gguf_names import match
from ds4jax.loading.gguf_values import check_value


def check_values(checkpoint: Checkpoint, progress: Callable[[int, int], None] | None = None) -> None:
    """Look at every tensor on the host: finite numbers and scales, expert ids that the model has.

    A GGUF file is looked at where it is mapped, a part of a tensor at a time. A checkpoint in the hub's form is read as a model
    would be, tensor by tensor, into the host's memory.

    Args:
        progress: called after each tensor with the bytes that have been looked at and those of all tensors.

    Raises:
        InputError: the first value that no model can have, with file and tensor.
    """
    done, total = 0, sum(tensor.nbytes for tensor in checkpoint.tensors)
    for nbytes in _gguf(checkpoint) if checkpoint.kind == "gguf" else _hub(checkpoint):
        done += nbytes
        if progress is not None:
            progress(done, total)


def _gguf(checkpoint: Checkpoint) -> Iterator[int]:
    """Bytes of each tensor after it has been looked at, in the order of the files."""
    config = checkpoint.config
    mtp = read_header(checkpoint.mtp_path) if checkpoint.mtp_path is not None else None
    found, _ = match(read_header(checkpoint.path), config, mtp)
    for one in sorted(found, key=lambda one: (one.header is mtp, one.info.offset)):
        check_value(one.header, one.info, config.n_experts)
        yield one.info.nbytes


def _hub(checkpoint: Checkpoint) -> Iterator[int]:
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        for tensor in checkpoint.tensors:
            tensor.read()
            yield tensor.nbytes

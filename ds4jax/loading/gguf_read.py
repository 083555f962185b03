"""Opening a GGUF file of architecture `deepseek4`, with the file of its MTP block where it has one."""

from __future__ import annotations

import functools
from pathlib import Path

from ds4jax.errors import InputError
from ds4jax.loading import mtp_file
from ds4jax.loading.checkpoint import Checkpoint, Tensor
from ds4jax.loading.gguf_config import plain_metadata, read_config
from ds4jax.loading.gguf_header import Header, read_header
from ds4jax.loading.gguf_names import match
from ds4jax.loading.gguf_values import device_nbytes, reading
from ds4jax.tokenizer import TOKENS_KEY, Tokenizer


def open_gguf(path: Path, mtp_path: Path | None = None) -> Checkpoint:
    """Open a GGUF file: read its header and check every name, type and shape, but read no tensor.

    Args:
        mtp_path: the file of the MTP block; None looks beside the model.

    Raises:
        InputError: a damaged file, another architecture, or metadata and tensors that do not make a model; the message names
            the file and the key or tensor.
    """
    header = read_header(path)
    mtp, no_mtp = _mtp(header, mtp_path)
    config = read_config(header, mtp_file=mtp is not None)
    found, ignored = match(header, config, mtp)
    metadata = plain_metadata(header)
    tokenizer = Tokenizer.from_gguf(metadata, path) if TOKENS_KEY in metadata else None
    tensors = []
    for one in sorted(found, key=lambda one: (one.header is mtp, one.info.offset)):
        start = functools.partial(reading, one.header, one.info, config.n_experts)
        info = one.info
        tensors.append(Tensor(one.slot.name, info.shape, info.type, info.type, info.nbytes, device_nbytes(info), start))
    return Checkpoint(
        path=path,
        kind="gguf",
        config=config,
        tensors=tuple(tensors),
        tokenizer=tokenizer,
        metadata=metadata,
        ignored=ignored,
        mtp_path=mtp.path if mtp is not None else None,
        no_mtp=no_mtp,
    )


def _mtp(model: Header, path: Path | None) -> tuple[Header | None, str]:
    """The file that holds the model's MTP block, where it is another, and why there is none."""
    kind = mtp_file.drafter(model.tensors)
    if path is not None:
        if kind == "mtp":
            raise InputError(f"{path}: mtp file: not needed, since {model.path} holds an MTP block of its own")
        return mtp_file.open_support(path), ""
    if kind == "mtp":
        return None, ""
    if kind == "dspark":
        return None, mtp_file.DSPARK
    beside = mtp_file.open_beside(model.path)
    return beside, "" if beside is not None else mtp_file.NONE

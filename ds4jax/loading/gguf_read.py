"""Make tensors of a GGUF model's parameters that can be read."""

from __future__ import annotations

import functools
from typing import cast

import jax

from ds4jax.loading.checkpoint import Checkpoint, Tensor
from ds4jax.loading.gguf_config import plain_metadata
from ds4jax.loading.gguf_match import Found
from ds4jax.loading.gguf_model import GgufModel
from ds4jax.loading.gguf_values import device_nbytes, reading, stored_nbytes
from ds4jax.loading.tensor_reader import Reading


def open_gguf(model: GgufModel) -> Checkpoint:
    """A checked model as tensors that can be read; no tensor is read."""
    header, side = model.header, model.pairing.side(model.header)
    return Checkpoint(
        path=header.path,
        kind="gguf",
        config=model.config,
        tensors=tuple(_tensor(one, model.config.n_experts) for one in model.in_order()),
        tokenizer=model.tokenizer,
        metadata=plain_metadata(header),
        ignored=model.ignored,
        drafter=model.pairing.kind,
        drafter_path=side.path if side is not None else None,
        no_mtp=model.pairing.no_mtp,
        warning=model.pairing.warning,
        files=header.files if side is None else (*header.files, *side.files),
    )


def _tensor(one: Found, n_experts: int) -> Tensor:
    info, form, columns = one.info, one.form, one.columns
    return Tensor(
        name=one.slot.name,
        shape=one.slot.shape,
        stored=info.type,
        form=form,
        nbytes=stored_nbytes(info, columns),
        device_nbytes=device_nbytes(info, form, columns),
        start=functools.partial(_start, one, n_experts),
    )


def _start(one: Found, n_experts: int, rows: slice | None) -> Reading:
    columns = one.columns
    if columns is None or one.has_whole_blocks:
        return reading(one.header, one.info, n_experts, one.form, columns, rows)
    whole = reading(one.header, one.info, n_experts, "F32", rows=rows)
    return Reading(whole.pieces, lambda pieces: cast(jax.Array, whole.join(pieces))[:, columns])

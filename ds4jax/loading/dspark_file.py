"""Read what a DSpark drafter in a GGUF file says of itself."""

from __future__ import annotations

from typing import Any

import numpy as np

from ds4jax.errors import InputError
from ds4jax.loading.dspark_names import DFLASH, Dspark, Numbers, dflash_name, stages_in
from ds4jax.loading.gguf_header import Header, shown
from ds4jax.loading.limits import MAX_STAGES

# llama.cpp's keys first, then ds4's and those that its readers accept, too. llama.cpp counts layers by their input, from 1.
_FROM_ONE = ("dflash.target_layers", "dflash.dspark.target_layers")
_OWN = ("deepseek4.dspark.", "deepseek4.dspark_", "dspark.", "dflash.dspark.")
_BLOCK = ("dflash.block_size", *(f"{own}block_size" for own in _OWN))
_LAYERS = (*_FROM_ONE, *(f"{own}target_layer_ids" for own in _OWN))
_NOISE = ("tokenizer.ggml.mask_token_id", *(f"{own}{name}" for own in _OWN for name in ("noise_token_id", "mask_token_id")))
_RANK = tuple(f"{own}markov_rank" for own in _OWN)
_STAGES = ("dflash.block_count", *(f"{own}stage_count" for own in _OWN))
_W1 = "mtp.0.markov_head.markov_w1.weight"


def read_dspark(header: Header) -> Dspark:
    """The drafter among a file's tensors; their names, shapes and types are not checked.

    Raises:
        InputError: a key or the Markov table is missing, or a key says what no drafter has.

    Source: llama.cpp's `dflash` loader, and the binding code of the ds4 project.
    """
    dflash = _is_dflash(header)
    stages = stages_in(name for name in header.tensors if dflash or name.startswith("mtp."))
    said = _number(header, _STAGES, needed=False)
    if said not in (None, stages):
        raise InputError(f"{header.path}: {_key(header, _STAGES)}: is {said}, and its tensors make {stages} stages")
    if not 0 < stages <= MAX_STAGES:
        raise InputError(f"{header.path}: its tensors make {stages} stages; 1 to {MAX_STAGES} are supported")
    return Dspark(
        header,
        Numbers(
            stages=stages,
            block=_number(header, _BLOCK),
            layers=_layers(header),
            noise_id=_number(header, _NOISE),
            rank=_rank(header, stages, dflash),
        ),
        dflash,
    )


def _is_dflash(header: Header) -> bool:
    """Whether the tensors have the names of llama.cpp's files."""
    value = header.metadata.get("general.architecture")
    return value is not None and value.value == DFLASH and not any(name.startswith("mtp.") for name in header.tensors)


def _rank(header: Header, stages: int, dflash: bool) -> int:
    """Width of the Markov tables: llama.cpp's files have no key for it."""
    said = _number(header, _RANK, needed=False)
    name = _W1.replace("mtp.0.", f"mtp.{stages - 1}.", 1)
    name = dflash_name(name) if dflash else name
    table = header.tensors.get(name)
    if table is None:
        raise InputError(f"{header.path}: {name}: this tensor is missing; a DSpark drafter needs it")
    return int(said if said is not None else table.shape[-1])


def _layers(header: Header) -> tuple[int, ...]:
    key = _key(header, _LAYERS)
    value = header.metadata[key]
    if value.type not in ("i32[]", "u32[]") or not len(value.value):
        raise InputError(f"{header.path}: {key}: stored as {value.type}; it must be a list of integers")
    return tuple(int(layer) - (key in _FROM_ONE) for layer in value.value)


def _number(header: Header, keys: tuple[str, ...], *, needed: bool = True) -> Any:
    key = _key(header, keys, needed=needed)
    if not key:
        return None
    value = header.metadata[key]
    if value.type not in ("u32", "i32", "u64") or isinstance(value.value, list | np.ndarray):
        raise InputError(f"{header.path}: {key}: stored as {shown(value.type)}; it must be u32")
    return int(value.value)


def _key(header: Header, keys: tuple[str, ...], *, needed: bool = True) -> str:
    """The first of the keys that the file has."""
    found = next((key for key in keys if key in header.metadata), "")
    if needed and not found:
        usual = keys[0] if _is_dflash(header) else next(key for key in keys if key.startswith(_OWN[0]))
        raise InputError(f"{header.path}: {usual}: this metadata key is missing; a DSpark drafter needs it")
    return found

"""Whether two files say that they were made from the same weights, and whether the tensors that both hold agree."""

from __future__ import annotations

import re

import numpy as np

from ds4jax.loading.dspark_names import Dspark
from ds4jax.loading.gguf_header import Header, TensorInfo, shown
from ds4jax.loading.mtp_names import MtpBlock

# Keys that two files made from one checkpoint share, when both have them.
_ORIGIN = re.compile(
    r"general\.(basename|version|source\..+|base_model\.\d+\.(name|version|organization))|.+\.checkpoint_variant"
)
# Keys of a name that a release may be part of.
_NAMES = re.compile(r"general\.(name|basename|version|finetune|source\..+|base_model\.\d+\.(name|version))")
# A release's month and day, as in V4-Flash-0731, or the word for one without a date.
_RELEASE = re.compile(r"(?<![0-9a-z])((?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])|vision|pro)(?![0-9a-z])", re.IGNORECASE)
_TOKENS = "tokenizer.ggml.tokens"
_WORD = re.compile(r"[a-z0-9]+")
# Words that say which part of the weights a file holds, and nothing of their origin.
_OF_DRAFTERS = {"mtp", "dspark", "dflash", "drafter", "support"}
# The model's tensors that llama.cpp's converter copies into the file of an MTP block.
_COPIES = ("token_embd.weight", "output.weight", "output_norm.weight")
# Types that one tensor is stored in alike by every program. Of the others, the programs search for the best scales, each its way.
_EXACT = ("F32", "F16", "BF16")
_Q8_0_BYTES = 34
# How many bytes at each end of a tensor are compared: whole blocks of each of these types.
_PIECE = 2048 * _Q8_0_BYTES


def other_lineage(model: Header, drafter: Header) -> str:
    """A phrase that says in what the files' origins differ; empty where nothing that both say differs.

    Compares the keys about the origin that both files have, their names' words, their vocabularies, and releases such as 0731: a
    name without one means the first release.
    """
    for key in sorted(model.metadata.keys() & drafter.metadata.keys()):
        ours, theirs = _text(model, key), _text(drafter, key)
        if _ORIGIN.fullmatch(key) and ours and theirs and _words(ours) != _words(theirs):
            return f"{key}: is {shown(theirs)!r}, and {shown(ours)!r} in {model.path.name}"
    ours, theirs = _text(model, "general.name"), _text(drafter, "general.name")
    if ours and theirs and not set(_words(ours)) & set(_words(theirs)):
        return f"general.name: is {shown(theirs)!r}, and {shown(ours)!r} in {model.path.name}"
    differ = _first_other_token(model, drafter)
    if differ:
        return differ
    mine, its = _releases(model), _releases(drafter)
    if mine is not None and its is not None and mine != its:
        said = [" ".join(sorted(one)) or "the first release" for one in (its, mine)]
        return f"general.name: its weights are of {said[0]}, and of {said[1]} in {model.path.name}"
    return ""


def _first_other_token(model: Header, drafter: Header) -> str:
    """A phrase about the first token in which two vocabularies differ; empty where they do not, or a file has none."""
    ours, theirs = (one.metadata.get(_TOKENS) for one in (model, drafter))
    if ours is None or theirs is None or not ours.type == theirs.type == "str[]":
        return ""
    for index, (mine, its) in enumerate(zip(ours.value, theirs.value, strict=False)):
        if mine != its:
            return f"{_TOKENS}: token {index} is {shown(its)!r}, and {shown(mine)!r} in {model.path.name}"
    return ""


def _text(header: Header, key: str) -> str:
    value = header.metadata.get(key)
    return str(value.value) if value is not None and value.type in ("str", "u32", "i32") else ""


def _words(text: str) -> list[str]:
    return [word for word in _WORD.findall(text.casefold()) if word not in _OF_DRAFTERS]


def _releases(header: Header) -> set[str] | None:
    """Releases that the file's name and its metadata tell; None where there is no name but the file's, and no release in it."""
    names = [_text(header, key) for key in header.metadata if _NAMES.fullmatch(key)]
    found = {one.casefold() for text in (*names, header.path.stem) for one in _RELEASE.findall(text.replace("_", "-"))}
    return found if found or any(names) else None


def other_copies(model: Header, drafter: MtpBlock | Dspark) -> str:
    """A phrase that names a tensor of the model whose copy in a drafter's file has other values; empty where there is none.

    Compares the first and the last 68 KiB of embedding, head and norm, where both files store them in one type.
    """
    for name in _COPIES:
        ours, theirs = model.tensors.get(name), drafter.header.tensors.get(name)
        # Without a norm of its own a block takes the file's, which may then be its own under this name. So does DSpark.
        own = drafter.place("norm.weight")[0] if isinstance(drafter, MtpBlock) else "output_norm.weight"
        if ours is None or theirs is None or name == own:
            continue
        if (ours.type, ours.shape) == (theirs.type, theirs.shape) and _differ(model, ours, drafter.header, theirs):
            return f"{name}: its values are not those of {model.path.name}"
    return ""


def _differ(model: Header, ours: TensorInfo, other: Header, theirs: TensorInfo) -> bool:
    """Whether one of the two pieces holds other values."""
    for first in {0, max(ours.nbytes - _PIECE, 0)}:
        last = min(first + _PIECE, ours.nbytes)
        mine, its = model.raw(ours, first, last), other.raw(theirs, first, last)
        if ours.type in _EXACT and not np.array_equal(mine, its):
            return True
        if ours.type == "Q8_0" and _other_q8_0(mine, its):
            return True
    return False


def _other_q8_0(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether blocks differ by more than the rounding of two programs: one step of a scale or of an integer."""
    pair = [piece.reshape(-1, _Q8_0_BYTES) for piece in (one, other)]
    for part, kind in ((slice(2), "<u2"), (slice(2, None), "i1")):
        mine, its = (np.ascontiguousarray(blocks[:, part]).view(kind).astype(np.int32) for blocks in pair)
        if np.abs(mine - its).max() > 1:
            return True
    return False

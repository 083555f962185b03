"""Find a model's drafter: what its own tensors make, and files beside it that hold one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ds4jax.errors import InputError
from ds4jax.loading.dspark_names import DFLASH
from ds4jax.loading.gguf_header import Header, shown
from ds4jax.loading.gguf_split import open_set
from ds4jax.loading.mtp_names import MARK, MtpBlock, block_in, drafter, has_further_blocks

# The architecture of models, and of llama.cpp's files of an MTP block; and that of ds4's files of one.
MODEL_ARCHITECTURE = "deepseek4"
ARCHITECTURE = "deepseek4_mtp_support"
# The architectures of llama.cpp's and ds4's DSpark drafters.
DSPARK_ARCHITECTURE = "deepseek4-dspark"
DSPARK_ARCHITECTURES = (DFLASH, DSPARK_ARCHITECTURE)
# Names of the block's own tensors in all file formats.
_LIKE_MTP = re.compile(r"(^|\.)(e_proj|h_proj|eh_proj|enorm|hnorm|nextn)\.")
_NAMED_DRAFTER = re.compile(r"(^|[^a-z])(mtp|dspark|dflash)([^a-z]|$)", re.IGNORECASE)
# Shards of a split file but the first, which stands for all.
_LATER_SHARD = re.compile(r"-(?!00001-)\d{5}-of-\d{5}$")
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")

DSPARK = "its mtp.* tensors are a DSpark drafter, which is not an MTP block"
WHAT = {"mtp": "an MTP block", "dspark": "a DSpark drafter"}
INSIDE = {"mtp": "the MTP block", "dspark": "the DSpark drafter"}
# Part of the reason about a file with a fault of its own.
BROKEN = "cannot be used"
NONE_INSIDE = "these weights have no MTP block"
NONE = f"{NONE_INSIDE}, and no MTP file lies beside them"


def no_block(names: Iterable[str], none: str) -> str:
    """Why these tensors hold no MTP block; empty where they hold one, `none` where nothing looks like a drafter."""
    found = list(names)
    kind = drafter(found)
    if kind:
        return DSPARK if kind == "dspark" else ""
    if has_further_blocks(found):
        return "its mtp.* tensors are several blocks, and neither an MTP block nor a DSpark drafter"
    if any(name.startswith("mtp.0.") for name in found):
        return f"its MTP block is incomplete: {MARK} is missing"
    like = next(filter(_LIKE_MTP.search, found), None)
    return f"{NONE_INSIDE} under mtp.0, though {shown(like)} looks like a part of one" if like else none


def is_dspark(header: Header) -> bool:
    """Whether a file of its own holds a DSpark drafter."""
    by_tensors = drafter(header.tensors) == "dspark" or has_further_blocks(header.tensors)
    return architecture(header) in DSPARK_ARCHITECTURES or by_tensors


def beside(model: Path) -> Iterator[Path]:
    """GGUF files in the folder of a model's file with "mtp", "dspark" or "dflash" as a word in their names, in order.

    A split file is given by its first shard.
    """
    own = _SHARD.sub("", model.stem)
    for path in sorted(model.parent.glob("*.gguf")):
        if _SHARD.sub("", path.stem) != own and is_named_drafter(path) and not _LATER_SHARD.search(path.stem):
            yield path


def is_named_drafter(path: Path) -> bool:
    """Whether a file's name has "mtp", "dspark" or "dflash" as a word."""
    return bool(_NAMED_DRAFTER.search(path.stem))


def is_named_after(path: Path, model: Path) -> bool:
    """Whether a file has the name that llama.cpp's converter gives to the MTP block or the DSpark drafter of a model."""
    return _SHARD.sub("", path.stem) in {f"{kind}-{_SHARD.sub('', model.stem)}" for kind in ("mtp", "dspark")}


def side_block(header: Header) -> MtpBlock | None:
    """The MTP block in a file of its own; None where the file is something else."""
    block = block_in(header)
    if block is None:
        return None
    return block if architecture(header) == ARCHITECTURE or (block.layer is not None and block.is_alone) else None


def open_alone(path: Path) -> Header:
    """The header of a drafter's file that the user names.

    Raises:
        InputError: the file cannot be read, or holds a model.
    """
    header = open_set(path)
    if _is_model(header):
        what = f"a shard of a model, {len(header.shards)} files in all" if len(header.shards) > 1 else "a whole model"
        raise InputError(f"{path}: drafter file: it is {what}; give a file that holds a drafter alone")
    return header


def support(header: Header) -> MtpBlock:
    """The MTP block in a file that the user names.

    Raises:
        InputError: the file is something else.
    """
    path, block = header.path, side_block(header)
    if block is None and architecture(header) != ARCHITECTURE:
        found, block_names = shown(architecture(header)), f"{MODEL_ARCHITECTURE!r} with tensors blk.N.nextn.*"
        raise InputError(
            f"{path}: general.architecture: {found!r} is not an MTP file's; it must be {ARCHITECTURE!r}, or {block_names}"
        )
    if block is None:
        raise InputError(f"{path}: {MARK}: this tensor is missing; an MTP file needs it")
    return block


def _is_model(header: Header) -> bool:
    """Whether a file holds layers of a model, with or without a drafter."""
    return architecture(header) == MODEL_ARCHITECTURE and any(name.startswith("blk.0.") for name in header.tensors)


def architecture(header: Header) -> str:
    """The architecture that the file names; empty where it names none."""
    value = header.metadata.get("general.architecture")
    return value.value if value is not None and value.type == "str" else ""

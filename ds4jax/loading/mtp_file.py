"""Where a model's multi-token-prediction block is: in its own file, in a support file beside it, or nowhere."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ds4jax.errors import InputError
from ds4jax.loading.gguf_header import Header, read_header, shown

ARCHITECTURE = "deepseek4_mtp_support"
MARK = "mtp.0.e_proj.weight"
# DSpark chains several blocks and ends in heads of its own; the MTP block is mtp.0 alone.
_DSPARK = re.compile(r"mtp\.([1-9]\d*\.|.*(markov|confidence|dspark))")
_NAMED_MTP = re.compile(r"(^|[^a-z])mtp([^a-z]|$)", re.IGNORECASE)

DSPARK = (
    "its mtp.* tensors are a DSpark drafter, which is not an MTP block and cannot be used as one; "
    "drafts need weights that were published with MTP"
)
NONE = "these weights have no MTP block, and no MTP file lies beside them"


def drafter(names: Iterable[str]) -> str:
    """What the tensors under `mtp.` are: "dspark", "mtp", or "" where there are none of either."""
    found = [name for name in names if name.startswith("mtp.")]
    if any(_DSPARK.match(name) for name in found):
        return "dspark"
    return "mtp" if MARK in found else ""


def open_beside(model: Path) -> Header | None:
    """The header of the MTP support file in the folder of a model's file, or None.

    It is the GGUF file with "mtp" as a word in its name and the architecture of a support file.

    Raises:
        InputError: there are several, or one that cannot be read.
    """
    found = []
    for path in sorted(model.parent.glob("*.gguf")):
        if path.name == model.name or not _NAMED_MTP.search(path.stem):
            continue
        header = read_header(path)
        if architecture(header) == ARCHITECTURE and drafter(header.tensors) == "mtp":
            found.append(header)
    if len(found) > 1:
        names = " and ".join(header.path.name for header in found[:2])
        raise InputError(f"{model}: mtp file: {names} both lie beside it; say which one to use")
    return found[0] if found else None


def open_support(path: Path) -> Header:
    """The header of a support file that the user names.

    Raises:
        InputError: it cannot be read, holds a DSpark drafter, or is something else.
    """
    header = read_header(path)
    kind = drafter(header.tensors)
    if kind == "dspark":
        raise InputError(f"{path}: mtp file: {DSPARK}")
    if architecture(header) != ARCHITECTURE:
        found = shown(architecture(header))
        raise InputError(f"{path}: general.architecture: {found!r} is not an MTP file's; it must be {ARCHITECTURE!r}")
    if not kind:
        raise InputError(f"{path}: {MARK}: this tensor is missing; an MTP file needs it")
    return header


def architecture(header: Header) -> str:
    """What the file says it is; empty where it says nothing."""
    value = header.metadata.get("general.architecture")
    return value.value if value is not None and value.type == "str" else ""

"""The names that files give to the tensors of an MTP block: `mtp.0.*` in ds4's files, `blk.N.*` in llama.cpp's."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from ds4jax.errors import InputError
from ds4jax.loading.gguf_header import Header, shown

MARK = "mtp.0.e_proj.weight"
_NEXTN = re.compile(r"blk\.(0|[1-9]\d{0,5})\.nextn\.")
# DSpark has several blocks, an input projection and its own heads. The MTP block is mtp.0 alone.
_DSPARK = re.compile(r"mtp\..*(markov|confidence|dspark|main_proj|main_norm)")
_FURTHER = re.compile(r"mtp\.[1-9]\d*\.")
# Halves of the joined projection's inputs: embedding first, streams second.
_HALVES = {"e_proj.weight": 0, "h_proj.weight": 1}
_HEAD = ("hc_head_fn.weight", "hc_head_base.weight", "hc_head_scale.weight")


def nextn_layers(names: Iterable[str]) -> list[int]:
    """The N of all `blk.N.nextn.*` tensors, in order."""
    return sorted({int(found[1]) for found in map(_NEXTN.match, names) if found})


def drafter(names: Iterable[str]) -> str:
    """The kind of drafter that a model's own tensors make: "dspark", "mtp", or "" for none.

    Tensors decide, never `nextn_predict_layers`: ds4's main files say 1 and hold no block.
    """
    names = list(names)
    if nextn_layers(names):
        return "mtp"
    found = [name for name in names if name.startswith("mtp.")]
    if any(_DSPARK.match(name) for name in found):
        return "dspark"
    return "mtp" if MARK in found and not has_further_blocks(found) else ""


def has_further_blocks(names: Iterable[str]) -> bool:
    """Whether there is a block `mtp.1` or a later one."""
    return any(map(_FURTHER.match, names))


def is_of_drafter(name: str, layers: int) -> bool:
    """Whether a tensor of a model with so many layers is of its MTP block or DSpark drafter."""
    return name.startswith(("mtp.", f"blk.{layers}."))


@dataclasses.dataclass(frozen=True)
class MtpBlock:
    """An MTP block in a file.

    Attributes:
        header: the file.
        layer: N of its names `blk.N.*`; None where they begin with `mtp.0.`.
    """

    header: Header
    layer: int | None = None

    def place(self, name: str) -> tuple[str, int | None]:
        """The tensor that holds a parameter, and which half of the tensor's inputs it is; None for all of them.

        A block under `blk.N.` without a head of its own collapses its streams by the `output_hc_*` of its file, and without a
        norm of its own takes `output_norm`.

        Args:
            name: the tensor's name under `mtp.0.`.

        Source: `deepseek4` of llama.cpp's model loader, and the early form of its converter (llama.cpp 24162).
        """
        if self.layer is None:
            return f"mtp.0.{name}", None
        nextn = f"blk.{self.layer}.nextn."
        if name in _HALVES:
            joined = f"{nextn}eh_proj.weight"
            if joined not in self.header.tensors and any(nextn + one in self.header.tensors for one in _HALVES):
                return nextn + name, None
            return joined, _HALVES[name]
        if name in ("enorm.weight", "hnorm.weight"):
            return nextn + name, None
        if name == "norm.weight":
            own = f"{nextn}shared_head_norm.weight"
            return own if own in self.header.tensors else "output_norm.weight", None
        if name in _HEAD:
            has_head = any(nextn + one in self.header.tensors for one in _HEAD)
            return nextn + name if has_head else name.replace("hc_head", "output_hc"), None
        return f"blk.{self.layer}.{name}", None

    @property
    def is_alone(self) -> bool:
        """Whether the file holds no layer of a model besides the block."""
        own = f"blk.{self.layer}."
        return not any(name.startswith("blk.") and not name.startswith(own) for name in self.header.tensors)


def block_in(header: Header) -> MtpBlock | None:
    """The MTP block among a file's tensors, complete or not under `blk.N.`; None where there is none.

    Raises:
        InputError: there are several blocks.
    """
    layers = nextn_layers(header.tensors)
    if len(layers) > 1:
        second = next(name for name in header.tensors if name.startswith(f"blk.{layers[1]}.nextn."))
        raise InputError(f"{header.path}: {shown(second)}: a second MTP block beside blk.{layers[0]}; one block can be used")
    if layers:
        return MtpBlock(header, layers[0])
    return MtpBlock(header) if drafter(header.tensors) == "mtp" else None

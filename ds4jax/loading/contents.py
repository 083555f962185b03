"""What a model's files hold, by the parts of the model: who wrote them, their drafter, and the types of each class of tensors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from ds4jax.loading.checkpoint import Checkpoint, Tensor
from ds4jax.loading.flavour import flavour_of

# Classes in the order of a layer, each with the ends of its parameters' names. The first that fits counts.
_CLASSES = (
    ("embedding", r"^embed\.weight"),
    ("head", r"^head\.weight"),
    ("experts gate", r"\.experts\.w1\.weight"),
    ("experts up", r"\.experts\.w3\.weight"),
    ("experts down", r"\.experts\.w2\.weight"),
    ("shared experts", r"\.shared_experts\.w\d\.weight"),
    ("router", r"\.ffn\.gate\.weight"),
    ("expert tables", r"tid2eid"),
    ("attention", r"\.attn\.w\w+\.weight"),
    ("indexer", r"\.attn\.indexer\..*(ape|w\w+\.weight)"),
    ("compressors", r"\.attn\.compressor\.(ape|w\w+\.weight)"),
    ("MTP projections", r"\.[eh]_proj\.weight"),
    ("DSpark projection", r"^dspark\.main_proj\.weight"),
    ("DSpark tables", r"^dspark\.markov_w\d\.weight"),
    ("DSpark confidence", r"^dspark\.confidence\.weight"),
    ("hyper-connections", r"hc_\w+_fn"),
)
VECTORS = "norms and biases"
_PATTERNS = [(name, re.compile(pattern)) for name, pattern in _CLASSES]
_BLOCK = re.compile(r"(layers|mtp|dspark\.stages)\.(\d+)\.")
# What a drafter's blocks are called, since their numbers are no layers'.
_DRAFTERS = {"mtp": "mtp", "dspark.stages": "dspark"}


@dataclasses.dataclass(frozen=True)
class Group:
    """Tensors of one class that have the same types in the same layers.

    Attributes:
        kind: the class, such as "experts gate".
        names: the tensors, without their layer and `.weight`; one empty name for all norms and biases together.
        types: stored type -> the layers that have it, as by `layers`.
    """

    kind: str
    names: tuple[str, ...]
    types: dict[str, str]


def kind_of(name: str) -> str:
    """The class of a parameter."""
    return next((kind for kind, pattern in _PATTERNS if pattern.search(name)), VECTORS)


def flavour(checkpoint: Checkpoint) -> str:
    """Who laid the files out: "hub", or as by `flavour_of`."""
    return "hub" if checkpoint.kind == "hub" else flavour_of(checkpoint.metadata)


def head(checkpoint: Checkpoint) -> tuple[str, str]:
    """What drafts, as `Checkpoint.drafter`, and "inside", "file" or "" for where its weights are."""
    if not checkpoint.config.n_mtp and not checkpoint.config.n_dspark:
        return checkpoint.drafter, ""
    return checkpoint.drafter, "inside" if checkpoint.drafter_path is None else "file"


def groups(tensors: Iterable[Tensor]) -> list[Group]:
    """The classes of the tensors with their types, in the order of a layer."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for tensor in tensors:
        block, own = split_name(tensor.name)
        kind = kind_of(tensor.name)
        # Names of vectors say little, and they are many.
        found.setdefault((kind, own if kind != VECTORS else ""), {}).setdefault(tensor.stored, []).append(block)
    alike: dict[tuple[str, tuple[tuple[str, str], ...]], list[str]] = {}
    for (kind, own), types in found.items():
        alike.setdefault((kind, tuple((stored, layers(blocks)) for stored, blocks in types.items())), []).append(own)
    order = {kind: i for i, (kind, _) in enumerate((*_CLASSES, (VECTORS, "")))}
    return [
        Group(kind, tuple(sorted(names)), dict(types))
        for (kind, types), names in sorted(alike.items(), key=lambda one: order[one[0][0]])
    ]


def split_name(name: str) -> tuple[str, str]:
    """The layer of a parameter ("17", "mtp", "dspark", or "" for none), and its name there without `.weight`."""
    block = _BLOCK.match(name)
    if block is None:
        return "", name.removesuffix(".weight")
    return _DRAFTERS.get(block[1], block[2]), name[block.end() :].removesuffix(".weight")


def layers(blocks: Iterable[str]) -> str:
    """Layers as text: "0-25, 27, mtp"; empty for tensors outside of layers."""
    numbers = sorted({int(block) for block in blocks if block.isdigit()})
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    said = [str(first) if first == last else f"{first}-{last}" for first, last in parts]
    return ", ".join([*said, *(drafter for drafter in _DRAFTERS.values() if drafter in blocks)])

"""The names that files give to the tensors of a DSpark drafter, and its own numbers.

The hub and ds4's files name its stages `mtp.S.*` and put the heads into the first and the last. llama.cpp's files, which are of
architecture `dflash`, name the stages `blk.S.*` and give the heads names of their own.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from ds4jax.loading.gguf_header import Header

DFLASH = "dflash"
PREFIX = "dspark."
_STAGES = f"{PREFIX}stages."
# The heads' names after `mtp.S.` of the first and of the last stage, where a parameter has another or another stage's.
_FIRST = ("main_proj.weight", "main_norm.weight")
_IN_STAGE = {
    "markov_w1.weight": "markov_head.markov_w1.weight",
    "markov_w2.weight": "markov_head.markov_w2.weight",
    "confidence.weight": "confidence_head.proj.weight",
}
_IN_DFLASH = {
    "main_proj.weight": "fc.weight",
    "main_norm.weight": "enc.output_norm.weight",
    "norm.weight": "output_norm.weight",
    "hc_head_fn.weight": "output_hc_fn.weight",
    "hc_head_base.weight": "output_hc_base.weight",
    "hc_head_scale.weight": "output_hc_scale.weight",
    "markov_head.markov_w1.weight": "markov_w1.weight",
    "markov_head.markov_w2.weight": "markov_w2.weight",
    "confidence_head.proj.weight": "conf_proj.weight",
}
_STAGE = re.compile(r"(?:mtp|blk)\.(0|[1-9]\d{0,5})\.")


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What makes a DSpark drafter, beside the model's configuration.

    Attributes:
        stages: its layers.
        block: drafts of a forward pass.
        layers: layers of the model whose outputs it takes, counted from 0.
        noise_id: token id of the rows after the first.
        rank: width of the Markov tables.
    """

    stages: int
    block: int
    layers: tuple[int, ...]
    noise_id: int
    rank: int

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of `Config` that say this."""
        return {
            "n_mtp": 0,
            "n_dspark": self.stages,
            "dspark_block": self.block,
            "dspark_layers": self.layers,
            "dspark_noise_id": self.noise_id,
            "dspark_rank": self.rank,
        }


@dataclasses.dataclass(frozen=True)
class Dspark:
    """A DSpark drafter in a GGUF file.

    Attributes:
        header: the file.
        is_dflash: whether its names are llama.cpp's; those of ds4 otherwise.
    """

    header: Header
    numbers: Numbers
    is_dflash: bool

    def place(self, name: str) -> str:
        """The tensor that holds a parameter, from its name in ds4's files."""
        return dflash_name(name) if self.is_dflash else name


def hub_name(name: str, stages: int) -> str:
    """The tensor of a checkpoint directory that holds a parameter of a model with so many stages."""
    if not name.startswith(PREFIX):
        return name
    if name.startswith(_STAGES):
        return f"mtp.{name.removeprefix(_STAGES)}"
    own = name.removeprefix(PREFIX)
    return f"mtp.{0 if own in _FIRST else stages - 1}.{_IN_STAGE.get(own, own)}"


def dflash_name(name: str) -> str:
    """The name in llama.cpp's files of a tensor of ds4's."""
    _, stage, own = name.split(".", 2)
    return _IN_DFLASH.get(own) or f"blk.{stage}.{own}"


def stages_in(names: Iterable[str]) -> int:
    """One more than the largest S of all `mtp.S.*` or `blk.S.*`; 0 where there is none."""
    return max((int(found[1]) + 1 for found in map(_STAGE.match, names) if found), default=0)

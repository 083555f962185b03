"""The hyper-parameters of training a model's draft head alone. The same recipe, model and text give the same head."""

from __future__ import annotations

import dataclasses

from ds4jax.bounds import MAX_DRAFTS
from ds4jax.errors import InputError
from ds4jax.training.recipe import BaseRecipe, option, require_in_range, share

HEADS = ("dspark", "mtp")
# Values of a block of Q8_0, the type that a head's matrices are written in.
BLOCK = 32


@dataclasses.dataclass(frozen=True)
class HeadRecipe(BaseRecipe):
    """Hyper-parameters of one run. Each field is an option of `ds4jax train`, and its help text is in the field.

    Raises:
        InputError: a value is out of range.
    """

    held_out_chapters: int = option(20, "number of last chapters, which are not read", minimum=1)
    validation_chapters: int = option(20, "number of chapters before them, for the validation", minimum=1)
    steps: int = option(2500, "length of the schedule", minimum=1)
    batch: int = option(8, "windows per step", minimum=1)
    context: int = option(256, "tokens per window", minimum=32)
    warmup: int = option(100, "steps in which the learning rate rises", minimum=0)
    weight_decay: float = option(0.01, "decay of the matrices, times the learning rate", minimum=0.0)
    windows: int = option(768, "windows that the model is run over once, before the first step", minimum=1)
    written: float = share(0.75, "share of the windows that the model itself continues, by greedy choice")
    distill: float = share(0.7, "share of the loss that compares with the model's distribution")
    anchors: int = option(16, "dspark: blocks per window and step", minimum=1)
    decay: float = share(0.8, "dspark: weight of a slot's loss relative to the slot before it")
    stages: int = option(2, "dspark: stages of a new head", minimum=1)
    block: int = option(5, "dspark: drafts of a block of a new head", minimum=1, maximum=MAX_DRAFTS)
    rank: int = option(64, "dspark: width of the Markov tables of a new head", minimum=1)

    def __post_init__(self) -> None:
        require_in_range(self)
        if self.rank % BLOCK:
            raise InputError(f"--rank: {self.rank} is no multiple of {BLOCK}, the block of Q8_0")

"""Every number that decides what a training run computes; the same recipe and text give the same model."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.training.tiny import tiny_config

PRECISIONS = ("default", "bfloat16", "tensorfloat32", "highest")


def _option(default: Any, help_text: str, **metadata: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": help_text, **metadata})


def _share(default: float, help_text: str) -> Any:
    return _option(default, help_text, least=0.0, most=1.0)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of one run; each is an option of `python -m ds4jax.train`, and its help text stands beside it.

    Raises:
        InputError: a value that no run can have.
    """

    text: str = _option("../shared/corpus/kjv.txt", "text to learn: chapters separated by blank lines")
    held_out_chapters: int = _option(20, "last chapters, which only the final evaluation sees", least=1)
    validation_chapters: int = _option(20, "chapters before those, for the curve; 0 trains on them too", least=0)
    vocab_size: int = _option(1024, "tokens of the vocabulary, 9 special ones and 256 bytes included", least=266)
    config: str = _option("{}", "JSON object: fields of Config that differ from the tiny model's", flag="config-json")
    seed: int = _option(0, "decides the initial weights and all that is drawn later", least=0)
    embedding_scale: float = _option(1.0, "factor of the initial embedding", least=0.0)
    output_scale: float = _option(1.0, "factor of the initial matrices that write to the streams", least=0.0)
    steps: int = _option(4000, "length of the schedule", least=0)
    batch: int = _option(64, "windows a step", least=1)
    microbatches: int = _option(2, "parts of a batch that are computed one after the other, to save memory", least=1)
    context: int = _option(512, "tokens a window", least=2)
    long_context: int = _option(1024, "tokens a window near the end of the run, in proportionately fewer windows", least=2)
    long_share: float = _share(0.2, "share of the steps, the last ones, on long windows")
    dense_share: float = _share(0.2, "share of the steps, the first ones, in which queries see every compressed row")
    bpe_dropout: float = _share(0.1, "probability of leaving out a merge in the varied segmentations")
    segmentations: int = _option(16, "segmentations of the whole text to draw windows from; the first has no dropout", least=1)
    canonical: float = _share(0.5, "share of the windows with the segmentation that encoding gives")
    anneal: float = _share(0.2, "share of the steps, the last ones, over which varied segmentations and token noise fade out")
    line_starts: float = _share(
        0.15, "share of the windows that begin with a line of the text, after the token that begins a document"
    )
    bos: float = _share(0.5, "share of the other windows that begin with the token that begins a document")
    token_noise: float = _share(0.05, "share of the input tokens replaced by random ones")
    dropout: float = _share(0.1, "share of the channels switched off for a whole window wherever a norm feeds a sub-layer")
    weight_dropout: float = _share(0.05, "share of the matrix elements switched off for a step")
    mtp_weight: float = _option(0.3, "weight of the MTP block's loss", least=0.0)
    mtp_distill: float = _share(0.5, "share of the MTP block's loss that asks for the main model's own distribution")
    index_weight: float = _option(
        0.01, "weight of the indexer's loss; AdamW scales it away for the indexer, the rest feels it", least=0.0
    )
    balance_rate: float = _option(0.005, "step of the router biases towards equal load at the highest learning rate", least=0.0)
    optimizer: str = _option("adamw", "adamw, or muon for the matrices with adamw for the rest", choices=("adamw", "muon"))
    learning_rate: float = _option(2e-3, "highest learning rate", least=1e-9)
    final_learning_rate: float = _share(0.02, "last learning rate as a share of the highest")
    warmup: int = _option(200, "steps in which the learning rate rises", least=0)
    beta1: float = _share(0.9, "AdamW's decay of the first moment")
    beta2: float = _share(0.95, "AdamW's decay of the second moment")
    weight_decay: float = _option(0.1, "decay of the matrices, times the learning rate", least=0.0)
    clip: float = _option(1.0, "largest norm of the gradient", least=0.0)
    ema: float = _share(0.998, "decay of the averaged weights, which are what is evaluated and exported")
    precision: str = _option(
        "default", "precision of matrix products", choices=("default", "bfloat16", "tensorfloat32", "highest")
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, limits = getattr(self, field.name), field.metadata
            flag = "--" + str(limits.get("flag", field.name)).replace("_", "-")
            if "least" in limits and not value >= limits["least"]:
                raise InputError(f"{flag}: {value} is too small; it must be at least {limits['least']}")
            if "most" in limits and not value <= limits["most"]:
                raise InputError(f"{flag}: {value} is too large; it must be at most {limits['most']}")
            if "choices" in limits and value not in limits["choices"]:
                raise InputError(f"{flag}: {value!r} is not one of {', '.join(limits['choices'])}")
        for name in ("bpe_dropout", "token_noise", "dropout", "weight_dropout", "ema"):
            if getattr(self, name) >= 1:
                raise InputError(f"--{name.replace('_', '-')}: 1 would leave nothing to learn from; it must be below 1")
        if self.batch % self.microbatches:
            raise InputError(f"--microbatches: {self.microbatches} does not divide the batch of {self.batch} windows")
        self.model_config()

    def model_config(self) -> Config:
        """The model's shape: the tiny model's with the fields of `config` replaced.

        Raises:
            InputError: not a JSON object, an unknown field, or a value that Config refuses.
        """
        try:
            fields = json.loads(self.config)
        except json.JSONDecodeError as error:
            raise InputError(f"--config-json: not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise InputError("--config-json: not a JSON object; give fields of Config by name")
        known = {field.name for field in dataclasses.fields(Config)} - {"vocab_size", "cache"}
        for name in fields:
            if name not in known:
                raise InputError(f"--config-json: {name} is no field of Config that can be set here")
        if "compress_ratios" in fields:
            fields["compress_ratios"] = tuple(fields["compress_ratios"])
        try:
            config = dataclasses.replace(tiny_config(self.vocab_size), **fields)
        except (ValueError, TypeError) as error:
            raise InputError(f"--config-json: {error}") from None
        if max(self.context, self.long_context if self.long_share else 0) > config.max_context:
            raise InputError(f"--context: windows are longer than the model's max_context of {config.max_context} tokens")
        return config


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of steps computed by one program: up to step `end`, windows of `context` tokens, dense or selecting attention."""

    end: int
    context: int
    batch: int
    dense: bool


def phases(recipe: Recipe) -> tuple[Phase, ...]:
    """The run's phases in order: dense attention, then the indexer's selection, then long windows."""
    dense_end = round(recipe.steps * recipe.dense_share)
    long_start = max(dense_end, recipe.steps - round(recipe.steps * recipe.long_share))
    long_batch = max(1, recipe.batch * recipe.context // recipe.long_context)
    long_batch = max(recipe.microbatches, long_batch // recipe.microbatches * recipe.microbatches)
    planned = (
        Phase(dense_end, recipe.context, recipe.batch, True),
        Phase(long_start, recipe.context, recipe.batch, False),
        Phase(recipe.steps, recipe.long_context, long_batch, False),
    )
    starts = (0, dense_end, long_start)
    return tuple(phase for start, phase in zip(starts, planned, strict=True) if phase.end > start)

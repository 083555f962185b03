"""The hyper-parameters of a training run. The same recipe and text give the same model."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.training.tiny import tiny_config


def option(default: Any, help_text: str, **metadata: Any) -> Any:
    """A field that is an option of the command; metadata are `minimum`, `maximum`, `choices` and `flag`."""
    return dataclasses.field(default=default, metadata={"help": help_text, **metadata})


def share(default: float, help_text: str) -> Any:
    """An `option` of 0 to 1."""
    return option(default, help_text, minimum=0.0, maximum=1.0)


def flag_of(field: dataclasses.Field) -> str:
    """The option of the command line for a field of a recipe."""
    return "--" + str(field.metadata.get("flag", field.name)).replace("_", "-")


def require_in_range(recipe: Any) -> None:
    """Check every field of a recipe against its metadata.

    Raises:
        InputError: a value is out of range.
    """
    for field in dataclasses.fields(recipe):
        value, limits, flag = getattr(recipe, field.name), field.metadata, flag_of(field)
        if "minimum" in limits and not value >= limits["minimum"]:
            raise InputError(f"{flag}: {value} is too small; it must be at least {limits['minimum']}")
        if "maximum" in limits and not value <= limits["maximum"]:
            raise InputError(f"{flag}: {value} is too large; it must be at most {limits['maximum']}")
        if "choices" in limits and value not in limits["choices"]:
            raise InputError(f"{flag}: {value!r} is not one of {', '.join(limits['choices'])}")


@dataclasses.dataclass(frozen=True)
class BaseRecipe:
    """What all recipes have: a text, a seed and the hyper-parameters of the optimiser."""

    text: str = option("../shared/corpus/kjv.txt", "text to learn: chapters separated by blank lines")
    seed: int = option(0, "seed of the initial weights and of every random draw", minimum=0)
    steps: int = option(4000, "length of the schedule", minimum=0)
    optimizer: str = option("adamw", "adamw, or muon for the hidden matrices and adamw for the rest", choices=("adamw", "muon"))
    learning_rate: float = option(2e-3, "maximum learning rate", minimum=1e-9)
    final_learning_rate: float = share(0.02, "last learning rate as a share of the maximum")
    warmup: int = option(200, "steps in which the learning rate rises", minimum=0)
    beta1: float = share(0.9, "AdamW's decay of the first moment")
    beta2: float = share(0.95, "AdamW's decay of the second moment")
    weight_decay: float = option(0.1, "decay of the matrices, times the learning rate", minimum=0.0)
    clip: float = option(1.0, "maximum norm of the gradient", minimum=0.0)
    ema: float = share(0.998, "decay of the averaged weights, which are evaluated and exported")


@dataclasses.dataclass(frozen=True)
class Recipe(BaseRecipe):
    """Hyper-parameters of one run. Each field is an option of `ds4jax train`, and its help text is in the field.

    Raises:
        InputError: a value is out of range.
    """

    held_out_chapters: int = option(20, "number of last chapters, for the final evaluation only", minimum=1)
    validation_chapters: int = option(20, "number of chapters before them, for the curve; 0 trains on them too", minimum=0)
    vocab_size: int = option(1024, "tokens of the vocabulary, with 9 special tokens and 256 bytes", minimum=266)
    config: str = option("{}", "JSON object: fields of Config that differ from the tiny model's", flag="config-json")
    embedding_scale: float = option(1.0, "factor of the initial embedding", minimum=0.0)
    output_scale: float = option(1.0, "factor of the initial values of the matrices that write to the streams", minimum=0.0)
    batch: int = option(64, "windows per step", minimum=1)
    microbatches: int = option(2, "parts of a batch, computed one after the other to save memory", minimum=1)
    context: int = option(512, "tokens per window", minimum=2)
    long_context: int = option(1024, "tokens per window at the end of the run, in proportionately fewer windows", minimum=2)
    long_share: float = share(0.2, "share of the steps with long windows, at the end of the run")
    dense_share: float = share(0.2, "share of the steps in which queries see every compressed row, at the start of the run")
    bpe_dropout: float = share(0.1, "probability of skipping a merge in the varied segmentations")
    segmentations: int = option(16, "segmentations of the text to draw windows from; the first has no dropout", minimum=1)
    canonical: float = share(0.5, "share of the windows with the regular segmentation")
    anneal: float = share(0.2, "share of the steps in which varied segmentations and token noise fade out, at the end")
    line_starts: float = share(0.15, "share of the windows that begin with a beginning-of-document token and the start of a line")
    bos: float = share(0.5, "share of the other windows that begin with a beginning-of-document token")
    token_noise: float = share(0.05, "share of the input tokens replaced by random tokens")
    dropout: float = share(0.1, "share of each norm's channels set to zero, by one mask for all tokens of a window")
    weight_dropout: float = share(0.05, "share of the matrix elements set to zero in a step")
    mtp_weight: float = option(0.3, "weight of the MTP block's loss", minimum=0.0)
    mtp_distill: float = share(0.5, "share of the MTP block's loss that compares with the main model's distribution")
    index_weight: float = option(
        0.01, "weight of the indexer's loss; it matters for the other weights, AdamW cancels it for the indexer", minimum=0.0
    )
    balance_rate: float = option(0.005, "step of the router biases at the maximum learning rate", minimum=0.0)
    precision: str = option(
        "default", "precision of matrix products", choices=("default", "bfloat16", "tensorfloat32", "highest")
    )

    def __post_init__(self) -> None:
        require_in_range(self)
        for name in ("bpe_dropout", "token_noise", "dropout", "weight_dropout", "ema"):
            if getattr(self, name) >= 1:
                raise InputError(f"--{name.replace('_', '-')}: 1 would leave nothing to learn from; it must be below 1")
        if self.batch % self.microbatches:
            raise InputError(f"--microbatches: {self.microbatches} does not divide the batch of {self.batch} windows")
        self.model_config()

    def model_config(self) -> Config:
        """The model's configuration: the tiny model's, with the fields of `config` replaced.

        Raises:
            InputError: `config` is not a JSON object, has an unknown field, or a value that Config refuses.
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
    """A range of steps that one program computes.

    Attributes:
        end: the step after the last.
        context: tokens per window.
        batch: windows per step.
        dense: whether queries see every compressed row, without the indexer's selection.
    """

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

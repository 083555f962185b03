"""`ds4jax train --head`: train the draft head of a model alone, from a text to a GGUF file beside the model's."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ds4jax import runtime
from ds4jax.bounds import SHIPPED
from ds4jax.cli import progress
from ds4jax.errors import InputError
from ds4jax.files import same_file
from ds4jax.training.head_recipe import HeadRecipe
from ds4jax.training.recipe import Recipe, flag_of

if TYPE_CHECKING:
    import numpy as np

    from ds4jax.model.transformer import Transformer
    from ds4jax.training.head_file import HeadFile
    from ds4jax.training.head_run import HeadTraining, Lesson
    from ds4jax.training.heads import Head
    from ds4jax.training.stopping import Stopping

# Options of a whole run that a head's does not have.
_WHOLE = ("out", "resume")


def recipe_of(options: argparse.Namespace) -> HeadRecipe:
    """The recipe that the options give.

    Raises:
        InputError: an option is given that does not count for a head, or --export is missing.
    """
    own = [field.name for field in dataclasses.fields(HeadRecipe)]
    for field in dataclasses.fields(Recipe):
        if hasattr(options, field.name) and field.name not in own:
            raise InputError(f"{flag_of(field)}: does not count with --head; leave it out")
    for name in _WHOLE:
        if getattr(options, name):
            raise InputError(f"--{name}: a run with --head has no folder; give the file to write with --export")
    if options.export is None:
        raise InputError("--export: with --head, give the file to write")
    return HeadRecipe(**{name: getattr(options, name) for name in own if hasattr(options, name)})


def run(options: argparse.Namespace, command: str, started: float) -> None:
    """Train and write the file.

    Raises:
        InputError: the options, the text or the model cannot be used.
        FloatingPointError: the loss diverged.
    """
    recipe, path = recipe_of(options), options.model or SHIPPED
    try:
        import numpy as np

        from ds4jax.training import data, heads
        from ds4jax.training.head_file import HeadFile
        from ds4jax.training.head_run import HeadTraining
        from ds4jax.training.stopping import Stopping
    except ModuleNotFoundError as error:
        raise InputError(f'{error.name} is not installed; training needs pip install "ds4jax[train]"') from None
    from ds4jax.language_model import load
    from ds4jax.loading.gguf_split import open_set
    from ds4jax.loading.mtp_names import drafter

    if path.is_dir():
        raise InputError(f"--model {path}: is a directory; a head is trained for a GGUF file")
    own = same_file(options.export, [path, Path(recipe.text), *([options.drafter_file] if options.drafter_file else [])])
    if own is not None:
        raise InputError(f"--export {options.export}: is {own}, an input of the training; give another name")
    corpus = data.read_corpus(Path(recipe.text), recipe.held_out_chapters, recipe.validation_chapters)
    runtime.configure()
    wanted = options.head if options.drafter_file else drafter(open_set(path).tensors) or "none"
    opened = load(path, drafter_file=options.drafter_file, drafter=wanted, max_draft=0)
    if opened.tokenizer is None:
        raise InputError(f"{path}: tokenizer: none in this file; a text needs one")
    model, head = heads.prepared(options.head, opened.float_model(), opened.tokenizer, recipe), heads.HEAD[options.head]
    texts = [np.array(opened.tokenizer.encode(text), np.int32) for text in (corpus.train, corpus.validation)]
    file = HeadFile(options.export, options.head, path, command, recipe, corpus.sha256)
    with Stopping(started, options.time_limit) as stopping:
        training = HeadTraining(head, model, recipe, *_lessons(head, model, texts, recipe))
        with progress.step_bar("training", recipe.steps) as bar:
            _steps(training, file, options, stopping, bar)


def _lessons(head: Head, model: Transformer, texts: list[np.ndarray], recipe: HeadRecipe) -> list[Lesson]:
    """The windows to learn from and those to validate on, with what the frozen model says of them."""
    from ds4jax.training.head_run import lessons

    with progress.counting_bar("running the model") as show:
        return lessons(head, model, texts, recipe, show)


def _steps(
    training: HeadTraining, file: HeadFile, options: argparse.Namespace, stopping: Stopping, bar: progress.StepBar | None
) -> None:
    said = time.monotonic()
    figures: dict[str, float] = {}
    for step, latest in training.steps():
        if not math.isfinite(latest["loss"]):
            raise FloatingPointError(f"the loss is {latest['loss']} at step {step}; lower --learning-rate")
        last = step == training.recipe.steps or stopping.asked
        if step % options.evaluate_every == 0 or last:
            figures = training.validate()
        if step % options.save_every == 0 or last:
            file.write(training, figures)
        line = " ".join((*_line(latest), "validation:", *_line(figures)))
        if bar:
            bar.update(step, line)
        elif last or step == 1 or time.monotonic() - said >= options.report_seconds:
            said = time.monotonic()
            print(f"step {step}/{training.recipe.steps}  {line}", file=sys.stderr, flush=True)
        if stopping.asked:
            return


def _line(figures: dict[str, float]) -> list[str]:
    return [f"{name} {value:.3f}" for name, value in figures.items()]

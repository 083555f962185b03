"""`ds4jax train`: train the tiny model of the package, or a draft head of any small model, from a text to a GGUF file."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from ds4jax import runtime
from ds4jax.bounds import NEW_TOKENS, Numbers
from ds4jax.cli import options as cli_options
from ds4jax.cli import progress
from ds4jax.cli.commands import train_head
from ds4jax.errors import InputError
from ds4jax.files import same_file
from ds4jax.training.head_recipe import HEADS, HeadRecipe
from ds4jax.training.recipe import Recipe, flag_of

PROGRAM = "ds4jax train"
_SECONDS = cli_options.number(Numbers(0, math.inf, "it must be above 0", above=True))
_COUNT = cli_options.integer(NEW_TOKENS)

DESCRIPTION = """\
Train the tiny model of the package, from a text to a GGUF file. With --head, train the draft head of a model alone: everything
else is frozen, so no output changes, and the file is one for --drafter-file."""

EXAMPLES = f"""\
examples:
  {PROGRAM} --text kjv.txt --steps 2600
  {PROGRAM} --resume runs/tiny --export tiny.gguf
  {PROGRAM} --head dspark --model tiny.gguf --text kjv.txt --export dspark-tiny.gguf"""


def add_parser(commands: Any) -> None:
    """Declare the sub-command. Each field of a recipe is an option; a resumed run keeps the values that are not given."""
    parser = commands.add_parser("train", help="train a tiny model", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of a new run (default: runs/tiny)")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="continue the run in this folder")
    parser.add_argument(
        "--export", type=cli_options.output_file, metavar="FILE", help="write the averaged weights as a GGUF file"
    )
    parser.add_argument("--time-limit", type=_SECONDS, metavar="S", help="stop, save and evaluate after this many seconds")
    parser.add_argument("--save-every", type=_COUNT, default=500, metavar="N", help="steps between saves (default: 500)")
    parser.add_argument(
        "--evaluate-every", type=_COUNT, default=250, metavar="N", help="steps between validations (default: 250)"
    )
    parser.add_argument("--steps-per-call", type=_COUNT, default=10, metavar="N", help="steps in one device call (default: 10)")
    parser.add_argument("--report-seconds", type=_SECONDS, default=10.0, metavar="S", help="seconds between lines (default: 10)")
    parser.add_argument("--head", choices=HEADS, help="train this draft head of a model alone and write it with --export")
    parser.add_argument(
        "--model", type=cli_options.model_path, metavar="FILE", help="the GGUF file of that model (the tiny model)"
    )
    parser.add_argument(
        "--drafter-file",
        type=cli_options.model_path,
        metavar="FILE",
        help="train on from the head in this file (the model's own)",
    )
    whole, own = dataclasses.fields(Recipe), dataclasses.fields(HeadRecipe)
    names = {field.name for field in whole}
    shared = ", ".join(f"{flag_of(field)} {field.default}" for field in own if field.name in names and field.name != "text")
    recipe = parser.add_argument_group("recipe", "what the run computes; with --resume, values given here change the run")
    head = parser.add_argument_group("recipe of a head", f"with --head, these count, and of the recipe: --text, {shared}")
    for group, fields in ((recipe, whole), (head, [field for field in own if field.name not in names])):
        for field in fields:
            kind = {"int": int, "float": float, "str": str}[str(field.type)]
            shown = f"{field.metadata['help']} (default: {field.default})".replace("%", "%%")
            group.add_argument(flag_of(field), dest=field.name, type=kind, default=argparse.SUPPRESS, help=shown)
    parser.set_defaults(run=run)


def _recorded(options: argparse.Namespace) -> str:
    """The command for the file's metadata: the options that decide the result, without folders of this machine."""
    words: list[str] = [] if not options.head else ["--head", options.head]
    for name in ("model", "drafter_file"):
        path = getattr(options, name)
        words += [f"--{name.replace('_', '-')}", path.name] if path else []
    for field in {field.name: field for recipe in (HeadRecipe, Recipe) for field in dataclasses.fields(recipe)}.values():
        if hasattr(options, field.name):
            value = getattr(options, field.name)
            words += [flag_of(field), Path(value).name if field.name == "text" else str(value)]
    return f"{PROGRAM} {shlex.join(words)}".rstrip()


def run(options: argparse.Namespace) -> int:
    """Run the command: train, export or both. Returns 0, or 1 if the loss diverged.

    Raises:
        InputError: the options, the text or the folder cannot be used.
    """
    try:
        return _run(options, time.monotonic())
    except FloatingPointError as error:
        print(f"ds4jax: error: {error}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace, started: float) -> int:
    # JAX, optax and matplotlib are imported only if there is something to compute.
    from ds4jax.training import checkpoint

    if options.head:
        train_head.run(options, _recorded(options), started)
        return 0
    _require_whole(options)
    if options.resume and options.out:
        raise InputError("--out: a resumed run stays in its folder; give --out or --resume")
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(Recipe) if hasattr(options, field.name)}
    folder = options.resume or options.out or Path("runs/tiny")
    if options.export:
        own = same_file(options.export, [*folder.glob("*.safetensors"), Path(given.get("text", Recipe.text))])
        if own is not None:
            raise InputError(f"--export {options.export}: is {own}, an input of the training; give another name")
    export_only = options.resume and given.get("steps") == 0
    if not export_only:
        _train(options, given, folder, _recorded(options), started)
    if options.export:
        from ds4jax.training.export import export_gguf

        run, weights = checkpoint.load_weights(folder)
        export_gguf(run, weights, options.export, {})
        print(f"{options.export}: {options.export.stat().st_size:,} bytes", file=sys.stderr)
    return 0


def _require_whole(options: argparse.Namespace) -> None:
    """Refuse options that count for a head alone."""
    names = {field.name for field in dataclasses.fields(Recipe)}
    for field in dataclasses.fields(HeadRecipe):
        if field.name not in names and hasattr(options, field.name):
            raise InputError(f"{flag_of(field)}: counts only with --head; leave it out")
    for name in ("model", "drafter_file"):
        if getattr(options, name):
            raise InputError(f"--{name.replace('_', '-')}: counts only with --head; leave it out")


def _train(options: argparse.Namespace, given: dict[str, Any], folder: Path, command: str, started: float) -> None:
    try:
        from ds4jax.training import checkpoint, data
        from ds4jax.training.export import file_size
        from ds4jax.training.report import Report
        from ds4jax.training.session import Pace, Session, begin
    except ModuleNotFoundError as error:
        raise InputError(f'{error.name} is not installed; training needs pip install "ds4jax[train]"') from None

    if options.resume:
        run = checkpoint.load_run(folder)
        recipe = dataclasses.replace(run.recipe, **given)
        run = dataclasses.replace(run, recipe=recipe, command=f"{run.command}; {command}")
    elif (folder / checkpoint.STATE).exists():
        raise InputError(f"{folder}: already holds a run; continue with --resume {folder}, or give another folder with --out")
    else:
        recipe = Recipe(**given)
    corpus = data.read_corpus(Path(recipe.text), recipe.held_out_chapters, recipe.validation_chapters)
    if not options.resume:
        folder.mkdir(parents=True, exist_ok=True)
        run = begin(recipe, corpus, command)
    elif corpus.sha256 != run.corpus:
        raise InputError(f"{recipe.text}: not the text of the run in {folder}")
    try:
        size = file_size(recipe.model_config(), run.vocabulary)
    except ValueError as error:
        raise InputError(f"--config-json: {error}") from None
    runtime.configure()
    pace = Pace(options.save_every, options.evaluate_every, options.steps_per_call, options.report_seconds, options.time_limit)
    session = Session(folder, run, corpus, pace, started, resume=bool(options.resume))
    done = int(session.state.step)
    steps = recipe.steps
    with progress.step_bar("training", steps, done) as bar, Report(folder, steps, done, options.report_seconds, bar) as report:
        report.say(f"a Q8_0 file of this model has about {size:,} bytes")
        session.train(report)

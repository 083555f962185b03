"""`python -m ds4jax.train`: trains the tiny model that ships with the package, from a text to a GGUF file."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ds4jax import cli_options, runtime
from ds4jax.errors import InputError
from ds4jax.training.recipe import Recipe

PROGRAM = "python -m ds4jax.train"
INTERRUPTED = 130
_SECONDS = cli_options.number(lambda value: value > 0, "it must be above 0")
_COUNT = cli_options.integer(1, cli_options.MOST_TOKENS, "it must be at least 1")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with 2."""
        self.exit(2, f"ds4jax.train: error: {' '.join(message.splitlines())}\n")


def _flag(field: dataclasses.Field) -> str:
    return "--" + str(field.metadata.get("flag", field.name)).replace("_", "-")


def build_parser() -> Parser:
    """The parser: every field of a recipe is an option; those not given keep their default, or what a resumed run has."""
    parser = Parser(
        prog=PROGRAM,
        description=__doc__.split(": ", 1)[1],
        epilog=f"examples:\n  {PROGRAM} --text kjv.txt --steps 2600\n  {PROGRAM} --resume runs/tiny --export tiny.gguf",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of a new run (default: runs/tiny)")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run in this folder")
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
    recipe = parser.add_argument_group("recipe", "what the run computes; with --resume, what is given here changes the run")
    for field in dataclasses.fields(Recipe):
        flag = _flag(field)
        kind = {"int": int, "float": float, "str": str}[str(field.type)]
        shown = f"{field.metadata['help']} (default: {field.default})".replace("%", "%%")
        recipe.add_argument(flag, dest=field.name, type=kind, default=argparse.SUPPRESS, help=shown)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0, 2 for a wrong input, 1 for a run that diverged, 130 for Ctrl-C.

    Raises:
        SystemExit: after --help or an error that has been told.
    """
    started = time.monotonic()
    parser = build_parser()
    options = parser.parse_args(argv)
    try:
        return _run(options, started)
    except InputError as error:
        parser.error(str(error))
    except FloatingPointError as error:
        parser.exit(1, f"ds4jax.train: error: {error}\n")
    except OSError as error:
        parser.exit(1, f"ds4jax.train: error: {error}\n")
    except KeyboardInterrupt:
        return INTERRUPTED


def _recorded(given: dict[str, Any]) -> str:
    """The command as the file will say it: what decides the result, and no folder of the machine that computed it."""
    words: list[str] = []
    for field in dataclasses.fields(Recipe):
        if field.name in given:
            value = given[field.name]
            words += [_flag(field), Path(value).name if field.name == "text" else str(value)]
    return f"{PROGRAM} {shlex.join(words)}".rstrip()


def _run(options: argparse.Namespace, started: float) -> int:
    # jax, optax and matplotlib are imported only when there is something to compute.
    from ds4jax.training import checkpoint

    if options.resume and options.out:
        raise InputError("--out: a resumed run stays in its folder; give --out or --resume")
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(Recipe) if hasattr(options, field.name)}
    folder = options.resume or options.out or Path("runs/tiny")
    export_only = options.resume and given.get("steps") == 0
    if not export_only:
        _train(options, given, folder, _recorded(given), started)
    if options.export:
        from ds4jax.training.export import export_gguf

        run, weights = checkpoint.load_weights(folder)
        export_gguf(run, weights, options.export, {})
        print(f"{options.export}: {options.export.stat().st_size:,} bytes", file=sys.stderr)
    return 0


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
        raise InputError(f"{folder}: holds a run already; go on with --resume {folder}, or name another folder with --out")
    else:
        recipe = Recipe(**given)
    corpus = data.read_corpus(Path(recipe.text), recipe.held_out_chapters, recipe.validation_chapters)
    if not options.resume:
        folder.mkdir(parents=True, exist_ok=True)
        run = begin(recipe, corpus, command)
    elif corpus.sha256 != run.corpus:
        raise InputError(f"{recipe.text}: not the text that the run in {folder} began with")
    try:
        size = file_size(recipe.model_config(), run.vocabulary)
    except ValueError as error:
        raise InputError(f"--config-json: {error}") from None
    runtime.configure()
    pace = Pace(options.save_every, options.evaluate_every, options.steps_per_call, options.report_seconds, options.time_limit)
    session = Session(folder, run, corpus, pace, started, resume=bool(options.resume))
    done = int(session.state.step)
    with Report(folder, recipe.steps, done, options.report_seconds) as report:
        report.say(f"a Q8_0 file of this model has about {size:,} bytes")
        session.train(report)


if __name__ == "__main__":
    sys.exit(main())

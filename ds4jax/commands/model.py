"""What the commands that run a model have in common: which one, and how it is opened."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ds4jax import cli_options

if TYPE_CHECKING:
    from ds4jax.language_model import LanguageModel


def add_options(parser: argparse.ArgumentParser) -> None:
    """--model and --qat."""
    parser.add_argument(
        "--model", type=cli_options.model_path, metavar="PATH", help="a GGUF file or a checkpoint directory (the tiny model)"
    )
    parser.add_argument(
        "--qat",
        action=argparse.BooleanOptionalAction,
        help="simulate the FP8 and FP4 rounding that published weights were trained with (as the model's files say)",
    )


def add_draft(parser: argparse.ArgumentParser) -> None:
    """--draft and --max-draft, for commands that speculate."""
    parser.add_argument(
        "--draft",
        type=cli_options.draft,
        metavar="K",
        help="tokens that the MTP block drafts a step, 0 to 4, or auto for what pays best (2 where the model has the block)",
    )
    parser.add_argument(
        "--max-draft",
        type=cli_options.draft_count,
        metavar="K",
        help="the deepest draft that the loop is compiled for (2, or --draft if more); 0 is the narrow loop without drafts",
    )


def max_draft(options: argparse.Namespace) -> int | None:
    """What the loop is compiled for, None for the model's own default.

    Two depths are the same program, so that they say the same to the last bit; only a depth above the default needs another.
    """
    if options.max_draft is not None or not isinstance(options.draft, int) or options.draft <= cli_options.DEFAULT_DRAFTS:
        depth: int | None = options.max_draft
        return depth
    return options.draft


def add_strict(parser: argparse.ArgumentParser) -> None:
    """--strict, for commands that decode."""
    parser.add_argument(
        "--strict",
        action="store_true",
        default=os.environ.get("DS4JAX_STRICT") == "1",
        help="float32 products and no Pallas kernel (also DS4JAX_STRICT=1)",
    )


def open_model(options: argparse.Namespace, *, max_draft: int | None = None) -> LanguageModel:
    """Load the model that the options name, through the compilation cache; `max_draft` as for `ds4jax.load`.

    Raises:
        InputError: anything about the files that keeps them from being used.
    """
    with status("loading the model"):
        from ds4jax import runtime
        from ds4jax.language_model import load

        runtime.configure()
        return load(options.model, qat=options.qat, max_draft=max_draft)


@contextlib.contextmanager
def status(message: str) -> Iterator[None]:
    """Show on a terminal's stderr that something takes its time; say nothing where nobody watches."""
    if not (sys.stderr and sys.stderr.isatty()):
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(message):
        yield

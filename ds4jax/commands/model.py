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


def add_strict(parser: argparse.ArgumentParser) -> None:
    """--strict, for commands that decode."""
    parser.add_argument(
        "--strict",
        action="store_true",
        default=os.environ.get("DS4JAX_STRICT") == "1",
        help="float32 products and no Pallas kernel (also DS4JAX_STRICT=1)",
    )


def open_model(options: argparse.Namespace) -> LanguageModel:
    """Load the model that the options name, through the compilation cache.

    Raises:
        InputError: anything about the files that keeps them from being used.
    """
    with status("loading the model"):
        from ds4jax import runtime
        from ds4jax.language_model import load

        runtime.configure()
        return load(options.model, qat=options.qat)


@contextlib.contextmanager
def status(message: str) -> Iterator[None]:
    """Show on a terminal's stderr that something takes its time; say nothing where nobody watches."""
    if not (sys.stderr and sys.stderr.isatty()):
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(message):
        yield

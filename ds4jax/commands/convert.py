"""`ds4jax convert`: a checkpoint directory to one GGUF file."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ds4jax import cli_options

if TYPE_CHECKING:
    from ds4jax.convert import Progress

DESCRIPTION = """\
Write a checkpoint directory (config.json and safetensors) as one GGUF file. FP4 experts become MXFP4 without loss, dense matrices
the type that --dense names, the rest bfloat16 or float32. Tensors are read, converted and written one after another.

The file appears when it is complete. Until then OUT.gguf.partial grows beside it, which no program takes for a model; after
Ctrl-C or a crash the same command checks what is there and goes on, and the result is the same to the byte."""

EXAMPLES = """\
examples:
  ds4jax convert DeepSeek-V4-Flash/ flash.gguf
  ds4jax convert DeepSeek-V4-Flash/ flash.gguf --dense bf16"""
# Mirrors what the loader knows; importing it would import JAX.
DENSE = ("q8_0", "bf16", "f32")


def add_parser(commands: Any) -> None:
    """Declare the sub-command."""
    parser = commands.add_parser(
        "convert", help="write a checkpoint directory as a GGUF file", description=DESCRIPTION, epilog=EXAMPLES
    )
    parser.add_argument("directory", type=cli_options.model_path, metavar="HUB_DIR", help="the checkpoint directory")
    parser.add_argument("out", type=cli_options.output_file, metavar="OUT.gguf", help="the file to write")
    parser.add_argument("--dense", choices=DENSE, default=DENSE[0], help=f"type of dense matrices ({DENSE[0]})")
    parser.add_argument(
        "--force", action="store_true", help="replace OUT.gguf, and begin anew where something else's beginning lies beside it"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Carry the command out; returns 0.

    Raises:
        InputError: the directory cannot be converted, or the file not written.
    """
    from ds4jax.convert import convert

    with _bar() as progress:
        layout = convert(options.directory, options.out, dense=options.dense, force=options.force, progress=progress)
    print(f"{options.out}: {len(layout.sources)} tensors, {layout.nbytes / 1e6:,.1f} MB", file=sys.stderr)
    return 0


@contextlib.contextmanager
def _bar() -> Iterator[Progress | None]:
    """A bar with the rate on a terminal's stderr; nothing where nobody watches."""
    if not (sys.stderr and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading headers", total=None)

        def show(stage: str, done: int, total: int) -> None:
            bar.update(task, description=stage, completed=done, total=total)

        yield show

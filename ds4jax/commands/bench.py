"""`ds4jax bench`: time the kernels on this machine's GPU."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

from ds4jax import cli_options
from ds4jax.errors import InputError

# Mirrors what a decode step may ask for; more rows take another path.
MOST_ROWS = 32
DEFAULT_ROWS = "1,2,3,4,8,12"

DESCRIPTION = """\
Time the Q8_0 kernel on every weight shape of DeepSeek-V4-Flash, beside jnp.dot on weights expanded to bf16 and f16.

Times are the profiler's, the weights of a shape take turns so that none is in the cache, and each figure stands beside its
fraction of the bandwidth that a copy reaches in the same run. It takes a few minutes and needs an NVIDIA GPU."""

EXAMPLES = """\
examples:
  ds4jax bench kernels
  ds4jax bench kernels --rows 1,4 --json kernels.json --plot kernels.png"""


def row_counts(word: str) -> tuple[int, ...]:
    """A comma-separated list of row counts, each once, in order."""
    read = cli_options.integer(1, MOST_ROWS, f"a launch takes 1 to {MOST_ROWS} rows")
    return tuple(sorted({read(part) for part in word.split(",")}))


def plot_file(word: str) -> Path:
    """A PNG file that can be written."""
    if not word.endswith(".png"):
        raise argparse.ArgumentTypeError(f"{word}: the picture is a PNG; end the name with .png")
    return cli_options.output_file(word)


def add_parser(commands: Any) -> None:
    """Declare the sub-command and what it can time."""
    parser = commands.add_parser("bench", help="time the kernels on this GPU", description=DESCRIPTION, epilog=EXAMPLES)
    targets = parser.add_subparsers(title="what to time", dest="target", metavar="WHAT", required=True)
    kernels = targets.add_parser("kernels", help="the Q8_0 matmul", description=DESCRIPTION, epilog=EXAMPLES)
    kernels.add_argument("--shapes", choices=("flash",), default="flash", help="whose weight shapes (flash)")
    kernels.add_argument(
        "--rows", type=row_counts, default=DEFAULT_ROWS, metavar="M,...", help=f"rows of activations ({DEFAULT_ROWS})"
    )
    kernels.add_argument("--json", type=cli_options.output_file, metavar="FILE", help="write every sample to this file")
    kernels.add_argument("--plot", type=plot_file, metavar="FILE.png", help="draw a roofline picture; needs matplotlib")
    kernels.set_defaults(run=run_kernels)


def run_kernels(options: argparse.Namespace) -> int:
    """Carry `bench kernels` out; returns 0, or 1 when something could not be measured.

    Raises:
        InputError: there is no GPU, or no matplotlib for the picture.
    """
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot: matplotlib is not installed; pip install matplotlib")
    from ds4jax import runtime
    from ds4jax.bench import environment

    environment.require_gpu()
    runtime.configure()
    from ds4jax.bench import report
    from ds4jax.bench.kernels import Bench
    from pallas_kernels.shapes import FLASH

    start = time.monotonic()

    def note(message: str) -> None:
        if sys.stderr and sys.stderr.isatty():
            print(f"{time.monotonic() - start:6.1f} s  {message}", file=sys.stderr)

    bandwidth = environment.copy_gbps()
    found = Bench(FLASH, options.rows, bandwidth, check_bits=False).run(note)
    content = report.document(environment.describe(), bandwidth, found.rows, found.bits, found.problems)
    report.show(content)
    if options.json:
        report.write(options.json, content)
    if options.plot:
        report.plot(options.plot, content)
    return 1 if found.problems else 0

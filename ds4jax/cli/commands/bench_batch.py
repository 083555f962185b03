"""`ds4jax bench batch`: decode steps of many sequences."""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

from ds4jax.bounds import LAYOUT_NAMES
from ds4jax.cli import options as cli_options
from ds4jax.cli.commands.bench_result import ended, notes
from ds4jax.errors import InputError

DESCRIPTION = """\
Decode several sequences at once with a model of random weights as in `bench decode`. Print the time of a step, the tokens/s of
all sequences, the bytes of weights that a step reads if experts are chosen at random, and the fraction of the bandwidth of a copy
in the same run. With 8 and 32 sequences, also time steps that sample at temperature 1 with top-p 0.95, and profile the kernels.
8 sequences are also timed at a long context. Compare each sequence's tokens and the bits of its logits with those among the most
sequences. A CPU has no kernel times. Exit code 1 if a measurement fails or a bit differs."""

EXAMPLES = """\
examples:
  ds4jax bench batch --synthetic flash-q2 --json batch.json --plot batch.png
  ds4jax bench batch --synthetic flash-q2 --layers 6 --sequences 1,8,32 --long 0
  ds4jax bench batch --synthetic small-q2 --layers 2 --sequences 1,8 --context 64"""


def add_parser(targets: Any) -> None:
    """Declare the target."""
    parser = targets.add_parser("batch", help="decode steps of many sequences", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("--synthetic", choices=LAYOUT_NAMES, required=True, help="the model of the shapes")
    parser.add_argument("--layers", type=cli_options.token_count, metavar="N", help="only the first N layers: a slice")
    parser.add_argument(
        "--sequences",
        type=cli_options.lengths,
        default="1,4,8,16,32",
        metavar="S,...",
        help="numbers of sequences, at most 64 (1,4,8,16,32)",
    )
    parser.add_argument(
        "--context",
        type=cli_options.token_count,
        default=2048,
        metavar="N",
        help="rows in each sequence's cache before the first step (2048)",
    )
    parser.add_argument(
        "--long",
        type=cli_options.position,
        metavar="N",
        help="the same for 8 sequences once more, 0 for none (32768 if the model's context allows it)",
    )
    parser.add_argument(
        "--steps", type=cli_options.token_count, default=64, metavar="N", help="tokens of each sequence in a run (64)"
    )
    parser.add_argument("--json", type=cli_options.output_file, metavar="FILE", help="write the result to this file")
    parser.add_argument("--plot", type=cli_options.plot_file, metavar="FILE.png", help="draw tokens/s; needs matplotlib")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run `bench batch`. Returns 0, or 1 if a measurement failed or a sequence's bits depend on the others.

    Raises:
        InputError: the layers, sequences or contexts do not fit the model, or matplotlib is missing for --plot.
    """
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot: matplotlib is not installed; pip install matplotlib")
    from ds4jax import runtime

    runtime.configure()
    from ds4jax.bench import batch

    chosen = batch.Options(options.synthetic, options.layers, options.sequences, options.context, options.long, options.steps)
    content = batch.bench(chosen, notes())
    if options.plot:
        batch.plot(options.plot, content)
    return ended(options, content, batch.show, batch.good(content))

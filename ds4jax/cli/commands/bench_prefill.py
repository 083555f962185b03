"""`ds4jax bench prefill`: prompts at full shape."""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

from ds4jax.bounds import LAYOUT_NAMES
from ds4jax.cli import options as cli_options
from ds4jax.cli.commands.bench_result import ended, notes
from ds4jax.errors import InputError

DEFAULT_TOKENS = "16,64,256,1024,4096,8192,32768"

DESCRIPTION = """\
Take in prompts of random tokens as an engine does, with a model of random weights as in `bench decode`, and print the time to the
first token by the prompt's length: of a new prompt, and of the same prompt again, whose beginning the prefix cache knows. Next to
it stands the least time: each weight once at the speed of a copy in the same run, or all products at 650 TFLOP/s. Also print the
calls of each prompt and their memory in addition to weights and cache, and for calls of 256 and 4,096 rows the kernels and the
rate of the routed experts' products. A prompt has one token more, which the first step takes in. The figures do not include
compilation. A CPU has no kernel times. Exit code 1 if a measurement fails.

mxfp4-layout is the published checkpoint, whose experts are MXFP4; its 43 layers fit on no single GPU, so give --layers."""

EXAMPLES = """\
examples:
  ds4jax bench prefill --synthetic flash-q2 --json prefill.json --plot prefill.png
  ds4jax bench prefill --synthetic mxfp4-layout --layers 6 --tokens 256,4096
  ds4jax bench prefill --synthetic small-q2 --layers 2 --tokens 16,64"""


def add_parser(targets: Any) -> None:
    """Declare the target."""
    parser = targets.add_parser("prefill", help="prompts at full shape", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("--synthetic", choices=LAYOUT_NAMES, required=True, help="the model of the shapes")
    parser.add_argument("--layers", type=cli_options.token_count, metavar="N", help="only the first N layers: a slice")
    parser.add_argument(
        "--tokens",
        type=cli_options.lengths,
        default=DEFAULT_TOKENS,
        metavar="N,...",
        help=f"lengths of the prompts ({DEFAULT_TOKENS})",
    )
    parser.add_argument(
        "--chunk", type=cli_options.token_count, metavar="N", help="maximum rows of a call (by the device's memory, up to 4096)"
    )
    parser.add_argument("--json", type=cli_options.output_file, metavar="FILE", help="write the result to this file")
    parser.add_argument("--plot", type=cli_options.plot_file, metavar="FILE.png", help="draw the times; needs matplotlib")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run `bench prefill`. Returns 0, or 1 if a measurement failed.

    Raises:
        InputError: the layers or a prompt do not fit, or matplotlib is missing for --plot.
    """
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot: matplotlib is not installed; pip install matplotlib")
    from ds4jax import runtime

    runtime.configure()
    from ds4jax.bench import prefill, prefill_report

    chosen = prefill.Options(options.synthetic, options.layers, options.tokens, options.chunk)
    content = prefill.bench(chosen, notes())
    if options.plot:
        prefill_report.plot(options.plot, content)
    return ended(options, content, prefill_report.show, prefill.good(content))

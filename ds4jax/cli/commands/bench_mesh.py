"""`ds4jax bench mesh`: a model on several devices."""

from __future__ import annotations

import argparse
import importlib.util
from typing import Any

from ds4jax.bounds import LAYOUT_NAMES, MESH_PIECES, WAYS, Integers
from ds4jax.cli import options as cli_options
from ds4jax.cli.commands.bench_result import notes
from ds4jax.errors import InputError

DESCRIPTION = """\
Cut models of random weights as in `bench decode` over several devices, and measure each on all of them, on one, and on the powers
of two between: a gather by its size, decode without and with drafts and at a long context, several sequences, one call of a
prompt, memory of each device, and two processes that share the devices. Every device makes its own part of the weights. Compare
tokens and fingerprints between all numbers of devices and processes, and the cache after a prompt. Exit code 1 if a measurement
fails or is missing, or a bit differs.

A layout that does not fit on one device is measured on several alone. Each model on each number of devices has a process of its
own. The file of --json is written after each figure; with --resume, what it has of the same source, devices and options stays."""

EXAMPLES = """\
examples:
  ds4jax bench mesh --synthetic mxfp4-layout,flash-q2 --json mesh.json --plot mesh.png
  ds4jax bench mesh --synthetic flash-q2 --devices 2 --pieces gathers,plain --limit 120
  ds4jax bench mesh --synthetic small-q2 --layers 2 --context 64 --long 600 --prompt 64 --slots 2 --steps 4"""

_DEVICES = cli_options.integer(Integers(2, None, "this measures at least 2 devices"))
_LINKS = cli_options.integer(Integers(1, 1000, "a chain has 1 to 1000 gathers"))
_SECONDS = cli_options.integer(Integers(1, None, "it must be at least 1 s"))


def add_parser(targets: Any) -> None:
    """Declare the target."""
    parser = targets.add_parser("mesh", help="a model on several devices", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument(
        "--synthetic",
        type=cli_options.names("a layout", LAYOUT_NAMES),
        required=True,
        metavar="LAYOUT,...",
        help=f"the models of the shapes, the most important first: {', '.join(LAYOUT_NAMES)}",
    )
    parser.add_argument("--layers", type=cli_options.token_count, metavar="N", help="only the first N layers: a slice")
    parser.add_argument("--devices", type=_DEVICES, metavar="N", help="the largest number of devices (all)")
    parser.add_argument(
        "--exchange",
        type=cli_options.names("an exchange", WAYS),
        default=WAYS[0],
        metavar="NAME,...",
        help=f"how devices exchange outputs, each measured: {', '.join(WAYS)} ({WAYS[0]})",
    )
    parser.add_argument(
        "--pieces",
        type=cli_options.names("a piece", MESH_PIECES),
        default=",".join(MESH_PIECES),
        metavar="NAME,...",
        help=f"what to measure ({','.join(MESH_PIECES)})",
    )
    _add_sizes(parser)
    parser.add_argument("--limit", type=_SECONDS, metavar="S", help="end a process after so many seconds, and go on (never)")
    parser.add_argument("--seconds", type=_SECONDS, metavar="S", help="end after so many seconds, with what was found (never)")
    parser.add_argument("--json", type=cli_options.output_file, metavar="FILE", help="write the result to this file")
    parser.add_argument("--resume", action="store_true", help="measure only what the file of --json does not have yet")
    parser.add_argument("--plot", type=cli_options.plot_file, metavar="FILE.png", help="draw the figures; needs matplotlib")
    parser.set_defaults(run=run)


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--context",
        type=cli_options.token_count,
        default=2048,
        metavar="N",
        help="rows in the caches before the first step (2048)",
    )
    parser.add_argument(
        "--long", type=cli_options.token_count, default=131_072, metavar="N", help="the same for a long context (131072)"
    )
    parser.add_argument("--slots", type=cli_options.lengths, default="8,32", metavar="S,...", help="numbers of sequences (8,32)")
    parser.add_argument("--prompt", type=cli_options.token_count, default=4096, metavar="N", help="tokens of the prompt (4096)")
    parser.add_argument("--steps", type=cli_options.token_count, default=64, metavar="N", help="tokens of each run (64)")
    parser.add_argument(
        "--acceptance",
        type=cli_options.shares,
        default=(),
        metavar="P,...",
        help="add tokens/s of an MTP block's drafts under this assumed acceptance of each; labelled simulated",
    )
    parser.add_argument(
        "--per-step",
        type=cli_options.counts_per_step,
        default=(0,),
        metavar="N",
        help="add tokens/s of DSpark's drafts if a step commits N tokens; labelled simulated",
    )
    parser.add_argument("--links", type=_LINKS, default=86, metavar="N", help="gathers of a chain (86)")


def run(options: argparse.Namespace) -> int:
    """Run `bench mesh`. Returns 0, or 1 if a measurement failed or is missing, or a bit differs.

    Raises:
        InputError: there are not so many devices, a size does not fit a model, or matplotlib is missing for --plot.
    """
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot: matplotlib is not installed; pip install matplotlib")
    if options.resume and not options.json:
        raise InputError("--resume: give --json FILE, too")
    from ds4jax.bench import mesh, mesh_report, report

    chosen = mesh.Options(
        layouts=options.synthetic,
        layers=options.layers,
        devices=options.devices,
        exchanges=options.exchange,
        pieces=options.pieces,
        context=options.context,
        long_context=options.long,
        slots=options.slots,
        prompt=options.prompt,
        steps=options.steps,
        acceptance=options.acceptance,
        per_step=options.per_step[0],
        links=options.links,
        limit_seconds=options.limit or 0,
        all_seconds=options.seconds or 0,
    )

    def keep(content: dict[str, Any]) -> None:
        if options.json:
            report.write(options.json, content)

    content = mesh.bench(chosen, notes(), keep, before=mesh.earlier(options.json) if options.resume else None)
    keep(content)
    if options.plot:
        mesh_report.plot(options.plot, content)
    mesh_report.show(content)
    return 0 if mesh.good(content) else 1

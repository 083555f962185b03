"""`ds4jax bench costs`: a step at each depth, for automatic depths."""

from __future__ import annotations

import argparse
from typing import Any

from ds4jax.bounds import LAYOUT_NAMES
from ds4jax.cli import options as cli_options
from ds4jax.cli.commands import model as models
from ds4jax.cli.commands.bench_result import ended
from ds4jax.errors import InputError

DESCRIPTION = """\
Time a decode step at each depth from 0 to --max-draft in a model's drafting loop, as --draft auto does before it chooses depths.
A time is the median of the runs, on a CPU the shortest.

With --table, the times become an entry of that table. The package's own table is ds4jax/assets/costs.json. If it has an entry
for the device, the model's sizes and types, the drafter and the maximum, --draft auto takes the times from there and measures
nothing.

With --from, the times come from a result of this command or of `ds4jax bench decode`, with its device and its commit, and nothing
is measured."""

EXAMPLES = """\
examples:
  ds4jax bench costs
  ds4jax bench costs --model model.gguf --drafter ngram --json costs.json
  ds4jax bench costs --from benchmarks/results/nvidia-h200-decode.json --table ds4jax/assets/costs.json"""


def add_parser(targets: Any) -> None:
    """Declare the target."""
    parser = targets.add_parser("costs", help="a step at each depth, for --draft auto", description=DESCRIPTION, epilog=EXAMPLES)
    models.add_options(parser)
    parser.add_argument(
        "--synthetic", choices=LAYOUT_NAMES, help="a model of random weights in these shapes, in place of --model"
    )
    parser.add_argument(
        "--from",
        dest="result",
        type=cli_options.existing_file,
        metavar="RESULT.json",
        help="a result of `bench decode` or `bench costs`",
    )
    parser.add_argument(
        "--max-draft", type=cli_options.draft_count, metavar="K", help="maximum drafts of the loop (the drafter's)"
    )
    models.add_strict(parser)
    parser.add_argument("--runs", type=cli_options.token_count, default=5, metavar="N", help="runs at each depth (5)")
    parser.add_argument(
        "--tokens", type=cli_options.token_count, default=12, metavar="N", help="tokens of a run; 1 for a busy machine (12)"
    )
    parser.add_argument("--json", type=cli_options.output_file, metavar="FILE", help="write the result to this file")
    parser.add_argument("--table", type=cli_options.output_file, metavar="FILE", help="add the times to this table")
    parser.add_argument("--note", default="", metavar="TEXT", help="with --table: words about the machine for the entry")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run `bench costs`. Returns 0.

    Raises:
        InputError: options exclude each other, the model cannot be used, or a file is no result or no table.
    """
    chosen = [name for name in ("model", "synthetic", "result") if getattr(options, name)]
    if len(chosen) > 1:
        raise InputError("--model, --synthetic and --from exclude each other; give one")
    from ds4jax import runtime

    runtime.configure()
    from ds4jax.bench import costs
    from ds4jax.engine import cost_table

    if options.result:
        content = costs.from_result(options.result)
    else:
        if options.synthetic:
            model: Any = costs.random_model(options.synthetic, options.drafter, options.max_draft)
        else:
            model = models.open_model(options)
        name = options.synthetic or model.path.name
        how = {"strict": options.strict, "runs": options.runs, "tokens": options.tokens}
        content = costs.bench(model, name, **how)
    if options.table:
        cost_table.write(options.table, costs.entry(content, options.note))
    return ended(options, content, costs.show)

"""`ds4jax check`: whether drafting changes anything, on this machine and these weights."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ds4jax import cli_options
from ds4jax.commands import model as models

if TYPE_CHECKING:
    from ds4jax.check import Plan, Report, Row
    from ds4jax.language_model import LanguageModel

DESCRIPTION = """\
Test that drafting is lossless: at every depth up to --max-draft, in the default and the strict mode, the same tokens as without
drafts and the same bits of the logits that they were chosen from; and the same of one call made twice. One line a comparison;
exit code 1 when anything differs, 0 when all is equal. The tokens a step say how many drafts stood; with few, little is tested.

Each depth is compared within one compiled program, as calls with other --draft are. A model without an MTP block is compared with
itself. With --json, stdout is one object: equal (the verdict), a list of rows, and device and versions."""

EXAMPLES = """\
examples:
  ds4jax check
  ds4jax check --model model.gguf --long --json
  ds4jax check --prompt-file book.txt --strict"""


def add_parser(commands: Any) -> None:
    """Declare the sub-command."""
    parser = commands.add_parser("check", help="test that drafting changes nothing", description=DESCRIPTION, epilog=EXAMPLES)
    models.add_options(parser)
    parser.add_argument(
        "--prompt-file", type=cli_options.text_file, metavar="FILE", help="a UTF-8 text, the only prompt (held-out text)"
    )
    parser.add_argument(
        "--long", action="store_true", help="prompts of 1, 3, 127, 128, 129 and 500 tokens x 256 new (3, 128 and 500 x 96)"
    )
    parser.add_argument("--strict", action=argparse.BooleanOptionalAction, help="test this mode alone (both)")
    parser.add_argument(
        "--max-draft",
        type=cli_options.draft_count,
        default=cli_options.MOST_DRAFTS,
        metavar="K",
        help=f"the deepest draft ({cli_options.MOST_DRAFTS})",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Carry the command out; returns 0, or 1 when something differs.

    Raises:
        InputError: the model or the prompt cannot be used.
    """
    model = models.open_model(options)
    from ds4jax import check

    if model.config.n_mtp:
        model = model.with_max_draft(options.max_draft)
    prompt = options.prompt_file.decode() if options.prompt_file else None
    plan = check.plan(model, prompt, long=options.long, strict=options.strict)
    if not options.json:
        print(*_head(model, plan), sep="\n", flush=True)
    rows = []
    for row in _shown(check.compare(model, plan), plan.comparisons):
        rows.append(row)
        if not options.json:
            print(row, flush=True)
    report = check.Report(plan, tuple(rows))
    print(json.dumps(_fields(model, report), ensure_ascii=False) if options.json else report.verdict)
    return 0 if report.equal else 1


def _shown(rows: Iterable[Row], total: int) -> Iterator[Row]:
    """The rows, with a bar on stderr where somebody watches."""
    if not (sys.stderr and sys.stderr.isatty()):
        yield from rows
        return
    from rich.console import Console
    from rich.progress import Progress

    # Lines for the same terminal go above the bar; those for a file or a pipe go there.
    redirect = bool(sys.stdout and sys.stdout.isatty())
    with Progress(console=Console(stderr=True), transient=True, redirect_stdout=redirect) as bar:
        yield from bar.track(rows, total=total, description="comparing")


def _head(model: LanguageModel, plan: Plan) -> Iterator[str]:
    import jax

    lengths = ", ".join(str(len(ids)) for ids in plan.prompts)
    name = model.path.name if model.path else "the model"
    yield f"{name} on {jax.devices()[0].device_kind}, prompts of {lengths} tokens ({plan.source}), {plan.new_tokens} new tokens"
    if plan.left_out:
        left_out = ", ".join(map(str, plan.left_out))
        yield f"left out: prompts of {left_out} tokens; the context holds {model.config.max_context}"
    if plan.depths:
        yield f"drafts of 1 to {plan.depths[-1]} a step against none, in one program that can draft {model.max_draft}"
    elif model.config.n_mtp:
        yield "no drafts with --max-draft 0: the same call is made twice, nothing else can be compared"
    else:
        yield "no MTP block in these weights: the same call is made twice, nothing else can be compared"


def _fields(model: LanguageModel, report: Report) -> dict[str, Any]:
    from ds4jax.bench import environment
    from ds4jax.check import fields

    return {
        "equal": report.equal,
        "model": model.path.name if model.path else None,
        **environment.describe(),
        "mtp": bool(model.config.n_mtp),
        "max_draft": model.max_draft,
        "prompts": report.plan.source,
        "new_tokens": report.plan.new_tokens,
        "left_out": report.plan.left_out,
        "rows": [fields(row) for row in report.rows],
    }

"""`ds4jax check`: test that drafting does not change the output, on this machine and with these weights."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ds4jax.bounds import drafts_of
from ds4jax.cli import options as cli_options
from ds4jax.cli import progress
from ds4jax.cli.commands import model as models

if TYPE_CHECKING:
    from ds4jax.evaluation.check import Plan, Report
    from ds4jax.language_model import LanguageModel

DESCRIPTION = """\
Test that drafting is lossless: at every depth up to --max-draft, in the default and the strict mode, the tokens and the bits of
their logits equal those without drafts, and a repeated call gives the same. Prints one line per comparison. Exit code 1 if one
differs, 0 if all are equal. The tokens per step show how many drafts were accepted; with few of them, the test shows little.

All depths are compared in one compiled program, like calls with different --draft. A model without a drafter is compared with
itself. With --json, stdout is one object: equal (the verdict), a list of rows, and device and versions."""

EXAMPLES = """\
examples:
  ds4jax check
  ds4jax check --model model.gguf --long --json
  ds4jax check --drafter ngram --max-draft 4
  ds4jax check --prompt-file book.txt --strict"""


def add_parser(commands: Any) -> None:
    """Declare the sub-command."""
    parser = commands.add_parser("check", help="test that drafting is lossless", description=DESCRIPTION, epilog=EXAMPLES)
    models.add_options(parser)
    parser.add_argument(
        "--prompt-file", type=cli_options.text_file, metavar="FILE", help="a UTF-8 text as the only prompt (the held-out text)"
    )
    parser.add_argument(
        "--long", action="store_true", help="prompts of 1, 3, 127, 128, 129 and 500 tokens x 256 new (3, 128 and 500 x 96)"
    )
    parser.add_argument("--strict", action=argparse.BooleanOptionalAction, help="test only this mode (both)")
    parser.add_argument(
        "--max-draft",
        type=cli_options.draft_count,
        metavar="K",
        help="the maximum number of drafts per step (all that the drafter can make)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns 0, or 1 if a comparison differs.

    Raises:
        InputError: the model or the prompt cannot be used.
    """
    model = models.open_model(options)
    from ds4jax.evaluation import check

    if model.drafter_name != "none":
        most = drafts_of(model.drafter_name, model.config)[1]
        model = model.with_max_draft(most if options.max_draft is None else options.max_draft)
    prompt = options.prompt_file.decode() if options.prompt_file else None
    plan = check.plan(model, prompt, long=options.long, strict=options.strict)
    if not options.json:
        print(*_head(model, plan), sep="\n", flush=True)
    rows = []
    with progress.counting_bar("comparing") as bar:
        for row in check.compare(model, plan):
            rows.append(row)
            if not options.json:
                print(row, flush=True)
            if bar:
                bar(len(rows), plan.comparisons)
    report = check.Report(plan, tuple(rows))
    print(json.dumps(_fields(model, report), ensure_ascii=False) if options.json else report.verdict)
    return 0 if report.equal else 1


def _head(model: LanguageModel, plan: Plan) -> Iterator[str]:
    import jax

    lengths = ", ".join(str(len(ids)) for ids in plan.prompts)
    name = model.path.name if model.path else "the model"
    yield f"{name} on {jax.devices()[0].device_kind}, prompts of {lengths} tokens ({plan.source}), {plan.new_tokens} new tokens"
    if plan.left_out:
        left_out = ", ".join(map(str, plan.left_out))
        yield f"left out: prompts of {left_out} tokens; the context holds {model.config.max_context}"
    if plan.depths:
        drafts = f"drafts of 1 to {plan.depths[-1]} a step by {model.drafter_name}"
        yield f"{drafts} against none, in one program that can draft {model.max_draft}"
    elif model.drafter_name != "none":
        yield "no drafts with --max-draft 0: the same call is made twice, nothing else can be compared"
    else:
        yield "no drafter in these weights: the same call is made twice, nothing else can be compared"


def _fields(model: LanguageModel, report: Report) -> dict[str, Any]:
    from ds4jax.bench import environment
    from ds4jax.evaluation.check import fields

    return {
        "equal": report.equal,
        "model": model.path.name if model.path else None,
        **environment.describe(),
        "drafter": model.drafter_name,
        "max_draft": model.max_draft,
        "prompts": report.plan.source,
        "new_tokens": report.plan.new_tokens,
        "left_out": report.plan.left_out,
        "rows": [fields(row) for row in report.rows],
    }

"""`ds4jax batch`: reply to a file of requests."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import ds4jax
from ds4jax import bounds
from ds4jax.batch import lines as batch_lines
from ds4jax.batch.output import Output
from ds4jax.bounds import SHIPPED
from ds4jax.cli import options as cli_options
from ds4jax.cli import progress
from ds4jax.cli.commands import chat
from ds4jax.cli.commands import model as models
from ds4jax.errors import InputError
from ds4jax.files import same_file

NEW_TOKENS = 128
SLOTS = 8

DESCRIPTION = """\
Reply to all requests of a file, several at once. Each line of IN is a JSON object with one of prompt (a text), messages (a
conversation, a list of objects with role and content) and ids (token ids), and perhaps id, max_new_tokens, temperature, top_k,
top_p, min_p, seed, draft, stop (a text, a token id or a list of them), ignore_eos, logprobs (a number of most likely tokens), and
for messages think and effort. Null is as good as absent. On a CPU, draft needs --draft or --max-draft for the whole file.

Each line of the output is a JSON object for the line of IN at its place: id, text, tokens (a list of ids), fingerprint (a digest
of the logits of all tokens), finish_reason ("stop" or "length"), prompt_tokens (their number), seed (of drawn tokens; a line
without one gets one from its place and content), error (null, or why the line has no reply), request (a digest of the line and
of the options) and, if asked for, logprobs (for each token its id, logprob and top).

A reply does not depend on the other lines: tokens and fingerprint are those of the same request alone with the same options.

The same command goes on with an output that it has begun, and exits with 0 at once if that is complete. An output of other
requests or options is refused."""

EXAMPLES = """\
examples:
  ds4jax batch requests.jsonl --out replies.jsonl
  ds4jax batch requests.jsonl --out replies.jsonl --model model.gguf --slots 8 --context 32768"""


def add_parser(commands: Any) -> None:
    """Declare the sub-command."""
    parser = commands.add_parser("batch", help="reply to a file of requests", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("requests", type=cli_options.existing_file, metavar="IN.jsonl", help="the requests, one a line")
    parser.add_argument(
        "--out", type=cli_options.output_file, required=True, metavar="OUT.jsonl", help="the replies; an unfinished file goes on"
    )
    add_slots(parser, usual=f"({SLOTS})")
    models.add_options(parser)
    models.add_groups(parser)
    models.add_strict(parser)
    models.add_draft(parser)
    parser.add_argument(
        "--chunk",
        type=cli_options.integer(bounds.CHUNK),
        metavar="N",
        help="maximum tokens of the prompt per prefill call, at least 32 (by the device's memory, up to 4096, and 128 on a CPU)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=cli_options.token_count,
        default=NEW_TOKENS,
        metavar="N",
        help=f"maximum number of tokens to add, for lines that do not say ({NEW_TOKENS})",
    )
    parser.add_argument(
        "--prefix-folder", type=Path, metavar="DIR", help="a folder that keeps beginnings of prompts for later runs (none)"
    )
    chat.add_revision(parser)
    parser.set_defaults(run=run)


def add_slots(parser: argparse.ArgumentParser, *, usual: str) -> None:
    """Add --slots and --context."""
    parser.add_argument("--slots", type=cli_options.integer(bounds.SLOTS), metavar="N", help=f"requests that run at once {usual}")
    parser.add_argument(
        "--context", type=cli_options.token_count, metavar="N", help="tokens of each, with its reply (8192, or the model's)"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns 0.

    Raises:
        InputError: a file cannot be used, or the engine does not fit.
    """
    if same_file(options.out, [options.requests]):
        raise InputError(f"--out {options.out}: is the file of requests; give another name")
    lines = batch_lines.read(options.requests, _mode(options))
    with Output(options.out, lines) as output:
        if output.done == len(lines):
            return 0
        with progress.step_bar("replies", len(lines), output.done) as bar:
            _reply(options, lines, output, bar)
    return 0


def _reply(options: argparse.Namespace, lines: list[batch_lines.Line], output: Output, bar: progress.StepBar | None) -> None:
    model = models.open_model(options)
    from ds4jax.batch.run import run as run_batch
    from ds4jax.engine.engine import Engine

    def note(done: int, rate: float) -> None:
        if bar:
            bar.update(done, f"{rate:,.1f} tokens/s")

    shape = {"slots": options.slots or SLOTS, "context": options.context, "chunk": options.chunk, "strict": options.strict}
    with Engine(model, **shape, prefix_folder=options.prefix_folder) as engine:
        usual = {"max_new_tokens": options.max_new_tokens, "draft": options.draft, "revision": options.revision}
        try:
            run_batch(engine, lines[output.done :], output, usual, note)
        except KeyboardInterrupt:
            print(f"ds4jax: {options.out}: {output.done} of {len(lines)} replies; the same command goes on", file=sys.stderr)
            raise
    note(output.done, 0.0)


def _mode(options: argparse.Namespace) -> dict[str, Any]:
    """All options that a reply depends on."""
    path = Path(options.model or SHIPPED)
    names = ("drafter", "dense", "qat", "cache", "strict", "draft", "max_draft", "chunk", "context", "max_new_tokens", "revision")
    return {
        "ds4jax": ds4jax.__version__,
        "model": [path.name, path.stat().st_size if path.is_file() else 0],
        "drafter_file": options.drafter_file.name if options.drafter_file else None,
        "slots": options.slots or SLOTS,
    } | {name: getattr(options, name) for name in names}

"""`ds4jax generate`: continue a prompt, token by token."""

from __future__ import annotations

import argparse
import io
import json
import sys
from typing import TYPE_CHECKING, Any

from ds4jax import cli_options
from ds4jax.commands import model as models
from ds4jax.errors import InputError

if TYPE_CHECKING:
    from ds4jax.generation import Generation, Result
    from ds4jax.tokenizer import Tokenizer

INTERRUPTED = 130

DESCRIPTION = """\
Continue a prompt. The continuation alone goes to stdout as it is made; progress and figures go to stderr.

Ctrl-C ends the text where it is, with exit code 130. With --json, stdout is one object: prompt_tokens (how many), tokens (a list
of ids), text, tokens_per_second, finish_reason: "stop" (the model ended its text), "length" (the limit or the model's context
ended it) or "interrupted", and draft, strict, steps, tokens_per_step, ms_per_step, acceptance (for each depth that was tried, how
often a draft stood when those before it had).

Drafting changes the speed and never what is said: with temperature 0 the same tokens, above it the same distribution."""

EXAMPLES = """\
examples:
  ds4jax generate "In the beginning"
  ds4jax generate "And it came to pass" --max-new-tokens 200 --temperature 0.8 --top-p 0.95 --seed 1
  ds4jax generate "In the beginning" --draft auto --stats
  ds4jax generate --ids prompt.npy --json --stats"""


def add_parser(commands: Any) -> None:
    """Declare the sub-command."""
    parser = commands.add_parser("generate", help="continue a prompt", description=DESCRIPTION, epilog=EXAMPLES)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("prompt", nargs="?", type=cli_options.prompt, metavar="PROMPT", help="the text to continue")
    given.add_argument("--ids", type=cli_options.ids_file, metavar="FILE.npy", help="the prompt as token ids, integers [T]")
    models.add_options(parser)
    models.add_strict(parser)
    models.add_draft(parser)
    parser.add_argument(
        "--max-new-tokens", type=cli_options.token_count, default=128, metavar="N", help="the most tokens to add (128)"
    )
    parser.add_argument(
        "--temperature", type=cli_options.temperature, default=0.0, metavar="T", help="0 takes the most likely token (0)"
    )
    parser.add_argument("--top-k", type=cli_options.top_k, default=0, metavar="K", help="keep the K most likely tokens (0: all)")
    parser.add_argument(
        "--top-p", type=cli_options.top_p, default=1.0, metavar="P", help="keep the likeliest tokens that sum to P (1: all)"
    )
    parser.add_argument(
        "--min-p",
        type=cli_options.min_p,
        default=0.0,
        metavar="P",
        help="keep tokens P times as likely as the first, or more (0)",
    )
    parser.add_argument("--seed", type=cli_options.seed, default=0, metavar="S", help="the same seed draws the same tokens (0)")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the model has ended its text")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    parser.add_argument("--stats", action="store_true", help="print counts, tokens/s and acceptance to stderr at the end")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Carry the command out; returns 0, or 130 after Ctrl-C.

    Raises:
        InputError: the model or the prompt cannot be used.
    """
    model = models.open_model(options, max_draft=models.max_draft(options))
    if model.tokenizer is None and not options.json:
        raise InputError(f"{model.path}: tokenizer: none in these files; give --ids, and --json to get token ids back")
    generation = _start(model, options)
    interrupted = _stream(generation, model.tokenizer, silent=options.json)
    result = generation.result()
    if options.json:
        fields = {
            "prompt_tokens": len(result.prompt_ids),
            "tokens": result.ids,
            "text": result.text,
            "tokens_per_second": round(result.tokens_per_second, 3),
            "finish_reason": result.finish_reason,
            "draft": result.draft,
            "strict": result.strict,
            "steps": result.steps,
            "tokens_per_step": round(result.tokens_per_step, 4),
            "ms_per_step": round(result.ms_per_step, 4),
            "acceptance": [round(share, 4) for share in result.acceptance],
        }
        print(json.dumps(fields, ensure_ascii=False))
    if options.stats:
        print(_stats(result), file=sys.stderr)
    return INTERRUPTED if interrupted else 0


def _stats(result: Result) -> str:
    acceptance = ", ".join(f"{share:.2f}" for share in result.acceptance)
    return (
        f"{len(result.prompt_ids)} prompt tokens, {len(result.ids)} new tokens in {result.seconds:.2f} s, "
        f"{result.tokens_per_second:.1f} tokens/s while decoding, ended by: {result.finish_reason}\n"
        f"draft {result.draft}: {result.tokens_per_step:.2f} tokens a step of {result.ms_per_step:.2f} ms"
        + (f", accepted by depth: {acceptance}" if acceptance else "")
    )


def _start(model: Any, options: argparse.Namespace) -> Generation:
    from ds4jax.sampling import Sampling

    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.min_p, options.seed)
    prompt = options.prompt if options.ids is None else options.ids
    with models.status("reading the prompt"):
        return model.stream(
            prompt,
            max_new_tokens=options.max_new_tokens,
            sampling=sampling,
            ignore_eos=options.ignore_eos,
            strict=options.strict,
            draft=options.draft,
        )


def _stream(generation: Generation, tokenizer: Tokenizer | None, *, silent: bool) -> bool:
    """Run to the end, printing text as it comes unless `silent`; True when Ctrl-C came first."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot show a character must not end the program.
        sys.stdout.reconfigure(errors="replace")
    text = None if silent or tokenizer is None else tokenizer.stream()
    interrupted = False
    chunks = iter(generation)
    try:
        with models.status("finding the first tokens"):
            ids = next(chunks, None)
        while ids:
            if text:
                print(text.push(ids), end="", flush=True)
            ids = next(chunks, None)
    except KeyboardInterrupt:
        interrupted = True
    if text:
        # A terminal gets a line end, so that the shell's own prompt starts a line; a pipe gets the text and nothing else.
        print(text.flush(), end="\n" if sys.stdout and sys.stdout.isatty() else "", flush=True)
    return interrupted

"""`ds4jax generate`: continue a prompt, token by token."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from ds4jax import cli_options, startup
from ds4jax.commands import chat, saved
from ds4jax.commands import model as models
from ds4jax.commands import reply as replies
from ds4jax.errors import InputError

if TYPE_CHECKING:
    from ds4jax.generation import Generation, Result
    from ds4jax.language_model import LanguageModel
    from ds4jax.logprobs import Scored
    from ds4jax.reading import Reading
    from ds4jax.session import Session
    from ds4jax.tokenizer import Tokenizer

INTERRUPTED = 130
NEW_TOKENS = 128

DESCRIPTION = """\
Continue a prompt. The continuation alone goes to stdout as it is made; progress and figures go to stderr.

With --chat the prompt is a user's turn and the reply goes to stdout: on a terminal the reasoning of --think dimmed before the
answer, elsewhere the answer alone.

Ctrl-C ends the text where it is, with exit code 130. With --json, stdout is one object: prompt_tokens (how many), tokens (a list
of ids), text, with --chat reasoning (null without --think) and answer, tokens_per_second, finish_reason: "stop" (the model ended
its text, or --stop did), "length" (the limit or the model's context ended it) or "interrupted", and draft, strict, steps,
tokens_per_step, ms_per_step, acceptance (for each depth that was tried, how often a draft stood when those before it had). tokens
has those of a stop text, text does not.

With --logprobs N, logprobs holds for each token its id, text and logprob, and top, the N best alternatives. They are of the
distribution at temperature 1 without filters, and are computed afterwards by scoring prompt and continuation once more.

With --stats, stderr also says how long the first token took from the start of the process, in parts that add up: import, plan
(headers, and the device's own start), load, compile (tracing, and reading what an earlier run compiled), prefill, decode (the
first step) and other. With --json they are start, in seconds.

--save FILE keeps text and cache, --restore FILE goes on with them: with a prompt, of which what the saved text begins with too is
not computed again; without one from where the text ended, and then figures and --json tell of what was added. The same options as
before, given again, lead to the text that a longer run would have given.

Drafting changes the speed and never what is said: with temperature 0 the same tokens, above it the same distribution."""

EXAMPLES = """\
examples:
  ds4jax generate "In the beginning"
  ds4jax generate "And it came to pass" --max-new-tokens 200 --temperature 0.8 --top-p 0.95 --seed 1
  ds4jax generate "In the beginning" --draft auto --stats
  ds4jax generate - --stop "." --json --logprobs 5 < prompt.txt
  ds4jax generate "Why is the sky blue?" --model model.gguf --chat --think
  ds4jax generate --ids prompt.npy --json --stats
  ds4jax generate --prompt-file book.txt --model model.gguf --chunk 512
  ds4jax generate "In the beginning" --save text.session && ds4jax generate --restore text.session"""


def add_parser(commands: Any) -> None:
    """Declare the sub-command."""
    parser = commands.add_parser("generate", help="continue a prompt", description=DESCRIPTION, epilog=EXAMPLES)
    given = parser.add_mutually_exclusive_group()
    given.add_argument(
        "prompt",
        nargs="?",
        type=cli_options.prompt_or_stdin,
        metavar="PROMPT",
        help="the text to continue, - for stdin",
    )
    given.add_argument("--prompt-file", type=cli_options.text_file, metavar="FILE", help="a UTF-8 text to continue, all of it")
    given.add_argument("--ids", type=cli_options.ids_file, metavar="FILE.npy", help="the prompt as token ids, integers [T]")
    models.add_options(parser)
    models.add_strict(parser)
    models.add_draft(parser)
    models.add_chunk(parser)
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's turn; print the model's reply")
    chat.add_conversation(parser)
    replies.add_sampling(parser, new_tokens=NEW_TOKENS)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    parser.add_argument(
        "--logprobs", type=cli_options.alternatives, metavar="N", help="with --json: log-probabilities, and of the N best tokens"
    )
    parser.add_argument("--stats", action="store_true", help="print counts, tokens/s and acceptance to stderr at the end")
    parser.add_argument(
        "--restore", type=cli_options.session_file, metavar="FILE", help="go on with what --save kept; the prompt may be left out"
    )
    parser.add_argument("--save", type=cli_options.output_file, metavar="FILE", help="keep text and cache, to go on later")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Carry the command out; returns 0, or 130 after Ctrl-C.

    Raises:
        InputError: options that exclude each other, or the model or the prompt cannot be used.
    """
    _check(options)
    model, session, generation = _begin(options)
    startup.begin("decode")
    before = len(generation.ids)
    reading = _reading(model.tokenizer, options)
    if reading:
        reading.skip(generation.ids)
    first_token: dict[str, float] = {}
    interrupted = _stream(generation, reading, first_token, silent=options.json)
    result = generation.result()
    if before:
        prompt_ids, ids = result.prompt_ids + result.ids[:before], result.ids[before:]
        result = dataclasses.replace(result, prompt_ids=prompt_ids, ids=ids, text=reading.text if reading else "")
    if reading and reading.stopped:
        result = dataclasses.replace(result, ids=tuple(reading.ids), text=reading.text, finish_reason="stop")
    if options.json:
        start = {"start": {part: round(seconds, 4) for part, seconds in first_token.items()}} if options.stats else {}
        print(json.dumps(_fields(model, result, reading, options) | start, ensure_ascii=False))
    if options.stats:
        print(_stats(result, first_token), file=sys.stderr)
    if options.save and session:
        if reading:
            # What was not shown is not lost: it comes first when the text goes on.
            generation.unread(len(generation.ids) - before - len(reading.ids))
        with models.status("saving"):
            session.save(options.save)
    return INTERRUPTED if interrupted else 0


def _begin(options: argparse.Namespace) -> tuple[LanguageModel, Session | None, Generation]:
    """The model, the session where one is kept, and the continuation with its prompt read."""
    given, session = _given(options), None
    if options.restore:
        session = saved.restored(options.restore, options)
        model = session.model
    else:
        model = models.open_model(options, max_draft=models.max_draft(options), prompt=None if options.chat else given)
    startup.begin("other")
    if model.tokenizer is None and not (options.json and not isinstance(given, str) and not options.stop):
        raise InputError(f"{model.path}: tokenizer: none in these files; give --ids, and --json to get token ids back")
    prompt = chat.opening(model.tokenizer, given, options) if options.chat and model.tokenizer else given
    startup.begin("prefill")
    with models.reading_bar("reading the prompt") as bar:
        # With figures asked for, the device is waited for at the end of the prompt: what follows is decoding.
        progress = bar or (_nothing if options.stats else None)
        if session and prompt is None:
            return model, session, session.resume()
        if not session and not options.save:
            return model, None, model.stream(prompt, progress=progress, **replies.generation_options(options))
        from ds4jax.session import Session

        session = session or Session(model, **replies.generation_options(options))
        return model, session, session.stream(prompt, progress=progress)


def _check(options: argparse.Namespace) -> None:
    if not options.restore and all(given is None for given in (options.prompt, options.prompt_file, options.ids)):
        raise InputError("nothing to continue; give a PROMPT, --prompt-file, --ids or --restore")
    if options.restore and options.chat:
        raise InputError("--restore goes on with a text; a conversation goes on with `ds4jax chat --session`")
    if options.chat and options.ids is not None:
        raise InputError("--chat renders a text; give one, or a rendered conversation as --ids without --chat")
    if (options.think or options.system) and not options.chat:
        raise InputError(f"{'--think' if options.think else '--system'} is for conversations; give --chat as well")
    if options.logprobs is not None and not options.json:
        raise InputError("--logprobs goes into the object that --json prints; give --json as well")


def _given(options: argparse.Namespace) -> Any:
    """The prompt as text, or token ids [T]."""
    if options.ids is not None:
        return options.ids
    return options.prompt_file.decode() if options.prompt_file else options.prompt


def _reading(tokenizer: Tokenizer | None, options: argparse.Namespace) -> Reading | None:
    from ds4jax.reading import Reading

    return Reading(tokenizer, options.stop, chat=options.chat, think=options.think) if tokenizer else None


def _fields(model: LanguageModel, result: Result, reading: Reading | None, options: argparse.Namespace) -> dict[str, Any]:
    fields: dict[str, Any] = {"prompt_tokens": len(result.prompt_ids), "tokens": result.ids, "text": result.text}
    if options.chat and reading:
        fields |= {"reasoning": reading.reasoning if options.think else None, "answer": reading.answer}
    fields |= {
        "tokens_per_second": round(result.tokens_per_second, 3),
        "finish_reason": result.finish_reason,
        "draft": result.draft,
        "strict": result.strict,
        "steps": result.steps,
        "tokens_per_step": round(result.tokens_per_step, 4),
        "ms_per_step": round(result.ms_per_step, 4),
        "acceptance": [round(share, 4) for share in result.acceptance],
    }
    if options.logprobs is not None:
        from ds4jax.logprobs import score

        with models.status("scoring the continuation"):
            scored = score(model, result.prompt_ids, result.ids, options.logprobs, strict=options.strict)
        fields["logprobs"] = [_logprob_fields(model.tokenizer, token) for token in scored]
    return fields


def _logprob_fields(tokenizer: Tokenizer | None, scored: Scored) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"id": token, "text": tokenizer.decode([token]) if tokenizer else "", "logprob": round(logprob, 6)}

    return entry(scored.id, scored.logprob) | {"top": [entry(*alternative) for alternative in scored.top]}


def _nothing(done: int, total: int) -> None:
    """A watcher of progress who only makes the host wait for it."""


def _stats(result: Result, first_token: dict[str, float]) -> str:
    acceptance = ", ".join(f"{share:.2f}" for share in result.acceptance)
    return (
        f"{len(result.prompt_ids)} prompt tokens, {len(result.ids)} new tokens in {result.seconds:.2f} s, "
        f"{result.tokens_per_second:.1f} tokens/s while decoding, ended by: {result.finish_reason}\n"
        f"draft {result.draft}: {result.tokens_per_step:.2f} tokens a step of {result.ms_per_step:.2f} ms"
        + (f", accepted by depth: {acceptance}" if acceptance else "")
        + (f"\nfirst token after {_parts(first_token)}" if first_token else "")
    )


def _parts(first_token: dict[str, float]) -> str:
    """Seconds from the process's start to the first token: the total and what it is the sum of."""
    parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in first_token.items() if part != "total")
    return f"{first_token['total']:.2f} s: {parts}"


def _stream(generation: Generation, reading: Reading | None, first_token: dict[str, float], *, silent: bool) -> bool:
    """Run to the end or a stop text, printing text as it comes unless `silent`; True when Ctrl-C came first.

    Args:
        first_token: filled with the seconds from the process's start to the first token, in parts.
    """
    screen = None if silent else replies.Screen()
    interrupted = False
    chunks = iter(generation)
    try:
        with models.status("finding the first tokens"):
            ids = next(chunks, None)
        first_token |= startup.current().seconds()
        while ids:
            pieces = list(reading.push(ids)) if reading else []
            if screen:
                screen.show(pieces)
            ids = None if reading and reading.stopped else next(chunks, None)
    except KeyboardInterrupt:
        interrupted = True
    pieces = list(reading.flush()) if reading else []
    if screen:
        screen.show(pieces)
        # A pipe gets the text and nothing else; a terminal a line end, so that the shell's own prompt starts a line.
        screen.end(line=False)
    return interrupted

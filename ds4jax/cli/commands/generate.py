"""`ds4jax generate`: continue a prompt, token by token."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ds4jax import timing as startup
from ds4jax.cli import options as cli_options
from ds4jax.cli import progress
from ds4jax.cli.commands import chat, saved
from ds4jax.cli.commands import model as models
from ds4jax.cli.commands import reply as replies
from ds4jax.errors import InputError

if TYPE_CHECKING:
    from ds4jax.engine.generation import Generation
    from ds4jax.engine.loaded import Loaded
    from ds4jax.engine.options import Result
    from ds4jax.engine.session import Session
    from ds4jax.evaluation.logprobs import Scored
    from ds4jax.text.reply import Piece, Reading
    from ds4jax.text.tokenizer import Tokenizer

INTERRUPTED = 130
NEW_TOKENS = 128

DESCRIPTION = """\
Continue a prompt. Only the continuation goes to stdout, as it is generated; progress and figures go to stderr.

With --chat, the prompt is a user's turn and the reply goes to stdout; --effort and --revision are as for `ds4jax chat`. A
terminal shows the reasoning of --think dimmed before the answer; any other output gets only the answer.

Ctrl-C ends the text, with exit code 130. With --json, stdout is one object: prompt_tokens (their number), tokens (a list of ids),
text, with --chat reasoning (null without --think) and answer, tokens_per_second, finish_reason, fingerprint (a digest of the
logits of all tokens), draft, drafter, strict, steps, tokens_per_step, ms_per_step, tried (for each depth, the drafts whose
earlier drafts were accepted), stood (how many of these were accepted) and acceptance (their shares). With --draft auto, costs
says where the times of a step come from. finish_reason is "stop" (the model's end token or --stop), "length" (the
limit or the model's context) or "interrupted". tokens includes the tokens of a stop text; text does not include it.

With --logprobs N, logprobs holds for each token its id, text and logprob, and top, the N most likely tokens. They are for
temperature 1 without filters. They are computed at the end, by scoring prompt and continuation again.

With --stats, stderr also shows the time from the start of the process to the first token, in parts that add up: import, plan
(headers, and starting the device), load, compile (tracing, and compiling or reading programs from the cache), prefill, decode
(the first step) and other. With --json, start holds these parts in seconds. The time of decoding, and tokens_per_second, contain
neither the prompt nor waiting for programs.

--save FILE saves text and cache; --restore FILE continues them. With a prompt, the start that it shares with the saved text is
not computed again. Without a prompt, the text continues from its end, and figures and --json cover only the added part. The same
options give the text that one longer run would give. The file is written before figures and --json are printed, also if stdout
fails. Text that stdout did not take, or that follows a stop text, comes first when the text is continued.

Drafting changes the speed and never the output: the same tokens at temperature 0, the same distribution above it."""

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
    given.add_argument("--prompt-file", type=cli_options.text_file, metavar="FILE", help="a UTF-8 text file to continue")
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
        "--logprobs",
        type=cli_options.alternatives,
        metavar="N",
        help="with --json: log probabilities and the N best tokens",
    )
    parser.add_argument("--stats", action="store_true", help="print counts, tokens/s and acceptance to stderr at the end")
    parser.add_argument(
        "--restore",
        type=cli_options.session_file,
        metavar="FILE",
        help="continue a saved text; the prompt is optional",
    )
    parser.add_argument("--save", type=cli_options.output_file, metavar="FILE", help="save text and cache, to continue later")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns 0, or 130 after Ctrl-C.

    Raises:
        InputError: options exclude each other, or the model or the prompt cannot be used.
    """
    _check(options)
    model, session, generation = _begin(options)
    startup.begin("decode")
    earlier = generation.result()
    before = len(earlier.ids)
    reading = _reading(model.tokenizer, options)
    first = list(reading.skip(generation.ids, session.unshown if session else "")) if reading else []
    first_token: dict[str, float] = {}
    shown = _stream(generation, reading, first, first_token, silent=options.json)
    result = generation.result()
    if before:
        result = result.since(earlier, reading.text if reading else "")
    if reading and reading.stopped:
        marks = result.fingerprints[: len(reading.ids)]
        result = dataclasses.replace(result, ids=tuple(reading.ids), text=reading.text, finish_reason="stop", fingerprints=marks)
    try:
        # Save first: printing may fail.
        if options.save and session:
            if reading:
                # Text that was not shown is kept; it comes first when the text is continued.
                generation.unread(len(generation.ids) - before - len(reading.ids))
                session.unshown = shown.unshown
            with progress.status("saving"):
                session.save(options.save)
    finally:
        if not shown.failed:
            _tell(model, result, reading, first_token, options)
    if shown.failed:
        raise shown.failed
    return INTERRUPTED if shown.interrupted else 0


def _tell(
    model: Loaded, result: Result, reading: Reading | None, first_token: dict[str, float], options: argparse.Namespace
) -> None:
    """Print the end of the output: the object of --json, a note about a missing answer, and the figures."""
    if options.json:
        start = {"start": {part: round(seconds, 4) for part, seconds in first_token.items()}} if options.stats else {}
        print(json.dumps(_fields(model, result, reading, options) | start, ensure_ascii=False))
    elif reading:
        replies.say_what_is_missing(reading, result.finish_reason)
    if options.stats:
        print(_stats(model, result, first_token), file=sys.stderr)


def _begin(options: argparse.Namespace) -> tuple[Loaded, Session | None, Generation]:
    """The model, the session where one is kept, and the continuation with its prompt read."""
    given, session = _given(options), None
    stream: Callable[..., Generation]
    if options.restore:
        session = saved.restored(options.restore, options)
        model: Loaded = session.model
        stream = session.stream
    else:
        opened = models.open_model(options, prompt=None if options.chat else given)
        model = opened
        begin: Callable[..., Generation] = opened.stream
        stream = functools.partial(begin, **replies.generation_options(options))
    startup.begin("other")
    if model.tokenizer is None and not (options.json and not isinstance(given, str) and not options.stop):
        raise InputError(f"{model.path}: tokenizer: none in these files; give --ids, and --json to get token ids back")
    prompt = chat.opening(model.tokenizer, given, options) if options.chat and model.tokenizer else given
    startup.begin("prefill")
    with progress.reading_bar("reading the prompt") as bar:
        # With figures asked for, the device is waited for at the end of the prompt: what follows is decoding.
        shown = bar or (_nothing if options.stats else None)
        if session and prompt is None:
            return model, session, session.resume()
        if options.save and not session:
            from ds4jax.engine.session import Session

            session = Session(model, **replies.generation_options(options))
            stream = session.stream
        return model, session, stream(prompt, progress=shown)


def _check(options: argparse.Namespace) -> None:
    if not options.restore and all(given is None for given in (options.prompt, options.prompt_file, options.ids)):
        raise InputError("nothing to continue; give a PROMPT, --prompt-file, --ids or --restore")
    if options.restore and options.chat:
        raise InputError("--restore goes on with a text; a conversation goes on with `ds4jax chat --session`")
    if options.chat and options.ids is not None:
        raise InputError("--chat renders a text; give one, or a rendered conversation as --ids without --chat")
    if not options.chat:
        for name in ("think", "system", "effort", "revision"):
            if getattr(options, name):
                raise InputError(f"--{name} is for conversations; give --chat as well")
    chat.check(options)
    if options.logprobs is not None and not options.json:
        raise InputError("--logprobs goes into the object that --json prints; give --json as well")


def _given(options: argparse.Namespace) -> Any:
    """The prompt as text, or token ids [T]."""
    if options.ids is not None:
        return options.ids
    return options.prompt_file.decode() if options.prompt_file else options.prompt


def _reading(tokenizer: Tokenizer | None, options: argparse.Namespace) -> Reading | None:
    from ds4jax.text.reply import Reading

    return Reading(tokenizer, options.stop, chat=options.chat, think=options.think) if tokenizer else None


def _fields(model: Loaded, result: Result, reading: Reading | None, options: argparse.Namespace) -> dict[str, Any]:
    fields: dict[str, Any] = {"prompt_tokens": len(result.prompt_ids), "tokens": result.ids, "text": result.text}
    if options.chat and reading:
        fields |= {"reasoning": reading.reasoning if options.think else None, "answer": reading.answer}
    fields |= {
        "tokens_per_second": round(result.tokens_per_second, 3),
        "finish_reason": result.finish_reason,
        "fingerprint": result.fingerprint,
        "draft": result.draft,
        "drafter": result.drafter,
        "strict": result.strict,
        "steps": result.steps,
        "tokens_per_step": round(result.tokens_per_step, 4),
        "ms_per_step": round(result.ms_per_step, 4),
        "tried": result.tried,
        "stood": result.stood,
        "acceptance": [round(share, 4) for share in result.acceptance],
    }
    if result.draft == "auto":
        fields["costs"] = _costs(model, result)
    if options.logprobs is not None:
        from ds4jax.evaluation.logprobs import score

        with progress.status("scoring the continuation"):
            scored = score(model, result.prompt_ids, result.ids, options.logprobs, strict=options.strict)
        fields["logprobs"] = [_logprob_fields(model.tokenizer, token) for token in scored]
    return fields


def _logprob_fields(tokenizer: Tokenizer | None, scored: Scored) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"id": token, "text": tokenizer.decode([token]) if tokenizer else "", "logprob": round(logprob, 6)}

    return entry(scored.id, scored.logprob) | {"top": [entry(*alternative) for alternative in scored.top]}


def _nothing(done: int, total: int) -> None:
    """A progress function that does nothing; with one, the host waits for the prefill."""


def _costs(model: Loaded, result: Result) -> str:
    """Where automatic depths have the times of a step from."""
    from ds4jax.engine.costs import source

    return source(model, strict=result.strict)


def _stats(model: Loaded, result: Result, first_token: dict[str, float]) -> str:
    drafts = zip(result.stood, result.tried, strict=True)
    accepted = ", ".join(f"{stood} of {tried} ({stood / tried:.2f})" for stood, tried in drafts if tried)
    by = "" if result.drafter == "none" else f" by {result.drafter}"
    return (
        f"{len(result.prompt_ids)} prompt tokens, {len(result.ids)} new tokens in {result.decode_seconds:.2f} s of decoding, "
        f"{result.tokens_per_second:.1f} tokens/s, ended by: {result.finish_reason}\n"
        f"draft {result.draft}{by}: {result.tokens_per_step:.2f} tokens a step of {result.ms_per_step:.2f} ms"
        + (f", accepted by depth: {accepted}" if accepted else "")
        + (f"\ntimes of a step by depth: {_costs(model, result)}" if result.draft == "auto" else "")
        + (f"\nfirst token after {_parts(first_token)}" if first_token else "")
    )


def _parts(first_token: dict[str, float]) -> str:
    """Seconds from the start of the process to the first token: the total and its parts."""
    parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in first_token.items() if part != "total")
    return f"{first_token['total']:.2f} s: {parts}"


@dataclasses.dataclass(frozen=True)
class _Shown:
    """How the output of a text ended.

    Attributes:
        interrupted: whether Ctrl-C ended it.
        failed: the error in printing; None without one.
        unshown: the end of the read tokens' text: the part that could not be printed, and the part after a stop text.
    """

    interrupted: bool
    failed: OSError | None
    unshown: str


def _stream(
    generation: Generation, reading: Reading | None, first: list[Piece], first_token: dict[str, float], *, silent: bool
) -> _Shown:
    """Run to the end or a stop text, printing text as it comes unless `silent`.

    Args:
        first: pieces to show before the first token.
        first_token: filled with the seconds from the start of the process to the first token, in parts.
    """
    screen = None if silent else replies.Screen()
    interrupted, failed = False, None
    try:
        try:
            _show(generation, reading, first, first_token, screen)
        except KeyboardInterrupt:
            interrupted = True
        if screen:
            screen.show(reading.flush() if reading else [])
            # A pipe gets only the text. A terminal also gets a line end, so that the shell's prompt starts a line.
            screen.end(line=False)
    except OSError as error:
        failed = error
    held = list(reading.flush()) if reading else []
    left = "".join(text for kind, text in [*(screen.unshown if screen else []), *(held if failed else [])] if kind == "answer")
    if reading and reading.stopped:
        left += (reading.stop if left else "") + reading.rest
    return _Shown(interrupted, failed, left)


def _show(
    generation: Generation,
    reading: Reading | None,
    first: list[Piece],
    first_token: dict[str, float],
    screen: replies.Screen | None,
) -> None:
    if screen:
        screen.show(first)
    if reading and reading.stopped:
        return
    chunks = iter(generation)
    with progress.status("finding the first tokens"):
        ids = next(chunks, None)
    first_token |= startup.current().seconds()
    while ids:
        pieces = list(reading.push(ids)) if reading else []
        if screen:
            screen.show(pieces)
        ids = None if reading and reading.stopped else next(chunks, None)

"""`ds4jax chat`: talk to the model; the cache stays between turns."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ds4jax.cli import options as cli_options
from ds4jax.cli import progress
from ds4jax.cli.commands import model as models
from ds4jax.cli.commands import reply as replies
from ds4jax.cli.commands import saved
from ds4jax.errors import InputError
from ds4jax.text import efforts

if TYPE_CHECKING:
    from ds4jax.engine.session import Session
    from ds4jax.text.tokenizer import Tokenizer

NEW_TOKENS = 1024
EXIT = "/exit"
_EFFORT_HELP = f"with --think: how much reasoning ({efforts.DEFAULT})"

DESCRIPTION = """\
Talk to the model, one line per turn. The cache stays between turns, so only new tokens are computed. When a conversation outgrows
its cache, it is copied to a larger one; for a moment both are in memory.

Ctrl-C ends a reply; the part shown so far stays in the conversation. A second Ctrl-C ends the program, and so does Ctrl-D or
/exit. With --session, the conversation is read from the file if it exists. The file is rewritten after every reply; it is either
complete or unchanged. It does not keep the sampling options: give them again.

--think asks for reasoning, --effort for more or less of it. The two revisions of V4-Flash ask for it in different words.
--revision names the model's, for files that do not tell.

A terminal shows the reasoning of --think dimmed. If stdin is not a terminal, each line is a turn, and stdout gets only the
answers, each with a line end. The model in the package was not trained on conversations."""

EXAMPLES = """\
examples:
  ds4jax chat --model model.gguf
  ds4jax chat --model model.gguf --think --system "Answer in French." --temperature 0.6 --top-p 0.95
  ds4jax chat --model model.gguf --session talk.session    # run it again to continue
  printf 'Hello\\nAnd now?\\n' | ds4jax chat --max-new-tokens 20
  ds4jax chat --model model.gguf --cache narrow"""


def add_parser(commands: Any) -> None:
    """Declare the sub-command."""
    parser = commands.add_parser("chat", help="talk to the model", description=DESCRIPTION, epilog=EXAMPLES)
    models.add_options(parser)
    models.add_strict(parser)
    models.add_draft(parser)
    models.add_chunk(parser)
    add_conversation(parser)
    replies.add_sampling(parser, new_tokens=NEW_TOKENS)
    parser.add_argument("--stats", action="store_true", help="print counts and tokens/s of every reply to stderr")
    parser.add_argument(
        "--session",
        type=cli_options.output_file,
        metavar="FILE",
        help="continue the conversation in FILE, and save it there",
    )
    parser.set_defaults(run=run)


def add_conversation(parser: argparse.ArgumentParser) -> None:
    """Add --system, --think, --effort and --revision."""
    parser.add_argument("--system", type=cli_options.prompt, metavar="TEXT", help="system text at the start of the conversation")
    parser.add_argument("--think", action="store_true", help="ask for reasoning before the answer")
    parser.add_argument("--effort", choices=[name for name in efforts.NAMES if name != efforts.NO_REASONING], help=_EFFORT_HELP)
    add_revision(parser)


def add_revision(parser: argparse.ArgumentParser) -> None:
    """Add --revision."""
    parser.add_argument(
        "--revision",
        choices=efforts.REVISIONS,
        help="the model's chat format (0731 for weights with a DSpark drafter that are not named otherwise, else preview)",
    )


def check(options: argparse.Namespace) -> None:
    """Raises InputError where the options of `add_conversation` contradict each other."""
    if options.effort and not options.think:
        raise InputError("--effort is for reasoning; give --think as well")


def opening(tokenizer: Tokenizer, text: str, options: argparse.Namespace) -> list[int]:
    """Token ids of the start of a conversation: the text of --system and the first question.

    Raises:
        InputError: the vocabulary has no chat markers.
    """
    from ds4jax.text.encoder import chat_prompt

    messages = [{"role": "system", "content": options.system}] if options.system else []
    prompt = chat_prompt(
        [*messages, {"role": "user", "content": text}],
        tokenizer=tokenizer,
        think=options.think,
        effort=options.effort or efforts.DEFAULT,
        revision=options.revision,
    )
    return list(prompt.ids)


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns 0.

    Raises:
        InputError: the model cannot be used or has no chat markers, or the conversation outgrew its context.
    """
    from ds4jax.text.encoder import follow_up
    from ds4jax.text.tokenizer import END_THINK

    check(options)
    session, tokenizer = _open(options)
    end_think = tokenizer.marker_id(END_THINK)
    ids = list(session.prompt_ids)
    answer_ids = _answered(session, tokenizer, options)
    for text in _turns():
        if ids:
            ids = [*ids[:-1], end_think, *answer_ids, *follow_up(tokenizer, text, think=options.think)]
        else:
            ids = opening(tokenizer, text, options)
        try:
            answer_ids = _answer(session, tokenizer, ids, options)
        except OSError:
            # Also save a reply that could not be shown.
            _save(session, options)
            raise
        _save(session, options)
    return 0


def _open(options: argparse.Namespace) -> tuple[Session, Tokenizer]:
    """The session in the file of --session, or an empty one."""
    from ds4jax.engine.session import Session

    if options.session and options.session.exists():
        for name in ("system", "effort", "revision"):
            if getattr(options, name):
                raise InputError(
                    f"--{name} stands at the beginning of a conversation, and {options.session} holds one; leave it out"
                )
        session = saved.restored(options.session, options)
    else:
        model = models.open_model(options)
        session = Session(model, **replies.generation_options(options))
    if session.model.tokenizer is None:
        raise InputError(f"{session.model.path}: tokenizer: none in these files; a conversation needs one")
    return session, session.model.tokenizer


def _answered(session: Session, tokenizer: Tokenizer, options: argparse.Namespace) -> list[int]:
    """Token ids of the last answer of a saved conversation."""
    from ds4jax.text.reply import Reading
    from ds4jax.text.tokenizer import END_THINK, THINK

    if not session.prompt_ids:
        return []
    last = session.prompt_ids[-1]
    if last not in (tokenizer.marker_id(THINK), tokenizer.marker_id(END_THINK)):
        raise InputError(f"{options.session}: holds a text and no conversation; go on with `ds4jax generate --restore`")
    reading = Reading(tokenizer, chat=True, think=last == tokenizer.marker_id(THINK))
    list(reading.push(session.ids))
    return reading.answer_ids


def _save(session: Session, options: argparse.Namespace) -> None:
    """Save the conversation to the file of --session, if given. An error is printed, and the conversation continues."""
    if not options.session:
        return
    try:
        session.save(options.session)
    except (InputError, OSError) as error:
        print(f"ds4jax: note: this reply is not in the file: {error}", file=sys.stderr)


def _turns() -> Iterator[str]:
    """The user's lines that are not empty."""
    terminal = bool(sys.stdin and sys.stdin.isatty() and sys.stdout and sys.stdout.isatty())
    if terminal:
        print(f"Ctrl-C ends a reply, Ctrl-D or {EXIT} the conversation.")
    lines = _asked() if terminal else iter(sys.stdin or ())
    while True:
        try:
            text = next(lines, EXIT).strip()
        except UnicodeDecodeError as error:
            raise InputError("stdin: not UTF-8; give UTF-8 text") from error
        if text == EXIT:
            return
        if text:
            yield text


def _asked() -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()


def _answer(session: Session, tokenizer: Tokenizer, ids: list[int], options: argparse.Namespace) -> list[int]:
    """Show the reply to a conversation. Returns the token ids of its answer."""
    from ds4jax.text.reply import Reading

    reading = Reading(tokenizer, options.stop, chat=True, think=options.think)
    screen = replies.Screen()
    with replies.first_ctrl_c() as pressed:
        with progress.reading_bar("reading") as bar:
            generation = session.stream(ids, progress=bar)
        try:
            with progress.status("finding the first tokens"):
                chunks = iter(generation)
                new = [] if pressed() else next(chunks, [])
            while new:
                screen.show(reading.push(new))
                new = [] if pressed() or reading.stopped else next(chunks, [])
            screen.show(reading.flush())
            screen.end(line=True)
        finally:
            # Of a reply that ended early, keep only the part that was shown.
            generation.unread(len(generation.ids) - len(reading.ids))
    finish_reason = "stop" if reading.stopped else generation.finish_reason
    replies.say_what_is_missing(reading, finish_reason)
    if options.stats:
        result = generation.result()
        print(
            f"{len(ids)} prompt tokens, {session.reused} of them kept from before, {len(reading.ids)} new tokens, "
            f"{result.tokens_per_second:.1f} tokens/s while decoding",
            file=sys.stderr,
        )
    return reading.answer_ids

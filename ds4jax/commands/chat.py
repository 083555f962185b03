"""`ds4jax chat`: a conversation that keeps its cache."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds4jax import cli_options
from ds4jax.commands import model as models
from ds4jax.commands import reply as replies
from ds4jax.commands import saved
from ds4jax.errors import InputError

if TYPE_CHECKING:
    from ds4jax.session import Session
    from ds4jax.tokenizer import Tokenizer

NEW_TOKENS = 1024
EXIT = "/exit"

DESCRIPTION = """\
Talk to the model, one line a turn. The cache stays between turns: only what is new is computed. When a conversation outgrows its
cache, a larger one is made and the old one copied, so that both are there for a moment.

Ctrl-C ends a reply, which then stands as far as it was shown; a second one ends the program. Ctrl-D or /exit ends it as well.
With --session the conversation is read from the file where there is one, and the file is written anew after every reply, whole or
not at all. How tokens are chosen is not kept there: give these options again.

On a terminal the reasoning of --think is shown dimmed. Where stdin is no terminal, every line of it is a turn, and stdout gets
the answers alone, each with a line end. The shipped model was not trained to converse."""

EXAMPLES = """\
examples:
  ds4jax chat --model model.gguf
  ds4jax chat --model model.gguf --think --system "Answer in French." --temperature 0.6 --top-p 0.95
  ds4jax chat --model model.gguf --session talk.session    # and the same again to go on
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
        help="go on with the conversation in FILE, and keep it there",
    )
    parser.set_defaults(run=run)


def add_conversation(parser: argparse.ArgumentParser) -> None:
    """--system and --think."""
    parser.add_argument("--system", type=cli_options.prompt, metavar="TEXT", help="what the model is told at the beginning")
    parser.add_argument("--think", action="store_true", help="ask for reasoning before the answer")


def opening(tokenizer: Tokenizer, text: str, options: argparse.Namespace) -> list[int]:
    """Token ids of a conversation's beginning: what --system says, and the first question.

    Raises:
        InputError: a vocabulary without the markers of conversations.
    """
    from ds4jax.chat import Turn, encode

    system = [Turn("system", options.system)] if options.system else []
    return encode(tokenizer, [*system, Turn("user", text)], think=options.think)


def run(options: argparse.Namespace) -> int:
    """Carry the command out; returns 0.

    Raises:
        InputError: the model cannot be used or has no markers for conversations, or the conversation outgrew its context.
    """
    from ds4jax.chat import follow_up
    from ds4jax.tokenizer import END_THINK

    session, tokenizer = _open(options)
    end_think = tokenizer.marker_id(END_THINK)
    ids = list(session.prompt_ids)
    answer_ids = _answered(session, tokenizer, options)
    for text in _turns():
        if ids:
            ids = [*ids[:-1], end_think, *answer_ids, *follow_up(tokenizer, text, think=options.think)]
        else:
            ids = opening(tokenizer, text, options)
        answer_ids = _answer(session, tokenizer, ids, options)
        if options.session:
            _save(session, options.session)
    return 0


def _open(options: argparse.Namespace) -> tuple[Session, Tokenizer]:
    """The session of --session's file, or an empty one."""
    from ds4jax.session import Session

    if options.session and options.session.exists():
        if options.system:
            raise InputError(f"--system stands at the beginning of a conversation, and {options.session} holds one; leave it out")
        session = saved.restored(options.session, options)
    else:
        model = models.open_model(options, max_draft=models.max_draft(options))
        session = Session(model, **replies.generation_options(options))
    if session.model.tokenizer is None:
        raise InputError(f"{session.model.path}: tokenizer: none in these files; a conversation needs one")
    return session, session.model.tokenizer


def _answered(session: Session, tokenizer: Tokenizer, options: argparse.Namespace) -> list[int]:
    """The ids of the answer with which a saved conversation ended."""
    from ds4jax.reading import Reading
    from ds4jax.tokenizer import END_THINK, THINK

    if not session.prompt_ids:
        return []
    last = session.prompt_ids[-1]
    if last not in (tokenizer.marker_id(THINK), tokenizer.marker_id(END_THINK)):
        raise InputError(f"{options.session}: holds a text and no conversation; go on with `ds4jax generate --restore`")
    reading = Reading(tokenizer, chat=True, think=last == tokenizer.marker_id(THINK))
    list(reading.push(session.ids))
    return reading.answer_ids


def _save(session: Session, path: Path) -> None:
    """Keep the conversation; one that cannot be kept goes on."""
    try:
        session.save(path)
    except (InputError, OSError) as error:
        print(f"ds4jax: note: this reply is not in the file: {error}", file=sys.stderr)


def _turns() -> Iterator[str]:
    """What the user says, lines with something in them."""
    terminal = bool(sys.stdin and sys.stdin.isatty() and sys.stdout and sys.stdout.isatty())
    if terminal:
        print(f"Ctrl-C ends a reply, Ctrl-D or {EXIT} the conversation.")
    lines = _asked() if terminal else iter(sys.stdin or ())
    while True:
        try:
            text = next(lines, EXIT).strip()
        except UnicodeDecodeError as error:
            raise InputError("stdin: not UTF-8; what is said must be") from error
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
    """Show the reply to a conversation; the ids of its answer."""
    from ds4jax.reading import Reading

    reading = Reading(tokenizer, options.stop, chat=True, think=options.think)
    screen = replies.Screen()
    with replies.first_ctrl_c() as pressed:
        with models.reading_bar("reading") as bar:
            generation = session.stream(ids, progress=bar)
        with models.status("finding the first tokens"):
            chunks = iter(generation)
            new = [] if pressed() else next(chunks, [])
        while new:
            screen.show(reading.push(new))
            new = [] if pressed() or reading.stopped else next(chunks, [])
        screen.show(reading.flush())
        screen.end(line=True)
    # A reply that was ended early stands as far as it was shown.
    generation.unread(len(generation.ids) - len(reading.ids))
    if options.stats:
        result = generation.result()
        print(
            f"{len(ids)} prompt tokens, {session.reused} of them kept from before, {len(reading.ids)} new tokens, "
            f"{result.tokens_per_second:.1f} tokens/s while decoding",
            file=sys.stderr,
        )
    return reading.answer_ids

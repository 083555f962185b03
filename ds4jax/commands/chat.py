"""`ds4jax chat`: a conversation that keeps its cache."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ds4jax import cli_options
from ds4jax.commands import model as models
from ds4jax.commands import reply as replies
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
On a terminal the reasoning of --think is shown dimmed. Where stdin is no terminal, every line of it is a turn, and stdout gets
the answers alone, each with a line end. The shipped model was not trained to converse."""

EXAMPLES = """\
examples:
  ds4jax chat --model model.gguf
  ds4jax chat --model model.gguf --think --system "Answer in French." --temperature 0.6 --top-p 0.95
  printf 'Hello\\nAnd now?\\n' | ds4jax chat --max-new-tokens 20
  ds4jax chat --model model.gguf --cache narrow"""


def add_parser(commands: Any) -> None:
    """Declare the sub-command."""
    parser = commands.add_parser("chat", help="talk to the model", description=DESCRIPTION, epilog=EXAMPLES)
    models.add_options(parser)
    models.add_strict(parser)
    models.add_draft(parser)
    add_conversation(parser)
    replies.add_sampling(parser, new_tokens=NEW_TOKENS)
    parser.add_argument("--stats", action="store_true", help="print counts and tokens/s of every reply to stderr")
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
    model = models.open_model(options, max_draft=models.max_draft(options))
    from ds4jax.chat import follow_up
    from ds4jax.session import Session
    from ds4jax.tokenizer import END_THINK

    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InputError(f"{model.path}: tokenizer: none in these files; a conversation needs one")
    end_think = tokenizer.marker_id(END_THINK)
    session = Session(model, **replies.generation_options(options))
    ids: list[int] = []
    answer_ids: list[int] = []
    for text in _turns():
        if ids:
            ids = [*ids[:-1], end_think, *answer_ids, *follow_up(tokenizer, text, think=options.think)]
        else:
            ids = opening(tokenizer, text, options)
        answer_ids = _answer(session, tokenizer, ids, options)
    return 0


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
        with models.status("reading"):
            generation = session.stream(ids)
            chunks = iter(generation)
            new = [] if pressed() else next(chunks, [])
        while new:
            screen.show(reading.push(new))
            new = [] if pressed() or reading.stopped else next(chunks, [])
        screen.show(reading.flush())
        screen.end(line=True)
    if options.stats:
        result = generation.result()
        print(
            f"{len(ids)} prompt tokens, {session.reused} of them kept from before, {len(reading.ids)} new tokens, "
            f"{result.tokens_per_second:.1f} tokens/s while decoding",
            file=sys.stderr,
        )
    return reading.answer_ids

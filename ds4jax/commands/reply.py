"""What the commands that continue a text have in common: how tokens are chosen, and how replies are shown."""

from __future__ import annotations

import argparse
import contextlib
import io
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ds4jax import cli_options

if TYPE_CHECKING:
    from ds4jax.chat import Piece

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def add_sampling(parser: argparse.ArgumentParser, *, new_tokens: int) -> None:
    """--max-new-tokens, how tokens are chosen, and where a text ends."""
    parser.add_argument(
        "--max-new-tokens",
        type=cli_options.token_count,
        default=new_tokens,
        metavar="N",
        help=f"the most tokens to add ({new_tokens})",
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
    parser.add_argument(
        "--stop",
        type=cli_options.stop_text,
        action="append",
        default=[],
        metavar="TEXT",
        help="end where this text begins, which is not shown; may be given again",
    )


def generation_options(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of `ds4jax.generation.Options` that the command line gave."""
    from ds4jax.sampling import Sampling

    return {
        "max_new_tokens": options.max_new_tokens,
        "sampling": Sampling(options.temperature, options.top_k, options.top_p, options.min_p, options.seed),
        "ignore_eos": options.ignore_eos,
        "strict": options.strict,
        "draft": options.draft,
        "chunk": options.chunk,
    }


class Screen:
    """Shows pieces on stdout as they come: on a terminal reasoning dimmed and answers plain, elsewhere answers alone."""

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A terminal that cannot show a character must not end the program.
            sys.stdout.reconfigure(errors="replace")
        self._terminal = bool(sys.stdout and sys.stdout.isatty())
        self._dimmed = False

    def show(self, pieces: Iterable[Piece]) -> None:
        """Print what there is to print, at once."""
        for kind, text in pieces:
            reasoning = kind == "reasoning"
            if reasoning and not self._terminal:
                continue
            if reasoning != self._dimmed:
                print(DIM if reasoning else f"{PLAIN}\n", end="")
                self._dimmed = reasoning
            print(text, end="", flush=True)

    def end(self, *, line: bool) -> None:
        """Leave dimmed text, and end the line on a terminal or where `line` asks for it."""
        print(PLAIN if self._dimmed else "", end="\n" if line or self._terminal else "", flush=True)
        self._dimmed = False


@contextlib.contextmanager
def first_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C was pressed; pressing it again raises KeyboardInterrupt as ever."""
    pressed = False

    def note(number: int, frame: Any) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)

"""Shared by the commands that continue a text: sampling options, and how replies are shown."""

from __future__ import annotations

import argparse
import contextlib
import io
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ds4jax.cli import options as cli_options

if TYPE_CHECKING:
    from ds4jax.text.reply import Piece, Reading

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def add_sampling(parser: argparse.ArgumentParser, *, new_tokens: int) -> None:
    """Add --max-new-tokens, the sampling options and --stop."""
    parser.add_argument(
        "--max-new-tokens",
        type=cli_options.token_count,
        default=new_tokens,
        metavar="N",
        help=f"maximum number of tokens to add ({new_tokens})",
    )
    parser.add_argument(
        "--temperature", type=cli_options.temperature, default=0.0, metavar="T", help="0 takes the most likely token (0)"
    )
    parser.add_argument("--top-k", type=cli_options.top_k, default=0, metavar="K", help="keep the K most likely tokens (0: all)")
    parser.add_argument(
        "--top-p",
        type=cli_options.top_p,
        default=1.0,
        metavar="P",
        help="keep the most likely tokens that sum to P (1: all)",
    )
    parser.add_argument(
        "--min-p",
        type=cli_options.min_p,
        default=0.0,
        metavar="P",
        help="keep tokens with at least P times the probability of the most likely token (0)",
    )
    parser.add_argument("--seed", type=cli_options.seed, default=0, metavar="S", help="the same seed draws the same tokens (0)")
    parser.add_argument("--ignore-eos", action="store_true", help="continue after the model's end token")
    parser.add_argument(
        "--stop",
        type=cli_options.stop_text,
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text, which is not shown; may be given several times",
    )


def generation_options(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of `ds4jax.engine.options.Options` from the command line."""
    from ds4jax.decode.sampling import Sampling

    return {
        "max_new_tokens": options.max_new_tokens,
        "sampling": Sampling(options.temperature, options.top_k, options.top_p, options.min_p, options.seed),
        "ignore_eos": options.ignore_eos,
        "strict": options.strict,
        "draft": options.draft,
        "chunk": options.chunk,
    }


class Screen:
    """Shows streamed pieces on stdout: a terminal gets reasoning dimmed and answers plain, other outputs get answers only.

    Attributes:
        unshown: pieces that could not be printed.
    """

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A terminal that cannot show a character must not end the program.
            sys.stdout.reconfigure(errors="replace")
        self._terminal = bool(sys.stdout and sys.stdout.isatty())
        self._dimmed = False
        self.unshown: list[Piece] = []

    def show(self, pieces: Iterable[Piece]) -> None:
        """Print the pieces immediately.

        Raises:
            OSError: stdout cannot be written; the remaining pieces are in `unshown`.
        """
        self.unshown += pieces
        while self.unshown:
            self._print(*self.unshown[0])
            del self.unshown[0]

    def _print(self, kind: str, text: str) -> None:
        reasoning = kind == "reasoning"
        if reasoning and not self._terminal:
            return
        if reasoning != self._dimmed:
            print(DIM if reasoning else f"{PLAIN}\n", end="")
            self._dimmed = reasoning
        print(text, end="", flush=True)

    def end(self, *, line: bool) -> None:
        """End dimmed text. End the line on a terminal, or if `line` is true."""
        print(PLAIN if self._dimmed else "", end="\n" if line or self._terminal else "", flush=True)
        self._dimmed = False


def say_what_is_missing(reading: Reading, finish_reason: str) -> None:
    """Print a note on stderr if a reply ended before its answer began: without shown reasoning, the output would be empty."""
    if not reading.reasons or finish_reason == "interrupted":
        return
    tokens = len(reading.ids)
    if finish_reason == "length":
        why = f"the reasoning did not end within {tokens} tokens; allow more with --max-new-tokens"
    else:
        why = f"the reply ended after {tokens} tokens, within its reasoning"
    print(f"ds4jax: note: no answer: {why}", file=sys.stderr)


@contextlib.contextmanager
def first_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C was pressed. A second Ctrl-C raises KeyboardInterrupt as usual."""
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

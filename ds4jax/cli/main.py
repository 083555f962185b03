"""The command `ds4jax`: reads the options, runs one sub-command and returns an exit code.

Exit codes: 0 success; 1 a system error while reading or writing, or a failed test or measurement; 2 an error in the input, with
one line on stderr; 130 Ctrl-C; 141 the output pipe was closed.
"""

from __future__ import annotations

import argparse
import codecs
import difflib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ds4jax import runtime
from ds4jax.cli.commands.version import Version
from ds4jax.cli.options import parsers
from ds4jax.errors import ExchangeError, InputError

EXAMPLES = """\
examples:
  ds4jax generate "In the beginning"
  ds4jax inspect model.gguf
  ds4jax chat --model model.gguf
  ds4jax --version

`ds4jax COMMAND --help` shows the options and examples of a command."""

# Modules of `ds4jax.cli.commands` in the order of --help.
COMMANDS = (
    "generate", "chat", "serve", "batch", "logits", "inspect", "convert", "eval", "vectors", "check", "doctor", "warmup", "train",
    "bench", "completion",
)  # fmt: skip
INTERRUPTED = 130
PIPE_CLOSED = 141


class Parser(argparse.ArgumentParser):
    """An argument parser that prints errors as one line."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Print the message as one line and exit with 2."""
        line = " ".join(message.splitlines())
        self.exit(2, f"ds4jax: error: {line}\n")


def build_parser(names: Sequence[str] = COMMANDS) -> Parser:
    """The parser of the command and its sub-commands. Each sub-command sets `run`, a function of the options.

    Args:
        names: the sub-commands. Only their modules are imported.
    """
    parser = Parser(
        prog="ds4jax",
        description="DeepSeek-V4-Flash inference in JAX. Without --model, every command uses the tiny model in the package.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--version", action=Version, help="print the versions, the device and its kernel path")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name in names:
        importlib.import_module(f"ds4jax.cli.commands.{name}").add_parser(commands)
    # For the completion of shells, which writes down the options of all commands.
    parser.set_defaults(whole=build_parser)
    return parser


def _unknown(words: Sequence[str], parser: Parser) -> str:
    """The message for words that no option takes, with the option that the first one may stand for."""
    options = [option for one in parsers(parser) for option in one._option_string_actions]
    close = difflib.get_close_matches(words[0].partition("=")[0], options, n=1)
    return f"unrecognized arguments: {' '.join(words)}" + (f"; did you mean {close[0]}?" if close else "")


def _speak_utf8() -> None:
    """Read and write UTF-8 if the locale is ASCII, as in many containers."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and codecs.lookup(stream.encoding).name == "ascii":
            stream.reconfigure(encoding="utf-8", errors=stream.errors)


def _drop_stdout() -> None:
    """Discard buffered output, so that the interpreter's flush at exit does not fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line, by default the process's, and return its exit code.

    Raises:
        SystemExit: after --help, --version or a printed error.
    """
    _speak_utf8()
    words = sys.argv[1:] if argv is None else argv
    runtime.process_of_a_command = runtime.process_of_a_command or argv is None
    parser = build_parser([words[0]] if words and words[0] in COMMANDS else COMMANDS)
    try:
        try:
            options, unknown = parser.parse_known_args(words)
            if unknown:
                parser.error(_unknown(unknown, parser))
            code: int = options.run(options)
            return code
        finally:
            if sys.stdout:
                sys.stdout.flush()
    except InputError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _drop_stdout()
        return PIPE_CLOSED
    except ExchangeError as error:
        parser.exit(1, f"ds4jax: error: {error}\n")
    except OSError as error:
        _drop_stdout()
        parser.exit(1, f"ds4jax: error: {error}\n")

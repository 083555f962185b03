"""The command `ds4jax`: reads the options, runs one sub-command, and turns every way it can end into an exit code.

0 is success, 2 something about the input (one line on stderr says what), 1 a failure of the system while writing or reading or a
test or measurement that failed, 130 Ctrl-C, and 141 a reader of the output who left.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ds4jax.commands import bench, chat, check, convert, generate, inspect, logits, vectors, warmup
from ds4jax.commands import eval as evaluation
from ds4jax.commands.version import Version
from ds4jax.errors import InputError

EXAMPLES = """\
examples:
  ds4jax generate "In the beginning"
  ds4jax inspect model.gguf
  ds4jax chat --model model.gguf
  ds4jax --version

`ds4jax COMMAND --help` has the options and examples of each."""

INTERRUPTED = 130
READER_LEFT = 141


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Print one line, whatever the message holds, and exit with 2."""
        line = " ".join(message.splitlines())
        self.exit(2, f"ds4jax: error: {line}\n")


def build_parser() -> Parser:
    """The parser of the command and of its sub-commands; each of these sets `run`, a function of the options."""
    parser = Parser(
        prog="ds4jax",
        description="DeepSeek-V4-Flash inference in JAX. Without --model, every command uses the tiny model that ships inside.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--version", action=Version, help="print versions, the device and the kernel path in use there")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for module in (generate, chat, logits, inspect, convert, evaluation, vectors, check, warmup, bench):
        module.add_parser(commands)
    return parser


def _drop_stdout() -> None:
    """Send what is still buffered nowhere, so that the interpreter's own flush at the end does not fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line, by default the process's own, and return its exit code.

    Raises:
        SystemExit: after --help, --version or an error that has been told.
    """
    parser = build_parser()
    try:
        try:
            options = parser.parse_args(argv)
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
        return READER_LEFT
    except OSError as error:
        _drop_stdout()
        parser.exit(1, f"ds4jax: error: {error}\n")

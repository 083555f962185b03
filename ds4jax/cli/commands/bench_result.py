"""Shared by the benchmarks of the command line: notes while they run, and the result at the end."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any


def notes() -> Callable[[str], None]:
    """A function that prints a note on a terminal's stderr, with the seconds since this call."""
    start = time.monotonic()

    def note(message: str) -> None:
        if sys.stderr and sys.stderr.isatty():
            print(f"{time.monotonic() - start:6.1f} s  {message}", file=sys.stderr)

    return note


def ended(options: argparse.Namespace, content: dict[str, Any], show: Callable[[dict[str, Any]], None], good: bool = True) -> int:
    """Show a result, write it to the file of --json, and return the exit code."""
    from ds4jax.bench import report

    show(content)
    if options.json:
        report.write(options.json, content)
    return 0 if good else 1

"""Progress bars and status lines on stderr. Every command uses these; library functions take a callback and draw nothing.

All of them do nothing when stderr is not a terminal. `pallas_kernels` must not import `ds4jax`, so `pallas_kernels.tuning.tune`
has a small bar of its own.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

# Seconds before a bar that follows a status line is shown.
BAR_AFTER = 2.0

# Called with the work done and the total, in the same unit.
Show = Callable[[int, int], None]


def watched() -> bool:
    """Whether stderr is a terminal."""
    return bool(sys.stderr and sys.stderr.isatty())


@contextlib.contextmanager
def loading_bar(message: str) -> Iterator[Show | None]:
    """Show a progress bar with the rate while bytes are read, after `BAR_AFTER` seconds.

    Yields:
        A function to call with the bytes done and the total; None if stderr is not a terminal.
    """
    if not watched():
        yield None
        return
    from rich.progress import DownloadColumn, TransferSpeedColumn

    with _late_bar(message, DownloadColumn(), TransferSpeedColumn()) as show:
        yield show


@contextlib.contextmanager
def reading_bar(message: str) -> Iterator[Show | None]:
    """Like `loading_bar`, for the tokens of a prompt."""
    if not watched():
        yield None
        return
    from rich.progress import MofNCompleteColumn, ProgressColumn, Task
    from rich.text import Text

    class TokenSpeedColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:,.0f} tokens/s" if task.speed else "")

    with _late_bar(message, MofNCompleteColumn(), TokenSpeedColumn()) as show:
        yield show


@contextlib.contextmanager
def counting_bar(message: str) -> Iterator[Show | None]:
    """Show a progress bar from the start, for a few pieces of work. Lines printed meanwhile appear above it.

    Yields:
        A function to call with the pieces done and the total; None if stderr is not a terminal.
    """
    if not watched():
        yield None
        return
    with _bar() as bar:
        task = bar.add_task(message, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def stages_bar(message: str) -> Iterator[Callable[[str, int, int], None] | None]:
    """Show a progress bar from the start, for bytes that are processed in named stages.

    Args:
        message: the stage shown before the first call.

    Yields:
        A function to call with the stage, the bytes done and the total; None if stderr is not a terminal.
    """
    if not watched():
        yield None
        return
    from rich.progress import DownloadColumn, TransferSpeedColumn

    with _bar(DownloadColumn(), TransferSpeedColumn()) as bar:
        task = bar.add_task(message, total=None)
        yield lambda stage, done, total: bar.update(task, description=stage, completed=done, total=total)


class StepBar:
    """A bar with figures beside it, for the steps of a long run; see `step_bar`."""

    def __init__(self, bar: Progress, message: str, total: int, done: int):
        self._bar = bar
        self._task = bar.add_task(message, total=total, completed=done, figures="compiling")

    def update(self, done: int, figures: str) -> None:
        """Show the steps done and a line of figures."""
        self._bar.update(self._task, completed=done, figures=figures)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(text, markup=False, highlight=False)


@contextlib.contextmanager
def step_bar(message: str, total: int, done: int = 0) -> Iterator[StepBar | None]:
    """Show a progress bar over `total` steps, of which `done` are already complete, and leave it at the end.

    Yields:
        The bar; None if stderr is not a terminal.
    """
    if not watched():
        yield None
        return
    from rich.progress import MofNCompleteColumn, TextColumn

    with _bar(MofNCompleteColumn(), after=(TextColumn("{task.fields[figures]}"),), transient=False) as bar:
        yield StepBar(bar, message, total, done)


@contextlib.contextmanager
def counting_status(message: str, total: int) -> Iterator[Callable[[str], None]]:
    """Like `status`, for `total` pieces of work in sequence.

    Yields:
        A function to call with the name of the next piece.
    """
    begun = 0
    with _status(message) as update:

        def show(name: str) -> None:
            nonlocal begun
            begun += 1
            update(f"{message} {begun} of {total}: {name}")

        yield show


@contextlib.contextmanager
def status(message: str) -> Iterator[None]:
    """Show a status line with a spinner if stderr is a terminal; otherwise do nothing."""
    with _status(message):
        yield


@contextlib.contextmanager
def _status(message: str) -> Iterator[Callable[[str], None]]:
    if not watched():
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True).status(message) as shown:
        yield shown.update


def _bar(*figures: ProgressColumn, after: tuple[ProgressColumn, ...] = (), transient: bool = True) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns: tuple[Any, ...] = (TextColumn("{task.description}"), BarColumn(), *figures, TimeRemainingColumn(), *after)
    # Lines on the same terminal are printed above the bar. A file or a pipe gets its lines directly.
    redirect = bool(sys.stdout and sys.stdout.isatty())
    return Progress(*columns, console=Console(stderr=True), transient=transient, redirect_stdout=redirect)


@contextlib.contextmanager
def _late_bar(message: str, *figures: ProgressColumn) -> Iterator[Show]:
    """A status line, and after `BAR_AFTER` seconds a bar instead."""
    began, bar = time.monotonic(), _bar(*figures)
    waiting = bar.console.status(message)
    task = bar.add_task(message, total=None)

    def show(done: int, total: int) -> None:
        if not bar.live.is_started:
            if time.monotonic() - began < BAR_AFTER or done == total:
                return
            # A console can show one live display at a time.
            waiting.stop()
            bar.start()
        bar.update(task, completed=done, total=total)

    waiting.start()
    try:
        yield show
    finally:
        waiting.stop()
        bar.stop()

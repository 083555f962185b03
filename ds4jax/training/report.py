"""What a run shows while it runs: a progress bar or plain lines, a log of every group of steps, the curve."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ds4jax.training.plot import draw_curve

LOG = "log.jsonl"
CURVE = "loss.png"


def read_log(path: Path) -> list[dict[str, Any]]:
    """Entries of a log, oldest first; none where there is no log yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Report:
    """Tells of a run on stderr and writes its log; a context manager.

    On a terminal it is a bar with the latest figures, elsewhere a line every `seconds`.
    """

    def __init__(self, folder: Path, total: int, done: int, seconds: float):
        self._folder = folder
        # A resumed run writes again what an interrupted one wrote after its last save.
        kept = [entry for entry in read_log(folder / LOG) if entry["step"] <= done]
        (folder / LOG).write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        self._log = (folder / LOG).open("a")
        self._seconds = seconds
        self._said = time.monotonic()
        self._latest: dict[str, float] = {}
        self._total, self._done = total, done
        console = Console(stderr=True)
        self._console = console
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[said]}"),
        )
        self._bar = Progress(*columns, console=console) if console.is_terminal else None
        self._task = self._bar.add_task("training", total=total, completed=done, said="compiling") if self._bar else None

    def __enter__(self) -> Report:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
        self._log.close()

    def say(self, text: str) -> None:
        """Tell one thing at once."""
        if self._bar:
            self._console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def entry(self, step: int, figures: dict[str, float]) -> None:
        """Log figures of a step and show the latest of each name, now and then or when they hold an evaluation."""
        self._log.write(json.dumps({"step": step} | {name: round(value, 6) for name, value in figures.items()}) + "\n")
        self._log.flush()
        self._latest |= figures
        said = self._sentence()
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=step, said=said)
        elif time.monotonic() - self._said >= self._seconds or "validation_bits_per_byte" in figures or step == self._total:
            self.say(f"step {step}/{self._total}  {said}")
            self._said = time.monotonic()

    def _sentence(self) -> str:
        shown = (
            ("loss", "loss {:.3f}"),
            ("train_bits_per_byte", "bits/byte {:.3f}"),
            ("validation_bits_per_byte", "validation {:.4f}"),
            ("validation_agreement", "draft {:.1%}"),
            ("index", "index {:.3f}"),
            ("imbalance", "load {:.2f}"),
            ("gradient", "gradient {:.2f}"),
            ("tokens_per_second", "{:,.0f} tokens/s"),
        )
        return "  ".join(form.format(self._latest[name]) for name, form in shown if name in self._latest)

    def draw(self) -> None:
        """Draw the curve of all that is logged."""
        draw_curve(read_log(self._folder / LOG), self._folder / CURVE)

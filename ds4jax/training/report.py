"""Reports on a training run: a progress bar or plain lines, a log of every group of steps, the loss curve."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from ds4jax.files import replacing
from ds4jax.training.plot import draw_curve

LOG = "log.jsonl"
CURVE = "loss.png"


def read_log(path: Path) -> list[dict[str, Any]]:
    """Entries of a log, oldest first; empty if there is no log yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Bar(Protocol):
    """Draws the progress on a terminal; `ds4jax.cli.progress.step_bar` makes one."""

    def update(self, done: int, figures: str) -> None:
        """Show the steps done and a line of figures."""

    def say(self, text: str) -> None:
        """Print a line."""


class Report:
    """Reports the progress of a run and writes its log; a context manager.

    Args:
        folder: folder of the run; the log is in it.
        total, done: steps of the run, and steps already done.
        seconds: time between two lines on stderr where there is no bar.
        bar: gets the latest figures; None prints lines on stderr.
    """

    def __init__(self, folder: Path, total: int, done: int, seconds: float, bar: Bar | None = None):
        self._folder = folder
        # A resumed run repeats the steps after the last save, so their entries are removed.
        kept = [entry for entry in read_log(folder / LOG) if entry["step"] <= done]
        with replacing(folder / LOG) as unfinished:
            unfinished.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        self._log = (folder / LOG).open("a")
        self._seconds = seconds
        self._last_line = time.monotonic()
        self._latest: dict[str, float] = {}
        self._total, self._bar = total, bar

    def __enter__(self) -> Report:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._log.close()

    def say(self, text: str) -> None:
        """Print a line immediately."""
        if self._bar:
            self._bar.say(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def entry(self, step: int, figures: dict[str, float]) -> None:
        """Log the figures of a step, and show the latest of each name.

        Without a terminal they are shown every `seconds`, at an evaluation and at the last step.
        """
        self._log.write(json.dumps({"step": step} | {name: round(value, 6) for name, value in figures.items()}) + "\n")
        self._log.flush()
        self._latest |= figures
        line = self._line()
        if self._bar:
            self._bar.update(step, line)
        elif time.monotonic() - self._last_line >= self._seconds or "validation_bits_per_byte" in figures or step == self._total:
            self.say(f"step {step}/{self._total}  {line}")
            self._last_line = time.monotonic()

    def _line(self) -> str:
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
        """Draw the loss curve from the log."""
        draw_curve(read_log(self._folder / LOG), self._folder / CURVE)

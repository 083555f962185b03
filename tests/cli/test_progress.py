"""Progress bars: they come after some seconds, say how far the work is, and are for terminals alone."""

from __future__ import annotations

import io
import sys
import time

import pytest

from ds4jax.cli import progress


class Terminal(io.StringIO):
    """Takes what a terminal would show."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("after", [0.0, 60.0])
def test_bar(after: float, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "BAR_AFTER", after)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress.loading_bar("loading the model") as show:
        show(1_000_000_000, 4_000_000_000)
        show(2_000_000_000, 4_000_000_000)
    shown = terminal.getvalue()
    assert "loading the model" in shown
    assert ("/4.0 GB" in shown) == (after == 0)


def test_bar_of_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "BAR_AFTER", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress.reading_bar("reading the prompt") as show:
        for done in (512, 1024, 1536):
            show(done, 4096)
            time.sleep(0.15)
    shown = terminal.getvalue()
    assert "1536/4096" in shown
    assert "tokens/s" in shown


def test_no_bar_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.loading_bar("loading the model") as show:
        assert show is None
    assert capsys.readouterr() == ("", "")


def test_bar_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress.step_bar("training", 300, 100) as bar:
        assert bar
        bar.say("[a line] above the bar")
        bar.update(300, "loss 1.234")
    shown = terminal.getvalue()
    assert "[a line] above the bar" in shown
    assert "100/300" in shown
    assert "300/300" in shown
    assert "loss 1.234" in shown

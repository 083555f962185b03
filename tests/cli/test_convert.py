"""`ds4jax convert` as its users meet it."""

from __future__ import annotations

import contextlib
import io
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from numerics import GOLDEN

from ds4jax import cli
from ds4jax.commands import convert as command
from ds4jax.convert import convert

HUB = GOLDEN / "hub"


def error(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line of a command that refuses its input."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    return err


def test_converts_and_refuses_to_replace(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, same = tmp_path / "golden.gguf", tmp_path / "same.gguf"
    assert cli.main(["convert", str(HUB), str(out), "--dense", "bf16"]) == 0
    assert capsys.readouterr() == ("", f"{out}: 210 tensors, {out.stat().st_size / 1e6:,.1f} MB\n")
    convert(HUB, same, dense="bf16")
    assert out.read_bytes() == same.read_bytes()
    assert "exists already; give --force to replace it" in error(capsys, "convert", HUB, out)
    assert out.read_bytes() == same.read_bytes()
    assert cli.main(["convert", str(HUB), str(out), "--force"]) == 0
    assert out.stat().st_size < same.stat().st_size
    capsys.readouterr()
    assert cli.main(["inspect", str(out), "--json"]) == 0
    assert '"MXFP4": {"count": 21' in capsys.readouterr().out


def test_ctrl_c_and_what_is_left(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, whole = tmp_path / "golden.gguf", tmp_path / "whole.gguf"
    convert(HUB, whole)

    def stop(stage: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(command, "_bar", lambda: contextlib.nullcontext(stop))
        assert cli.main(["convert", str(HUB), str(out)]) == cli.INTERRUPTED
    assert not out.exists()
    for arguments in (["inspect", f"{out}.partial"], ["generate", "a", "--model", f"{out}.partial"]):
        message = error(capsys, *arguments)
        assert f"{out}.partial: an unfinished conversion, not a model; the same `ds4jax convert HUB_DIR golden.gguf`" in message
    assert "began from other files or with another --dense" in error(capsys, "convert", HUB, out, "--dense", "f32")
    assert cli.main(["convert", str(HUB), str(out)]) == 0
    assert out.read_bytes() == whole.read_bytes()


def test_kill_9_at_any_moment(tmp_path: Path) -> None:
    """As soon as something is there, the command is killed; what it has reached by then is chance."""
    out = tmp_path / "golden.gguf"
    partial = tmp_path / "golden.gguf.partial"
    line = [sys.executable, "-m", "ds4jax", "convert", str(HUB), str(out)]
    running = subprocess.Popen(line, stderr=subprocess.PIPE)
    while not partial.exists() and running.poll() is None:
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    # It may have been quicker than the signal.
    assert out.exists() != partial.exists()
    if not out.exists():
        subprocess.run(line, check=True, capture_output=True)
    convert(HUB, tmp_path / "whole.gguf")
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["none", "out.gguf"], "none: no such file or directory"),
        (["hub", "none/out.gguf"], "none/out.gguf: cannot be written"),
        (["hub", "hub"], "hub: exists and is not a file"),
        (["hub", "out.gguf", "--dense", "f16"], "argument --dense: invalid choice: 'f16'"),
        (["empty", "out.gguf"], "not a directory; give a checkpoint directory"),
    ],
)
def test_refuses(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").touch()
    (tmp_path / "hub").symlink_to(HUB)
    assert says in error(capsys, "convert", *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "hub"]


def test_no_room(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert f"{tmp_path}: free space: the conversion needs " in error(capsys, "convert", HUB, tmp_path / "out.gguf")


def test_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    assert cli.main(["convert", str(HUB), str(tmp_path / "out.gguf")]) == 0
    shown = screen.getvalue()
    assert "converting" in shown
    assert shown.endswith(" MB\n")

"""A file is there whole or not at all, and only regular files are read."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from numerics import GOLDEN

from ds4jax import files
from ds4jax.cli import main as cli
from ds4jax.engine import session_file
from ds4jax.errors import InputError
from ds4jax.evaluation import vectors
from ds4jax.files import open_regular, read_regular, replacing, same_file
from ds4jax.loading import open_checkpoint
from ds4jax.training.data import read_corpus

HUB = GOLDEN / "hub"
SHARD = "model-00002-of-00003.safetensors"
NOT_REGULAR = r"a pipe \(FIFO\), not a regular file"


@pytest.fixture
def at_once() -> Iterator[None]:
    """Whoever waits at a pipe is interrupted."""

    def late(number: int, frame: types.FrameType | None) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_the_file_changes_at_once(tmp_path):
    path = tmp_path / "kept"
    path.write_text("old")
    with replacing(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "kept"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as unfinished:
            unfinished.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_writers_at_once_do_not_meet(tmp_path):
    """Two threads and a reader: each file is whole, and nothing is left beside the last."""
    path, texts = tmp_path / "kept", ["a" * 100_000, "b" * 100_000]
    path.write_text(texts[0])
    failed: list[BaseException] = []

    def write(text: str) -> None:
        try:
            for _ in range(20):
                with replacing(path) as unfinished, unfinished.open("w") as file:
                    file.write(text[:50_000])
                    file.flush()
                    file.write(text[50_000:])
        except BaseException as error:
            failed.append(error)

    writers = [threading.Thread(target=write, args=(text,)) for text in texts]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert path.read_text() in texts
    assert failed == []
    assert path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]


def test_containers_with_equal_numbers_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)
    monkeypatch.setattr(threading, "get_native_id", lambda: 7)
    path = tmp_path / "kept"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path):
    path = tmp_path / "kept"
    left, of_another = files.temporary_name(path), files.temporary_name(tmp_path / "kept.too")
    left.touch()
    of_another.touch()
    # Its name says nothing about whether its process lives: a number of another container may be anybody's here.
    with replacing(path) as held, replacing(path) as unfinished:
        assert not left.exists()
        assert held.exists()
        unfinished.write_text("text")
    assert sorted(tmp_path.iterdir()) == sorted([of_another, path])


def test_a_file_that_is_taken_for_abandoned_before_it_is_locked(tmp_path, monkeypatch):
    path, lock = tmp_path / "kept", files.fcntl.flock
    removed = []

    def late(descriptor: int, operation: int) -> None:
        if not removed:
            removed.extend(tmp_path.iterdir())
            removed[0].unlink()
        lock(descriptor, operation)

    monkeypatch.setattr(files.fcntl, "flock", late)
    with replacing(path) as unfinished:
        assert unfinished not in removed
        unfinished.write_text("text")
    assert path.read_text() == "text"


def test_only_regular_files_are_opened(tmp_path: Path, at_once: None) -> None:
    text, link, pipe, door = (tmp_path / name for name in ("text", "link", "pipe", "door"))
    text.write_bytes(b"words")
    link.symlink_to(text)
    os.mkfifo(pipe)
    assert read_regular(text) == read_regular(link) == b"words"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(door))
        for path, says in (
            (pipe, "a pipe (FIFO), not a regular file"),
            (Path("/dev/zero"), "a device, not a regular file"),
            (door, "a socket, not a regular file"),
            (tmp_path, "Is a directory"),
            (tmp_path / "none", "No such file or directory"),
            (Path("a\0b"), "no file has such a name"),
        ):
            with pytest.raises(OSError, match=re.escape(f"] {says}: ")):
                open_regular(path)


def test_a_file_that_is_exchanged_for_a_pipe(tmp_path: Path, at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, text = tmp_path / "pipe", tmp_path / "text"
    text.touch()
    os.mkfifo(pipe)
    regular = os.stat(text)
    monkeypatch.setattr(os, "stat", lambda path: regular)
    with pytest.raises(OSError, match=r"a pipe \(FIFO\)"):
        open_regular(pipe)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", SHARD, "tokenizer.json"])
def test_a_pipe_in_a_checkpoint_directory(name: str, tmp_path: Path, at_once: None) -> None:
    hub = Path(shutil.copytree(HUB, tmp_path / "hub"))
    (hub / name).unlink(missing_ok=True)
    os.mkfifo(hub / name)
    with pytest.raises(InputError, match=f"{name}: cannot be read.*{NOT_REGULAR}"):
        open_checkpoint(hub)


def test_a_shard_that_becomes_a_pipe_after_opening(tmp_path: Path, at_once: None) -> None:
    hub = Path(shutil.copytree(HUB, tmp_path / "hub"))
    tensor = open_checkpoint(hub).tensors[0]
    for shard in hub.glob("*.safetensors"):
        shard.unlink()
        os.mkfifo(shard)
    with pytest.raises(InputError, match=NOT_REGULAR):
        tensor.read()


def test_a_link_to_nothing_is_not_a_missing_tokenizer(tmp_path: Path) -> None:
    hub = Path(shutil.copytree(HUB, tmp_path / "hub"))
    (hub / "tokenizer.json").symlink_to("blobs/none")
    with pytest.raises(InputError, match=r"tokenizer\.json: cannot be read: No such file"):
        open_checkpoint(hub)


def test_a_pipe_as_any_other_file(tmp_path: Path, at_once: None, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tmp_path / "official.vec"
    os.mkfifo(pipe)
    (tmp_path / "prompts").mkdir()
    with pytest.raises(InputError, match=NOT_REGULAR), session_file.opened(pipe):
        pass
    for call in (open_checkpoint, lambda path: vectors.read(path.parent), lambda path: read_corpus(path, 1, 0)):
        with pytest.raises(InputError, match=NOT_REGULAR):
            call(pipe)
    for line in ("generate --prompt-file", "generate --ids", "generate --restore", "eval --text", "inspect"):
        with pytest.raises(SystemExit) as ended:
            cli.main([*line.split(), str(pipe)])
        out, err = capsys.readouterr()
        assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
        assert "a pipe (FIFO), not a regular file" in err
    with pytest.raises(SystemExit):
        cli.main(["generate", "--prompt-file", "/dev/zero"])
    assert "/dev/zero: a device, not a regular file" in capsys.readouterr().err


def test_same_file(tmp_path: Path) -> None:
    first, second, link, hard = (tmp_path / name for name in ("first", "second", "link", "hard"))
    first.write_text("1")
    second.write_text("1")
    link.symlink_to(first)
    os.link(first, hard)
    for name in (first, link, hard, tmp_path / "." / "first"):
        assert same_file(name, (second, tmp_path / "none", first)) == first
    assert same_file(second, (first, link, hard)) is None
    assert same_file(tmp_path / "none", (first, tmp_path / "none")) is None

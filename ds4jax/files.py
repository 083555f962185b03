"""Read regular files only, and write files atomically."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

# Kinds of paths that are not regular files.
_KINDS = {
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading, without waiting. Opens every file that a user or a checkpoint names.

    Reading a pipe would wait for a writer, and some devices never end.

    Raises:
        OSError: no such file, no permission, or not a regular file; `strerror` says which.
    """
    try:
        # Before opening, which has effects on some devices; and after, since another process may have replaced the file.
        _require_regular(os.stat(path), path)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:
        raise OSError(errno.EINVAL, "no file has such a name", str(path)) from None
    stream = open(descriptor, "rb")
    try:
        _require_regular(os.fstat(descriptor), path)
    except OSError:
        stream.close()
        raise
    return stream


def read_regular(path: str | Path) -> bytes:
    """All bytes of a file; errors as for `open_regular`."""
    with open_regular(path) as stream:
        return stream.read()


def _require_regular(status: os.stat_result, path: str | Path) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise OSError(errno.EINVAL, f"{kind}, not a regular file", str(path))


def same_file(path: Path, others: Iterable[Path]) -> Path | None:
    """The first of `others` that is the same file as `path`, also by a link; None if none is."""
    with contextlib.suppress(OSError):
        mine = os.stat(path)
        for other in others:
            with contextlib.suppress(OSError):
                if os.path.samestat(mine, os.stat(other)):
                    return other
    return None


def temporary_name(path: Path) -> Path:
    """A new name in the folder of `path`, for a file that is renamed to `path` when it is complete.

    The name holds process and thread, to show a person the writer. Processes of two containers may have equal numbers, so it also
    holds a random part.
    """
    return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}-{secrets.token_hex(4)}.unfinished")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield an empty temporary file; on leaving it is renamed to `path` in one step.

    After an error `path` is unchanged and the temporary file is removed. Temporary files of killed processes are removed too.
    """
    _remove_abandoned(path)
    unfinished, lock = _begun(path)
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        os.close(lock)


def _begun(path: Path) -> tuple[Path, int]:
    """An empty temporary file and its open descriptor, locked until the descriptor is closed."""
    while True:
        unfinished = temporary_name(path)
        lock = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        # Without file locks, files of killed processes stay: they look like files that are being written.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        # Another process may have removed the file before it was locked.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), unfinished.stat()):
                return unfinished, lock
        os.close(lock)


def _remove_abandoned(path: Path) -> None:
    """Remove the unlocked temporary files of `path`: their processes have ended, on any machine."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"\d+-\d+-[0-9a-f]{8}\.unfinished")
    with contextlib.suppress(OSError):
        for other in path.absolute().parent.iterdir():
            if pattern.fullmatch(other.name):
                remove_unlocked(other)


def remove_unlocked(path: Path) -> None:
    """Remove a temporary file of `replacing` that no process writes any more."""
    with contextlib.suppress(OSError), path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()

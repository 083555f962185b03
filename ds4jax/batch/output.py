"""The output of a batch: one line for each of the input, in its order; a batch that was killed goes on at the next line."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds4jax.batch.lines import Line
from ds4jax.errors import InputError
from ds4jax.files import open_regular


class Output:
    """An output file, open for appending. No other process can write it meanwhile.

    Attributes:
        done: number of lines that it has.
    """

    def __init__(self, path: Path, lines: Sequence[Line]):
        """Open a file, or make one, and drop a last line that is not complete.

        Raises:
            InputError: the file holds replies to other lines or with other options, is being written, or cannot be written.
        """
        try:
            self._path, self._new = path, not path.exists()
            self._stream = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
            open_regular(path).close()
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}") from error
        try:
            self._lock(path)
            self.done = self._kept(path, lines)
        except BaseException:
            self._stream.close()
            raise
        if self._new:
            _sync_folder(path)

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        os.fsync(self._stream.fileno())
        # A run that failed before its first reply leaves nothing behind.
        if kind and self._new and not os.fstat(self._stream.fileno()).st_size:
            self._path.unlink(missing_ok=True)
        self._stream.close()

    def write(self, record: dict[str, Any]) -> None:
        """Append a line.

        Raises:
            OSError: the disk is full. What was written of the line is dropped the next time.
        """
        self._stream.write(json.dumps(record, ensure_ascii=False).encode(errors="replace") + b"\n")
        self._stream.flush()
        self.done += 1

    def _lock(self, path: Path) -> None:
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path}: another batch writes this file; give another --out") from None
        except OSError:
            # A file system without locks.
            pass

    def _kept(self, path: Path, lines: Sequence[Line]) -> int:
        """Check the complete lines and count them; the file ends after them, and the next line goes there."""
        held = self._stream.read().split(b"\n")
        size = done = 0
        for i, raw in enumerate(held[:-1]):
            if i >= len(lines):
                raise InputError(f"{path}: line {i + 1}: the input has only {len(lines)} requests; give another --out")
            record = _record(raw)
            if record is None and i == len(held) - 2:
                # A machine that lost power may have kept a line's length, but not its bytes.
                break
            wanted = lines[i].id, lines[i].request
            if record is None or (record.get("id"), record.get("request")) != wanted:
                what = "no reply" if record is None else "a reply to another request or with other options"
                raise InputError(f"{path}: line {i + 1}: {what}; give another --out, or remove the file")
            size, done = size + len(raw) + 1, i + 1
        self._stream.truncate(size)
        self._stream.seek(size)
        return done


def _record(raw: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path.absolute().parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

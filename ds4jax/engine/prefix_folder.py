"""The prefix cache's folder: a file for each state, with a digest of all its bytes. It may be deleted any time.

A file is written under another name, synced and renamed, so a process that is killed loses nothing but the state that it was
writing. A file that is not what its name says is put aside. No error of the folder reaches a request.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ds4jax.engine import session_file
from ds4jax.engine.chunk_state import ChunkState
from ds4jax.errors import InputError
from ds4jax.files import remove_unlocked

KIND, SUFFIX, BAD = "ds4jax prefix", ".prefix", "bad"
# States that wait to be written; more are not kept.
QUEUED = 16
# Files that were put aside and are not deleted yet.
KEPT_BAD = 8


class PrefixFolder:
    """States in a folder, the least recently used ones deleted."""

    def __init__(self, folder: Path, *, identity: str, likes: Sequence[ChunkState], maximum: int):
        """Use a folder, which is made if it does not exist, and start the thread that writes.

        Args:
            identity: a digest of all that the states depend on, besides tokens: weights, versions, device, options.
            likes: shapes and types of a state, of each width of a call.
            maximum: bytes of all files.

        Raises:
            InputError: the folder cannot be made.
        """
        self._folder, self._identity, self._maximum = folder, identity, maximum
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder}: cannot be made ({error.strerror}); give another prefix folder") from error
        for left in folder.glob(f".*{SUFFIX}.*.unfinished"):
            remove_unlocked(left)
        leaves, self._structure = jax.tree_util.tree_flatten_with_path(likes[0])
        self._names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
        self._forms = [[(leaf.shape, np.dtype(leaf.dtype)) for leaf in jax.tree.leaves(like)] for like in likes]
        self._queue: queue.Queue[tuple[str, ChunkState] | None] = queue.Queue(QUEUED)
        self._thread = threading.Thread(target=self._write_all, name="ds4jax prefix folder", daemon=True)
        self._thread.start()

    def get(self, key: str) -> ChunkState | None:
        """Read the state of a key; None if there is none, or if its file is not good."""
        path = self._path(key)
        try:
            if not path.exists():
                return None
            state = self._read(path, key)
            os.utime(path)
        except OSError:
            return None
        except Exception:
            # Whatever is wrong with the file, the state can be computed.
            self._put_aside(path)
            return None
        return state

    def put(self, key: str, state: ChunkState) -> None:
        """Write a state soon; not if too many wait, or if it is there."""
        if not self._path(key).exists():
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait((key, state))

    def close(self) -> None:
        """Write what waits."""
        self._queue.put(None)
        self._thread.join()

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(f"{self._identity} {key}".encode()).hexdigest()
        return self._folder / f"{name}{SUFFIX}"

    def _read(self, path: Path, key: str) -> ChunkState:
        with session_file.opened(path, KIND) as file:
            if (file.fields.get("identity"), file.fields.get("key")) != (self._identity, key):
                raise InputError(f"{path}: key: of another state")
            tensors = [file.tensors.get(name) for name in self._names]
            if [(one.shape, one.dtype) if one else None for one in tensors] not in self._forms:
                raise InputError(f"{path}: of other shapes")
            file.check_bytes()
            arrays = [file.read(name) for name in self._names]
        state: ChunkState = jax.tree.unflatten(self._structure, arrays)
        return state

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            with contextlib.suppress(Exception):
                self._write(*item)

    def _write(self, key: str, state: ChunkState) -> None:
        arrays = dict(zip(self._names, jax.tree.leaves(state), strict=True))
        self._make_room(state.nbytes)
        listed: list[Any] = [(name, array, lambda array=array: array) for name, array in arrays.items()]
        session_file.write(self._path(key), {"identity": self._identity, "key": key}, listed, KIND)
        # The name must survive a power failure, too.
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _make_room(self, needed: int) -> None:
        """Delete the least recently used files until `needed` bytes fit. Other processes may delete some, too."""
        files = []
        for path in self._folder.glob(f"*{SUFFIX}"):
            with contextlib.suppress(OSError):
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in files) + needed
        for _, size, path in sorted(files):
            if total <= self._maximum:
                return
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size

    def _put_aside(self, path: Path) -> None:
        """Keep a file that is not good for a person to look at, and never read it again."""
        bad = self._folder / BAD
        with contextlib.suppress(OSError):
            bad.mkdir(exist_ok=True)
            os.replace(path, bad / path.name)
            for old in sorted(bad.iterdir(), key=lambda one: one.stat().st_mtime_ns)[:-KEPT_BAD]:
                old.unlink()

"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def beside(path: Path) -> Path:
    """A name of this process's own in the folder of `path`, for what is renamed to `path` when it is complete."""
    return path.with_name(f".{path.name}.{os.getpid()}.unfinished")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to; on leaving it becomes `path` at once.

    After an error `path` is as it was before, and nothing is left beside it.
    """
    unfinished = beside(path)
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()

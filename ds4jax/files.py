"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
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


def remove_abandoned(path: Path) -> None:
    """Remove what processes that were killed while they wrote `path` left beside it; a living one's file stays."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"(\d+)\.unfinished")
    with contextlib.suppress(OSError):
        for other in path.absolute().parent.iterdir():
            found = pattern.fullmatch(other.name)
            if found and (int(found[1]) == os.getpid() or not _lives(int(found[1]))):
                other.unlink()


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True

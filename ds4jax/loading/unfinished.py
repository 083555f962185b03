"""Recognise a file that `ds4jax convert` has not finished."""

from __future__ import annotations

from pathlib import Path

from ds4jax.errors import InputError

# In place of the GGUF magic until the file is complete, so that no program reads it as a model.
MAGIC = b"part"
SUFFIX = ".partial"


def require_finished(path: Path, magic: bytes) -> None:
    """Refuse a file with the magic or the name of an unfinished conversion.

    Raises:
        InputError: it is one; the message says how to resume.
    """
    if magic == MAGIC or path.suffix == SUFFIX:
        raise InputError(f"{path}: an unfinished conversion, not a model; the same `ds4jax convert` again goes on with it")

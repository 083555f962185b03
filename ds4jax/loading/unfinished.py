"""How a file that `ds4jax convert` has not finished is told from a model."""

from __future__ import annotations

from pathlib import Path

from ds4jax.errors import InputError

# Stands where a GGUF file has its magic until the last byte is written, so that no program takes the file for a model.
MAGIC = b"part"
SUFFIX = ".partial"


def require_finished(path: Path, magic: bytes) -> None:
    """Refuse a file that begins like an unfinished conversion, under whatever name, or that is named like one.

    Raises:
        InputError: it is one; says how to go on.
    """
    if magic == MAGIC or path.suffix == SUFFIX:
        out = path.name.removesuffix(SUFFIX)
        raise InputError(
            f"{path}: an unfinished conversion, not a model; the same `ds4jax convert HUB_DIR {out}` again goes on with it"
        )

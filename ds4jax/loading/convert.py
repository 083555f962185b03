"""Convert a checkpoint directory or a GGUF file to GGUF files."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from ds4jax.errors import InputError
from ds4jax.loading.convert_gguf import plan_gguf
from ds4jax.loading.convert_hub import plan_hub
from ds4jax.loading.convert_to_hub import plan_to_hub
from ds4jax.loading.convert_write import Plan, Progress, require_free, write


def plan(
    source: Path,
    out: Path,
    *,
    flavour: str | None = None,
    dense: str | None = None,
    requantise: str | None = None,
    drafter: Path | None = None,
) -> Plan:
    """Read all headers of a model's files and lay out the GGUF files that they become.

    Args:
        flavour: "mainline" or "antirez", as for `plan_hub` and `plan_gguf`, or "hub", as for `plan_to_hub`, where `out` is a
            folder; None is mainline for a checkpoint directory, and the file's own for a GGUF file.
        dense: of a checkpoint directory, as for `plan_hub`; None is "q8_0".
        requantise, drafter: of a GGUF file, as for `plan_gguf`.

    Raises:
        InputError: as for these two; or `dense` with a GGUF file, or `requantise` or `drafter` with a checkpoint directory.
    """
    if source.is_dir():
        if flavour == "hub":
            raise InputError(f"{source}: flavour: is a checkpoint directory already")
        if drafter is not None:
            raise InputError(f"{drafter}: drafter file: it goes with a GGUF model; {source} is a checkpoint directory")
        if requantise is not None:
            raise InputError(f"{source}: requantise: it is for a GGUF file; --dense chooses the types of a checkpoint directory")
        return plan_hub(source, out, flavour=flavour or "mainline", dense=dense or "q8_0")
    if dense is not None:
        raise InputError(f"{source}: dense: it is for a checkpoint directory; --requantise changes the types of a GGUF file")
    if flavour != "hub":
        return plan_gguf(source, out, flavour=flavour, requantise=requantise, drafter=drafter)
    if requantise is not None:
        raise InputError(f"{source}: requantise: a checkpoint directory keeps all values; convert to GGUF to round them")
    return plan_to_hub(source, out, drafter)


def convert(
    source: Path,
    out: Path,
    *,
    flavour: str | None = None,
    dense: str | None = None,
    requantise: str | None = None,
    drafter: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Write a model's files as GGUF files, or resume an interrupted conversion of the same files.

    Args:
        flavour, dense, requantise, drafter: as for `plan`.
        force, progress: as for `convert_write.write`.

    Returns:
        What was written; the note names the files that were removed, too.

    Raises:
        InputError: as for `plan` and `convert_write.write`.
    """
    if flavour != "hub":
        require_free(out, force=force)
    elif out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; give the name of a folder for a checkpoint directory")
    layout = plan(source, out, flavour=flavour, dense=dense, requantise=requantise, drafter=drafter)
    with _folder(out) if flavour == "hub" else contextlib.nullcontext():
        removed = write(layout, force=force, progress=progress)
    notes = [layout.note, *(f"removed {path}, which would be read with the new files" for path in removed)]
    return dataclasses.replace(layout, note="; ".join(filter(None, notes)))


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[None]:
    """A folder that exists; after an error an empty new one is removed.

    Raises:
        InputError: it cannot be made.
    """
    new = not path.exists()
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        yield
    except BaseException:
        # A folder with an unfinished conversion is not empty, and stays.
        with contextlib.suppress(OSError):
            if new:
                path.rmdir()
        raise

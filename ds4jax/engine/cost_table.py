"""The table of decode step times in the package. With it, draft 'auto' does not depend on the host's clock."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from ds4jax.bounds import COSTS
from ds4jax.errors import InputError
from ds4jax.files import read_regular, replacing


@dataclasses.dataclass(frozen=True)
class Entry:
    """Times of a decode step on one device.

    Attributes:
        device: the device's kind, as JAX names it.
        key: the model's `shape_key`.
        drafter: its name.
        max_draft: the maximum number of drafts of the compiled loop.
        strict: the loop's mode.
        model: the model's name, for people.
        ms: the time (ms) of a step at each depth 0 to `max_draft`.
        command, commit: how it was measured.
        note: words about the machine; may be empty.
    """

    device: str
    key: str
    drafter: str
    max_draft: int
    strict: bool
    model: str
    ms: tuple[float, ...]
    command: str
    commit: str | None
    note: str = ""

    @property
    def place(self) -> tuple[Any, ...]:
        """What the entry is looked up by."""
        return self.device, self.key, self.drafter, self.max_draft, self.strict


def read(path: Path) -> list[Entry]:
    """The entries of a table.

    Raises:
        InputError: the file is no such table.
    """
    try:
        entries = [Entry(**row | {"ms": tuple(row["ms"])}) for row in json.loads(read_regular(path))["entries"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: is no table of costs ({error}); `ds4jax bench costs --table` writes one") from None
    for entry in entries:
        if len(entry.ms) != 1 + entry.max_draft:
            raise InputError(f"{path}: ms: {entry.model} has {len(entry.ms)} times for max_draft {entry.max_draft}")
    return entries


@functools.cache
def shipped() -> dict[tuple[Any, ...], Entry]:
    """The entries of the package's table by what they are looked up by."""
    return {entry.place: entry for entry in read(COSTS)}


def write(path: Path, entry: Entry) -> None:
    """Add an entry to a table, in place of one for the same model, device and loop. A missing file is made.

    Raises:
        InputError: the file is no such table.
    """
    kept = {one.place: one for one in (read(path) if path.exists() else ())} | {entry.place: entry}
    rows = ",\n".join(f"    {json.dumps(dataclasses.asdict(one), ensure_ascii=False)}" for _, one in sorted(kept.items()))
    with replacing(path) as unfinished:
        unfinished.write_text(f'{{\n  "entries": [\n{rows}\n  ]\n}}\n', encoding="utf-8")

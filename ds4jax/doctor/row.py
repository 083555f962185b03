"""A line of the doctor's report."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Row:
    """One thing that was looked at.

    Attributes:
        name: a word or two.
        value: what was found, in one line.
        todo: what is wrong and what to do, in one line; None if all is well.
        figures: further JSON fields; sizes are bytes.
    """

    name: str
    value: str
    todo: str | None = None
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """The JSON fields of the row."""
        return {"name": self.name, "value": self.value, "todo": self.todo, **self.figures}


def size_text(size: int) -> str:
    """A number of bytes as text."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"

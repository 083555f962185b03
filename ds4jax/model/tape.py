"""Named intermediates: each part of the model passes them to a callback. A jitted program drops unused ones."""

from __future__ import annotations

from collections.abc import Callable

import jax

Record = Callable[[str, jax.Array], None]


def ignore(name: str, value: jax.Array) -> None:
    """Keep nothing."""


def into(tape: dict[str, jax.Array] | None) -> Record:
    """A callback that fills the dictionary; `ignore` without one."""
    return ignore if tape is None else tape.__setitem__


def under(record: Record, prefix: str) -> Record:
    """The callback for a part of the model: names get the prefix."""
    if record is ignore:
        return ignore
    return lambda name, value: record(f"{prefix}.{name}", value)

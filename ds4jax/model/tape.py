"""Named intermediates: every part of the model offers them to a callback, and a jitted program drops those nobody takes."""

from __future__ import annotations

from collections.abc import Callable

import jax

Record = Callable[[str, jax.Array], None]


def ignore(name: str, value: jax.Array) -> None:
    """Keep nothing."""


def into(tape: dict[str, jax.Array] | None) -> Record:
    """A callback that fills a dictionary, or that keeps nothing when there is none."""
    return ignore if tape is None else tape.__setitem__


def under(record: Record, prefix: str) -> Record:
    """The same callback for a part of the model: names get a prefix."""
    if record is ignore:
        return ignore
    return lambda name, value: record(f"{prefix}.{name}", value)

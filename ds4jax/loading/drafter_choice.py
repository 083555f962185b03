"""The drafter that the user asks for, and the kinds of tensors that it needs."""

from __future__ import annotations

from pathlib import Path

from ds4jax.bounds import DRAFTERS
from ds4jax.errors import InputError

# Drafters whose weights are read, the better one first.
_WITH_WEIGHTS = ("dspark", "mtp")
NOT_WANTED = "the model was opened without its drafter"
WITH_DSPARK = "the model was opened with a DSpark drafter, not with an MTP block"
# The end of a message about a broken drafter inside a model.
WITHOUT = "drafter none loads the model without it"
_NAMES = {"mtp": "MTP block", "dspark": "DSpark drafter"}


def kinds(wanted: str) -> tuple[str, ...]:
    """The kinds of weights to look for, "dspark" and "mtp", the better one first; none for "ngram" and "none".

    Raises:
        InputError: no such drafter.
    """
    if wanted not in DRAFTERS:
        raise InputError(f"drafter is {wanted!r}; it must be {', '.join(DRAFTERS)}")
    return _WITH_WEIGHTS if wanted == "auto" else (wanted,) if wanted in _WITH_WEIGHTS else ()


def lacking(wanted: str, reason: str) -> str:
    """The end of a message about weights without the drafter that was asked for."""
    return f"drafter is {wanted}: {reason or f'these weights have no {_NAMES[wanted]}'}"


def require_no_file(wanted: str, path: Path | None) -> None:
    """Refuse a drafter's file where its weights are not wanted.

    Raises:
        InputError: a file was given.
    """
    if path is not None:
        raise InputError(f"{path}: drafter file: drafter is {wanted}, which reads no weights; leave one of the two out")

"""Efforts of reasoning by name: the text that asks for each in the two revisions of V4-Flash.

Sources: `encoding/encoding_dsv4.py` of the two published checkpoints, which differ in these texts alone; the names are those of
DeepSeek's API.
"""

from __future__ import annotations

from typing import NamedTuple

from ds4jax.errors import InputError

REVISIONS = ("preview", "0731")
# What DeepSeek's API takes where a client names no effort.
DEFAULT = "high"
NO_REASONING = "none"

_MAXIMUM = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, rigorously "
    "stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, and "
    "rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
)
_BEYOND = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the problem "
    "into its most fundamental components, trace every causal chain to its root, and resolve the underlying cause rather than "
    "any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles and are certain that no "
    "assumption remains unchecked and no error remains undiscovered.\n\n"
)
_PREFIXES = {
    "preview": {"low": "", "high": "", "max": _MAXIMUM},
    "0731": {"low": "", "high": _MAXIMUM, "max": _BEYOND},
}
_LEVELS = {
    # The preview's API knows neither minimal nor ultra; they count as their neighbours, so that one client serves both revisions.
    "preview": {"minimal": "high", "low": "high", "medium": "high", "high": "high", "xhigh": "max", "max": "max", "ultra": "max"},
    "0731": {"minimal": "low", "low": "low", "medium": "high", "high": "high", "xhigh": "high", "max": "max", "ultra": "max"},
}
NAMES = (NO_REASONING, *_LEVELS["0731"])


class Effort(NamedTuple):
    """How a reply is asked for: whether with reasoning, and the text directly after the begin-of-sentence token."""

    think: bool
    prefix: str


def effort(name: str | None, *, think: bool, revision: str) -> Effort:
    """What an effort means in a revision.

    Args:
        name: one of `NAMES`; "none" turns reasoning off. None adds no text, which is the encoder's own default; a client that
            names no effort gets `DEFAULT` from DeepSeek's API.
        think: whether reasoning is asked for; without it, the effort adds nothing.

    Raises:
        InputError: the revision or the effort is unknown.
    """
    if revision not in REVISIONS:
        raise InputError(f"revision: {str(revision)[:60]!r} is unknown; it must be one of {', '.join(REVISIONS)}")
    if name is not None and name not in NAMES:
        raise InputError(f"effort: {str(name)[:60]!r} is unknown; it must be one of {', '.join(NAMES)}")
    if name == NO_REASONING or not think:
        return Effort(False, "")
    return Effort(True, "" if name is None else _PREFIXES[revision][_LEVELS[revision][name]])

"""Splits a text by chapters into a training part and a held-out part."""

from __future__ import annotations

import re

CHAPTER_START = re.compile(r"\n{2,}(?=[^\n])")


def split_chapters(text: str, held_out: int = 20) -> tuple[str, str]:
    """Split off the last `held_out` chapters of a text. Blank lines separate chapters.

    Returns:
        The text before those chapters, and the chapters. Joined, they are the text again: the blank line between them
        belongs to the first part.

    Raises:
        ValueError: `held_out` is below 1, or no chapter would remain for training.
    """
    if held_out < 1:
        raise ValueError(f"held_out is {held_out}; at least one chapter must be held out")
    starts = [match.end() for match in CHAPTER_START.finditer(text)]
    if len(starts) < held_out:
        raise ValueError(f"the text has {len(starts) + 1} chapters; holding out {held_out} leaves none to train on")
    return text[: starts[-held_out]], text[starts[-held_out] :]

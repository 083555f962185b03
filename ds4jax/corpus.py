"""Plain text of chapters: what is trained on and what is kept out to measure with."""

from __future__ import annotations

import re

CHAPTER_START = re.compile(r"\n{2,}(?=[^\n])")


def split_chapters(text: str, held_out: int = 20) -> tuple[str, str]:
    """Split a text, whose chapters stand apart by blank lines, into what comes before its last `held_out` chapters, and these.

    The two parts joined give the text back; the blank line between them ends the first.

    Raises:
        ValueError: `held_out` is below 1, or nothing would be left to train on.
    """
    if held_out < 1:
        raise ValueError(f"held_out is {held_out}; at least one chapter must be kept out")
    starts = [match.end() for match in CHAPTER_START.finditer(text)]
    if len(starts) < held_out:
        raise ValueError(f"the text has {len(starts) + 1} chapters; keeping out {held_out} leaves none to train on")
    return text[: starts[-held_out]], text[starts[-held_out] :]

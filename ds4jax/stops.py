"""Ending a streamed text where a stop text begins, before any of it is shown."""

from __future__ import annotations

from collections.abc import Sequence

from ds4jax.errors import InputError


class StopMatcher:
    """Passes text through until it holds one of several stop texts.

    The stop that is complete first counts, and of two that are complete at once the longer: as if characters came one at a time,
    so the result does not depend on how the text is cut into pieces. What may still become a stop text is held back.

    Attributes:
        found: the stop text that ended the text, None before that.
    """

    def __init__(self, stops: Sequence[str]):
        """Args: `stops`, none for a text that nothing ends.

        Raises:
            InputError: an empty stop text.
        """
        if "" in stops:
            raise InputError("stop: an empty text is everywhere; give at least one character")
        self.found: str | None = None
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> str:
        """The text that this piece sets free; nothing after a stop."""
        if self.found is not None:
            return ""
        text = self._held + text
        places = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if places:
            _, cut, self.found = min(places)
            self._held = ""
        else:
            cut = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
            self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What is left at the end, which became no stop text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of `stop`, not all of it, that `text` ends with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)

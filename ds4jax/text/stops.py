"""Ends a streamed text at a stop text, without showing any part of the stop text."""

from __future__ import annotations

from collections.abc import Sequence

from ds4jax.errors import InputError


class StopMatcher:
    """Passes text through until it contains one of several stop texts.

    The first completed stop text counts; of two that are completed by the same character, the longer one counts. So the result
    does not depend on how the text is cut into pieces. Text that may still become a stop text is held back.

    Attributes:
        found: the stop text that ended the text; None before that.
        rest: the text pushed after the stop text.
    """

    def __init__(self, stops: Sequence[str]):
        """Start with these stop texts. Without any, nothing ends the text.

        Raises:
            InputError: a stop text is empty.
        """
        if "" in stops:
            raise InputError("stop: the text is empty; give at least one character")
        self.found: str | None = None
        self.rest = ""
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> str:
        """The text that can be shown after this piece; "" after a stop text."""
        if self.found is not None:
            self.rest += text
            return ""
        text = self._held + text
        places = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if places:
            end, cut, self.found = min(places)
            self._held, self.rest = "", text[end:]
        else:
            cut = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
            self._held = text[cut:]
        return text[:cut]

    def completes(self, text: str) -> bool:
        """Whether `push` of this text would complete a stop text."""
        return self.found is not None or any(stop in self._held + text for stop in self._stops)

    def flush(self) -> str:
        """The held-back text, at the end."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)

"""The calls of a reply, filled while it is read."""

from __future__ import annotations

from ds4jax.text.block_reader import Event
from ds4jax.text.parsed import CallDelta, ToolCall


class CallList:
    """Collects calls, and what they grow by."""

    def __init__(self) -> None:
        self._calls: list[_OpenCall] = []
        self._deltas: list[CallDelta] = []
        self._begun = 0

    def take(self, events: list[Event]) -> None:
        """Take out the events of a block."""
        for kind, text in events:
            if kind == "call":
                self._begun += 1
                self._calls.append(_OpenCall(text))
                self._deltas.append(CallDelta(self._begun - 1, text, ""))
            elif kind == "end":
                self._calls[-1].complete = True
            else:
                self._calls[-1].arguments.append(text)
                self._grow(text)
        events.clear()

    def drop_last(self) -> None:
        """The last call is none. Its number is not used again."""
        self._calls.pop()

    def new(self) -> tuple[CallDelta, ...]:
        """What the calls grew by since the last time."""
        new, self._deltas = tuple(self._deltas), []
        return new

    def calls(self) -> tuple[ToolCall, ...]:
        """All calls so far."""
        return tuple(ToolCall(call.name, "".join(call.arguments), call.complete) for call in self._calls)

    def any_complete(self) -> bool:
        """Whether a call is whole."""
        return any(call.complete for call in self._calls)

    def _grow(self, text: str) -> None:
        index = self._begun - 1
        if self._deltas and self._deltas[-1].index == index:
            before = self._deltas.pop()
            self._deltas.append(CallDelta(index, before.name, before.arguments + text))
        else:
            self._deltas.append(CallDelta(index, None, text))


class _OpenCall:
    """A call that is being read."""

    def __init__(self, name: str):
        self.name = name
        self.arguments: list[str] = []
        self.complete = False

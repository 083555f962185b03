"""What the reply parser returns: a reply taken apart, and what a piece of a streamed reply adds."""

from __future__ import annotations

import dataclasses
from typing import Literal

End = Literal["eos", "length"]
Finish = Literal["stop", "tool_calls", "length"]


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """One call of a reply.

    Attributes:
        arguments: JSON text; of a call that was cut, its beginning.
        complete: False for a call that was cut by the limit of tokens. It must not be executed.
    """

    name: str
    arguments: str
    complete: bool = True


@dataclasses.dataclass(frozen=True)
class ParsedReply:
    """A reply taken apart.

    Attributes:
        reasoning: None if the prompt did not ask for reasoning.
        content: the answer; "" without one.
        tool_calls: in the order of the text.
        finish: "stop", "tool_calls", or "length" where the limit of tokens cut the reply.
    """

    reasoning: str | None
    content: str
    tool_calls: tuple[ToolCall, ...]
    finish: Finish


@dataclasses.dataclass(frozen=True)
class CallDelta:
    """What a piece of a reply adds to one call.

    Attributes:
        index: the call's number in the reply.
        name: its name where it begins, else None.
        arguments: the text that its arguments grow by.
    """

    index: int
    name: str | None
    arguments: str


@dataclasses.dataclass(frozen=True)
class Delta:
    """What a piece of a reply adds."""

    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[CallDelta, ...] = ()

    def joined(self, after: Delta) -> Delta | None:
        """This and the next delta as one; None if they do not add to the same text, so that their order would be lost."""
        both = (self, after)
        if not any(one.content or one.tool_calls for one in both):
            return Delta(reasoning=self.reasoning + after.reasoning)
        if not any(one.reasoning or one.tool_calls for one in both):
            return Delta(content=self.content + after.content)
        if any(one.reasoning or one.content or len(one.tool_calls) != 1 for one in both):
            return None
        [call], [more] = self.tool_calls, after.tool_calls
        if more.name is not None or more.index != call.index:
            return None
        return Delta(tool_calls=(dataclasses.replace(call, arguments=call.arguments + more.arguments),))

"""Takes a complete reply apart into reasoning, content and tool calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ds4jax.text.parsed import End, ParsedReply
from ds4jax.text.reply_parser import ReplyParser
from ds4jax.text.tokenizer import Tokenizer

_PIECE = 256


def parse_reply(
    ids: Iterable[int],
    *,
    tokenizer: Tokenizer,
    think: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: str | Mapping[str, Any] | None = None,
    stop: Sequence[str] = (),
    end: End = "eos",
) -> ParsedReply:
    """Take a complete reply apart.

    A block of calls counts if its first call is one of a tool of this request. Inside the reasoning it counts only if it begins a
    line, is whole, and ends the reply. A call that is malformed, or that the model did not end, is content and no call.

    Args:
        ids: the reply's token ids without the end token.
        think: whether the prompt ended in `<think>`.
        tools, tool_choice: those of the prompt. Without tools, or with "none", all markup is text.
        stop: texts that end the content before them. Reasoning and calls may contain them.
        end: "eos" if the model ended the reply, "length" if the limit of tokens cut it.

    Raises:
        InputError: an option cannot be used, the vocabulary has no chat markers, or an id is outside it.
    """
    parser = ReplyParser(tokenizer, think=think, tools=tools, tool_choice=tool_choice, stop=stop)
    # In pieces, which a reader of long values finishes sooner.
    ids = list(ids)
    for start in range(0, len(ids), _PIECE):
        parser.push(ids[start : start + _PIECE])
    parser.finish(end)
    return parser.result()

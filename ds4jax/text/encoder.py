"""Prompts of DeepSeek-V4-Flash: a conversation in OpenAI's form becomes text and token ids.

    BOS [effort] system texts [tools] [format] <｜User｜> texts and results <｜Assistant｜> <think> or </think> reply EOS ...

Where the published encoder gives a usable prompt, this one gives the same; the two revisions differ in the efforts' texts alone.
Where it gives none, a choice was made:

* a system message behind the first turn is a text of the user's turn where it stands, so that what precedes it stays a prefix;
* consecutive messages of an assistant are one turn, reasoning first; a first message of an assistant gets its marker;
* a reply that is asked for after a finished one opens a new turn.

Sources: `encoding/encoding_dsv4.py` and `encoding/tests` of the V4-Flash checkpoint, and the encoder of the 0731 checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ds4jax.errors import InputError
from ds4jax.text import parts as text_parts
from ds4jax.text.dsml import calls_block
from ds4jax.text.efforts import effort as effort_of
from ds4jax.text.messages import Level, read
from ds4jax.text.parts import Part, marker
from ds4jax.text.tokenizer import ASSISTANT, BOS, END_THINK, EOS, THINK, USER, Tokenizer
from ds4jax.text.tools_block import Functions, format_text, functions, schema_of, tools_text
from ds4jax.text.turns import Reminder, Reply, System, Turn, UserTurn, in_turns

_REMINDER = "<｜latest_reminder｜>"


@dataclasses.dataclass(frozen=True)
class ChatPrompt:
    """A prompt.

    Attributes:
        text: for people; a marker and a text that spells it look the same in it.
        ids: token ids, where they do not.
    """

    text: str
    ids: tuple[int, ...]


def chat_prompt(
    messages: Sequence[Mapping[str, Any]],
    *,
    tokenizer: Tokenizer,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: str | Mapping[str, Any] | None = None,
    response_format: Mapping[str, Any] | None = None,
    think: bool = False,
    effort: str | None = None,
    revision: str = "0731",
    generate: bool = True,
    drop_thinking: bool = True,
    level: Level = "server",
) -> ChatPrompt:
    """The prompt of a conversation.

    Args:
        messages: objects with role and content: system, developer, user, assistant (reasoning_content, tool_calls, and prefix
            true on a last one that the reply continues) and tool (tool_call_id).
        tools: functions in OpenAI's form; tools of other types are left out.
        tool_choice: "none" shows no tools; everything else shows all.
        response_format: of type json_schema, its schema is shown; the types text and json_object add nothing.
        think: ask for reasoning.
        effort: none, minimal, low, medium, high, xhigh, max or ultra, as DeepSeek's API names them; "none" turns reasoning off.
            None adds nothing. DeepSeek's API takes `efforts.DEFAULT` where a client names none.
        revision: "preview" or "0731", which ask for efforts in other words; `revision_of` finds a model's.
        generate: end where the reply begins; False leaves the conversation as it stands.
        drop_thinking: leave out reasoning before the last user's turn. With tools, all of it is kept in any case.
        level: "server", or "encoder" for DeepSeek's own roles: its developer, latest_reminder, and messages with a task.

    Raises:
        InputError: a message or an option cannot be used, there is nothing to reply to, or the vocabulary lacks a marker.
    """
    wanted = effort_of(effort, think=think, revision=revision)
    offered = functions(tools, tool_choice)
    read_messages = read(messages, level)
    if tool_choice == "none":
        read_messages = [dataclasses.replace(message, functions=()) for message in read_messages]
    systems, turns = in_turns(read_messages)
    if generate and not turns:
        raise InputError("messages: there is no user's turn to reply to; add one")
    schema = schema_of(response_format) or None
    if offered or schema is not None:
        systems, turns = _with_request(systems, turns, offered, schema, level)
    drop = drop_thinking and not any(one.functions for one in (*systems, *turns) if not isinstance(one, Reply))
    parts = [marker(BOS), Part(wanted.prefix)]
    for system in systems:
        parts += _system(system)
    parts += _turns(turns, wanted.think, drop, level, generate)
    return ChatPrompt(text_parts.written(parts), tuple(text_parts.ids(tokenizer, parts)))


def follow_up(tokenizer: Tokenizer, content: str, *, think: bool = False) -> list[int]:
    """Token ids that continue a conversation: the answer's EOS, a user's turn, and the start of the next reply.

    After a prompt's ids and the ids of its answer, the next prompt is
    `ids[:-1] + [id of </think>] + answer_ids + follow_up(...)`. A cache of `ids[:-1]` therefore serves again. After a reply
    without reasoning, a cache that also holds the answer serves too.

    Raises:
        InputError: the vocabulary has no chat markers, or the text is not valid Unicode.
    """
    turn = UserTurn([text_parts.valid(content, "content")])
    return text_parts.ids(tokenizer, [marker(EOS), *_user(turn), marker(ASSISTANT), marker(THINK if think else END_THINK)])


def _with_request(
    systems: list[System], turns: list[Turn], offered: Functions, schema: Any, level: Level
) -> tuple[list[System], list[Turn]]:
    """The turns with the tools and the format of the request: at the first message where it can take them."""
    if level == "encoder" and not systems and isinstance(turns[0], UserTurn) and turns[0].developer:
        first = turns[0]
        return systems, [
            dataclasses.replace(first, functions=offered or first.functions, schema=schema or first.schema),
            *turns[1:],
        ]
    first_system = systems[0] if systems else System("")
    changed = dataclasses.replace(first_system, functions=offered or first_system.functions, schema=schema or first_system.schema)
    return [changed, *systems[1:]], turns


def _system(system: System) -> list[Part]:
    return [Part(system.text), *_request(system.functions, system.schema)]


def _turns(turns: list[Turn], think: bool, drop: bool, level: Level, generate: bool) -> list[Part]:
    """Parts of all turns, and of the beginning of the next reply."""
    last_user = max((i for i, turn in enumerate(turns) if isinstance(turn, UserTurn)), default=-1)
    parts: list[Part] = []
    task, asked = None, level == "server"
    for i, turn in enumerate(turns):
        if isinstance(turn, UserTurn) and turn.developer and think and drop and i < last_user:
            # Turns of DeepSeek's search agent are dropped together with the reasoning.
            continue
        if isinstance(turn, Reply):
            shown = think and (i > last_user or not drop)
            # Among DeepSeek's own roles, only a user's turn or a task brings the marker.
            beginning = _beginning(task, think, shown) if asked or task else []
            parts += _reply(turn, beginning, shown and task is None)
            asked = level == "server"
        elif isinstance(turn, Reminder):
            parts += [marker(_REMINDER), Part(turn.text)]
        else:
            parts += _user(turn)
            asked = True
        task = turn.task
    if not generate:
        return parts
    if isinstance(turns[-1], Reply) and (turns[-1].prefix or (level == "encoder" and task is None)):
        return parts
    return [*parts, *_beginning(task, think, think)]


def _beginning(task: str | None, think: bool, shown: bool) -> list[Part]:
    """What stands before a reply's text: the assistant's marker with the beginning of its reasoning, or the marker of a task."""
    if task not in (None, "action"):
        return [marker(f"<｜{task}｜>")]
    opened = [marker(ASSISTANT), marker(THINK if (think if task else shown) else END_THINK)]
    return [*opened, marker(f"<｜{task}｜>")] if task else opened


def _reply(reply: Reply, beginning: list[Part], shown: bool) -> list[Part]:
    reasoning = [Part(reply.reasoning), marker(END_THINK)] if shown else []
    end = [] if reply.prefix else [marker(EOS)]
    return [*beginning, *reasoning, Part(reply.text), *calls_block(reply.calls), *end]


def _user(turn: UserTurn) -> list[Part]:
    return [marker(USER), Part("\n\n".join(turn.texts)), *_request(turn.functions, turn.schema)]


def _request(offered: Functions, schema: Any) -> list[Part]:
    """What a text says about tools and format, behind it."""
    tools = [Part("\n\n"), *tools_text(offered)] if offered else []
    return tools if schema is None else [*tools, Part("\n\n"), *format_text(schema)]

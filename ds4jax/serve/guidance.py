"""What a reply may say, as a grammar: JSON of a schema, or calls of the offered tools. The engine masks each step by it.

The text of the reasoning is free; the grammar begins behind it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import llguidance
import numpy as np
from llguidance.numpy import fill_next_token_bitmask

from ds4jax.decode.masks import BITS, words
from ds4jax.serve.errors import bad
from ds4jax.text.tokenizer import DSML, END_THINK, Tokenizer
from ds4jax.text.tools_block import functions

if TYPE_CHECKING:
    from ds4jax.serve.conversation import Conversation

# Without spaces of its own choice, a model cannot write spaces for ever.
_COMPACT = {"x-guidance": {"whitespace_flexible": False}}
_DEFINITIONS = ("$defs", "definitions")
# A value's text goes on to the next `</`; the marker behind the last one ends it.
_TEXT = "text[lazy]: /(.|\\n)*<\\//"


def constraint(asked: Conversation, tokenizer: Tokenizer, vocabulary: int) -> Guide | None:
    """The constraint of a conversation's reply; None if it may say anything.

    Raises:
        ApiError: a schema or a choice of tools cannot be used.
    """
    found = grammar(asked, tokenizer)
    if found is None:
        return None
    matcher = llguidance.LLMatcher(_vocabulary(tokenizer), found, log_level=0)
    if matcher.is_error():
        what = "response_format" if asked.response_format else "tools"
        raise bad(f"{what}: the schema cannot be used: {' '.join(matcher.get_error().split())[:300]}", what)
    end_think = tokenizer.marker_id(END_THINK) if asked.thinks else None
    return Guide(matcher, vocabulary, end_think, tokenizer.eos_id)


class Guide:
    """A constraint for `ds4jax.Engine.submit`: a function of the reply's tokens so far."""

    def __init__(self, matcher: llguidance.LLMatcher, vocabulary: int, end_think: int | None, eos_id: int):
        """Args: `end_think`, the token behind which the grammar begins; None at once."""
        self._matcher, self._end_think = matcher, end_think
        self._read, self._begins = 0, 0 if end_think is None else -1
        self._mask = np.zeros((1, words(vocabulary)), np.int32)
        # The model must not end inside its reasoning.
        self._free = np.full(words(vocabulary), 0xFFFFFFFF, np.uint32)
        self._free[eos_id // BITS] &= ~np.uint32(1 << eos_id % BITS)

    def __call__(self, so_far: Sequence[int]) -> np.ndarray | None:
        """The tokens that may follow, uint32 [ceil(V/32)]."""
        if len(so_far) < self._read:
            # The engine makes the reply again.
            self._matcher.reset()
            self._read, self._begins = 0, 0 if self._end_think is None else -1
        for i in range(self._read, len(so_far)):
            if self._begins >= 0:
                self._matcher.consume_token(so_far[i])
            elif so_far[i] == self._end_think:
                self._begins = i + 1
        self._read = len(so_far)
        if self._begins < 0:
            # A mask, since without one several tokens are made at once, of which the last ones may be behind the reasoning.
            return self._free
        fill_next_token_bitmask(self._matcher, self._mask)
        return self._mask[0].view(np.uint32).copy()


def grammar(asked: Conversation, tokenizer: Tokenizer) -> str | None:
    """The grammar of the answer, in llguidance's form of Lark; None if it may say anything.

    Raises:
        ApiError: tools are demanded, and there are none.
    """
    offered = functions(asked.tools, asked.tool_choice)
    choice = asked.tool_choice
    named = choice["function"]["name"] if isinstance(choice, dict) else None
    demanded = named is not None or choice == "required"
    schema = _schema(asked.response_format)
    if demanded:
        offered = [one for one in offered if named in (None, one["name"])]
        if not offered:
            raise bad(f"tool_choice: there is no tool {named!r}" if named else "tool_choice: there are no tools", "tool_choice")
    elif schema is None:
        return None
    rules = [f"start: {'calls' if demanded else 'calls | json' if offered else 'json'}"]
    if not demanded:
        rules.append(f"json: %json {_written(schema)}")
    if offered:
        rules += _calls(offered, f"<[{tokenizer.marker_id(DSML)}]>", several=asked.parallel)
    return "\n".join(rules)


def _schema(response_format: Mapping[str, Any] | None) -> Any:
    kind = (response_format or {}).get("type")
    if response_format is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    described = response_format.get("json_schema")
    found = described.get("schema") if isinstance(described, dict) else None
    return {"type": "object"} if found is None else found


def _written(schema: Any) -> str:
    return json.dumps({**schema, **_COMPACT} if isinstance(schema, dict) else schema)


def _calls(offered: Sequence[Mapping[str, Any]], marker: str, *, several: bool) -> list[str]:
    """Rules of a block of calls."""
    names = [f"call_{i}" for i in range(len(offered))]
    head, foot = f'"\\n\\n<" {marker} "tool_calls>\\n"', f'"</" {marker} "tool_calls>"'
    rules = [f"calls: {head} ({' | '.join(names)}){'+' if several else ''} {foot}", _TEXT]
    for name, function in zip(names, offered, strict=True):
        opened = json.dumps(f'invoke name="{function["name"]}">\n', ensure_ascii=False)
        parameters = function.get("parameters") or {}
        values, more = _parameters(name, parameters, marker)
        rules.append(f'{name}: "<" {marker} {opened} {" ".join(values)} "</" {marker} "invoke>\\n"')
        rules += more
    return rules


def _parameters(prefix: str, schema: Mapping[str, Any], marker: str) -> tuple[list[str], list[str]]:
    """The parameters of a call in their order, and the rule of each."""
    definitions = {name: schema[name] for name in _DEFINITIONS if name in schema}
    properties, required = schema.get("properties"), schema.get("required") or ()
    found, rules = [], []
    for i, (field, own) in enumerate((properties if isinstance(properties, dict) else {}).items()):
        rule = f"{prefix}_{i}"
        found.append(rule if field in required else f"{rule}?")
        rules.append(f"{rule}: " + " | ".join(_forms(field, own if isinstance(own, dict) else {}, definitions, marker)))
    # A call without parameters has an empty line.
    return found or ['"\\n"'], rules


def _forms(field: str, schema: Mapping[str, Any], definitions: Mapping[str, Any], marker: str) -> list[str]:
    """How a parameter may be written: a text as it stands, anything else as JSON."""

    def opened(is_text: str) -> str:
        return json.dumps(f'parameter name="{field}" string="{is_text}">', ensure_ascii=False)

    kind, choices = schema.get("type"), schema.get("enum")
    closed = f'{marker} "parameter>\\n"'
    if kind == "string" and choices and all(isinstance(one, str) for one in choices):
        options = " | ".join(json.dumps(one, ensure_ascii=False) for one in choices)
        return [f'"<" {marker} {opened("true")} ({options}) "</" {closed}']
    text = f'"<" {marker} {opened("true")} text+ {closed}'
    value = f'"<" {marker} {opened("false")} %json {_written({**definitions, **schema})} "</" {closed}'
    return [text] if kind == "string" else [value] if kind or "$ref" in schema else [text, value]


@functools.lru_cache(maxsize=2)
def _vocabulary(tokenizer: Tokenizer) -> llguidance.LLTokenizer:
    """The vocabulary for grammars; once per tokenizer."""
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Vocabulary(tokenizer)))


class _Vocabulary:
    """A tokenizer as the library reads it. Markers cannot be spelled by other tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace"))

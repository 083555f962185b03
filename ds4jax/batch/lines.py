"""The lines of a batch: reads them, and makes of each the arguments of `ds4jax.Engine.submit`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds4jax import bounds
from ds4jax.errors import InputError
from ds4jax.files import read_regular

if TYPE_CHECKING:
    from ds4jax.engine.loaded import Loaded
    from ds4jax.text.prompt import Prompt

PROMPTS = ("prompt", "messages", "ids")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")
OTHERS = ("max_new_tokens", "draft", "stop", "ignore_eos", "logprobs")
KNOWN = ("id", "think", "effort", *PROMPTS, *SAMPLING, *OTHERS)


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the input.

    Attributes:
        number: its number in the file, from 1.
        id: its `id`; None without one.
        request: a digest of the line and of all options that its reply depends on.
        fields: what it asks for, without absent and null fields.
        error: why it is no request; "" if it is one.
    """

    number: int
    id: str | int | None
    request: str
    fields: Mapping[str, Any]
    error: str


def read(path: Path, mode: Mapping[str, Any]) -> list[Line]:
    """The lines of a file, without blank ones. A line that is no request has an `error`.

    Args:
        mode: the options that all replies depend on; JSON values.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        raw = read_regular(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    same = hashlib.sha256(json.dumps(mode, sort_keys=True).encode())
    return [_line(number, line, same) for number, line in enumerate(raw.split(b"\n"), 1) if line.strip()]


def _line(number: int, raw: bytes, same: Any) -> Line:
    digest = same.copy()
    digest.update(raw.strip())
    request = digest.hexdigest()[:16]
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        return Line(number, None, request, {}, f"line {number}: not JSON: {error}")
    if not isinstance(fields, dict):
        return Line(number, None, request, {}, f"line {number}: {bounds.shown(fields)}; it must be a JSON object")
    fields = {name: value for name, value in fields.items() if value is not None}
    name = fields.pop("id", None)
    if not (name is None or (isinstance(name, str | int) and not isinstance(name, bool))):
        return Line(number, None, request, {}, f"line {number}: id: {bounds.shown(name)}; it must be a text or an integer")
    return Line(number, name, request, fields, _fault(number, fields))


def _fault(number: int, fields: Mapping[str, Any]) -> str:
    unknown = sorted(fields.keys() - set(KNOWN))
    if unknown:
        return f"line {number}: {unknown[0][:60]}: no such field; there are {', '.join(KNOWN)}"
    given = [name for name in PROMPTS if name in fields]
    if len(given) != 1:
        found = " and ".join(given) if given else "none"
        return f"line {number}: {found} given; give one of {', '.join(PROMPTS)}"
    return ""


def arguments(line: Line, model: Loaded, usual: Mapping[str, Any]) -> tuple[Prompt, dict[str, Any]]:
    """The prompt and the options of a line, for `ds4jax.Engine.submit`.

    A line that draws tokens and has no seed gets one from its number and content, so that a batch that goes on gives the replies
    of one that was never interrupted.

    Args:
        usual: options of lines that do not have them, and the `revision` of the model's chat format.

    Raises:
        InputError: the line is no request, or a field is not usable.
    """
    from ds4jax.decode.sampling import Sampling

    if line.error:
        raise InputError(line.error)
    fields = dict(line.fields)
    usual = dict(usual)
    chat = {"revision": usual.pop("revision", "preview")}
    chat |= {"think": bounds.flag("think", fields.pop("think", False)), "effort": fields.pop("effort", None)}
    if (chat["think"] or chat["effort"]) and "messages" not in fields:
        raise InputError("think and effort: they are for messages")
    [(kind, given)] = [(name, fields.pop(name)) for name in PROMPTS if name in fields]
    chosen = {name: fields.pop(name) for name in SAMPLING if name in fields}
    chosen.setdefault("seed", _seed(line))
    return _prompt(kind, given, chat, model), {**usual, **fields, "sampling": Sampling(**chosen)}


def _seed(line: Line) -> int:
    return int.from_bytes(hashlib.sha256(f"{line.number} {line.request}".encode()).digest()[:8], "little") >> 1


def _prompt(kind: str, given: Any, chat: dict[str, Any], model: Loaded) -> Prompt:
    if kind == "messages":
        return chat_ids(model, given, **chat)
    if kind == "prompt" and not isinstance(given, str):
        raise InputError(f"prompt: {bounds.shown(given)}; it must be a text")
    if kind == "ids" and not (isinstance(given, list) and all(type(one) is int for one in given)):
        raise InputError(f"ids: {bounds.shown(given)}; they must be a list of integers")
    prompt: Prompt = given
    return prompt


def chat_ids(model: Loaded, messages: Any, *, think: bool, effort: str | None, revision: str) -> list[int]:
    """Token ids of a conversation in OpenAI's form, up to the start of the reply.

    Raises:
        InputError: there is no tokenizer, or a message cannot be used.
    """
    from ds4jax.text import efforts
    from ds4jax.text.encoder import chat_prompt

    if model.tokenizer is None:
        raise InputError(f"{model.path or 'the model'}: tokenizer: none in these files; give ids")
    tokenizer, wanted = model.tokenizer, effort or efforts.DEFAULT
    return list(chat_prompt(messages, tokenizer=tokenizer, think=think, effort=wanted, revision=revision).ids)

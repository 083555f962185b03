"""Runs a batch: keeps the engine's slots filled, and writes replies in the order of the lines."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ds4jax.batch import lines as batch_lines
from ds4jax.batch.lines import Line
from ds4jax.batch.output import Output
from ds4jax.errors import InputError

if TYPE_CHECKING:
    from ds4jax.engine.engine import Engine
    from ds4jax.engine.request import Request, RequestResult

# Requests that are submitted ahead of the one that is written next, for each slot: long replies do not leave slots empty.
AHEAD = 16
# Seconds between two notes of progress.
NOTE_EVERY = 0.5

# Called with the number of lines that are done, and the tokens per second so far.
Note = Callable[[int, float], None]


@dataclasses.dataclass(frozen=True)
class _Begun:
    """A line on its way: its request, or the record of an error."""

    line: Line
    request: Request | None = None
    error: str = ""


def run(engine: Engine, lines: Iterable[Line], output: Output, usual: Mapping[str, Any], note: Note) -> None:
    """Write the reply to each line.

    Args:
        lines: those that the output does not have yet.
        usual: options of lines that do not have them.
        note: called now and then.

    Raises:
        Exception: the engine's thread has ended.
        OSError: the output cannot be written.
    """
    rest, begun = iter(lines), deque[_Begun]()
    tokens, since = 0, time.perf_counter()
    try:
        while True:
            while len(begun) < AHEAD * engine.shape.slots and (line := next(rest, None)):
                begun.append(_begin(engine, line, usual))
            if not begun:
                return
            first = begun[0]
            while first.request and not first.request.done:
                with contextlib.suppress(TimeoutError):
                    first.request.wait(NOTE_EVERY)
                made = sum(one.request.made for one in begun if one.request)
                note(output.done, (tokens + made) / (time.perf_counter() - since))
            record = _record(engine, begun.popleft())
            output.write(record)
            tokens += len(record["tokens"])
    finally:
        for one in begun:
            if one.request:
                one.request.cancel()


def _begin(engine: Engine, line: Line, usual: Mapping[str, Any]) -> _Begun:
    try:
        prompt, options = batch_lines.arguments(line, engine.model, usual)
        return _Begun(line, engine.submit(prompt, **options))
    except InputError as error:
        return _Begun(line, error=str(error))


def _record(engine: Engine, begun: _Begun) -> dict[str, Any]:
    if begun.request is None:
        return _failed(begun.line, begun.error)
    try:
        return record(begun.line, begun.request.result())
    except Exception as error:
        if not engine.alive:
            raise
        return _failed(begun.line, " ".join(str(error).split())[:500] or type(error).__name__)


def record(line: Line, result: RequestResult) -> dict[str, Any]:
    """The line of the output for a reply."""
    scores = [dataclasses.asdict(one) for one in result.logprobs or ()]
    return {
        "id": line.id,
        "text": result.text,
        "tokens": list(result.ids),
        "fingerprint": result.fingerprint,
        "finish_reason": result.finish_reason,
        "prompt_tokens": len(result.prompt_ids),
        "seed": result.seed,
        "error": None,
        "request": line.request,
    } | ({"logprobs": scores} if result.logprobs is not None else {})


def _failed(line: Line, error: str) -> dict[str, Any]:
    empty: dict[str, Any] = dict.fromkeys(("text", "fingerprint", "finish_reason", "prompt_tokens", "seed"))
    return {"id": line.id, **empty, "tokens": [], "error": error, "request": line.request}

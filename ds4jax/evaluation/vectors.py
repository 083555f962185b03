"""Compares a model with continuations that the ds4 project recorded: `official.vec` and `prompts/*.txt` in one folder.

The file holds records. Empty lines and lines that begin with # are ignored:

    case ID CTX STEPS FILE
    step I HEX COUNT
    top HEX LOGPROB
    end

A step gives the bytes of the selected token and the number of alternatives that follow. Each alternative has a natural log
probability; the selected token is one of them. The prompt is one user's turn, and the reply has no reasoning.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ds4jax.engine.loaded import Loaded
from ds4jax.errors import InputError
from ds4jax.evaluation.logprobs import following
from ds4jax.files import read_regular
from ds4jax.text.encoder import chat_prompt

if TYPE_CHECKING:
    from ds4jax.text.tokenizer import Tokenizer

RECORDS, PROMPTS = "official.vec", "prompts"
LIMIT = 4.0
# The words of each kind of line after the first word.
_WORDS = {"case": "ID CTX STEPS FILE", "step": "I HEX COUNT", "top": "HEX LOGPROB", "end": ""}


@dataclasses.dataclass(frozen=True)
class Step:
    """One recorded step.

    Attributes:
        selected: bytes of the selected token.
        top: bytes of the most likely tokens, and their log probabilities.
    """

    selected: bytes
    top: tuple[tuple[bytes, float], ...]


@dataclasses.dataclass(frozen=True)
class Fixture:
    """One recorded continuation.

    Attributes:
        id: name of the record.
        prompt: the user's turn.
        steps: the recorded tokens in order.
    """

    id: str
    prompt: str
    steps: tuple[Step, ...]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """A model's agreement with one fixture.

    Attributes:
        id: the fixture's name.
        prompt_tokens: length of the rendered conversation.
        steps: number of recorded steps.
        selected: number of steps where the model selects the recorded token.
        compared: number of alternatives that are one token of the vocabulary.
        missing: number of the other alternatives.
        largest: maximum difference of log probabilities over the compared alternatives.
        failures: the differences, one sentence each.
    """

    id: str
    prompt_tokens: int
    steps: int
    selected: int
    compared: int
    missing: int
    largest: float
    failures: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether the model selects every recorded token and every difference is below the limit."""
        return not self.failures


def read(folder: Path) -> list[Fixture]:
    """Read the fixtures of a folder.

    Raises:
        InputError: a file is missing, is not UTF-8 or has the wrong format; the message names file and line.
    """
    path = folder / RECORDS
    fixtures: dict[str, Fixture] = {}
    lines = _lines(path)
    for number, words in lines:
        at = f"{path}: line {number}"
        if words[0] != "case":
            raise InputError(f"{at}: {words[0][:20]!r} outside a record; one begins with: case {_WORDS['case']}")
        _, name, context, steps, file = words
        if name in fixtures:
            raise InputError(f"{at}: case {name}: an id that an earlier record has")
        # The context size of the recording. Only the model's own context limits a fixture here.
        _integer(context, 1, f"{at}: CTX")
        count = _integer(steps, 1, f"{at}: STEPS")
        # Only the file name counts: records hold paths inside the recording project.
        prompt = _text(folder / PROMPTS / Path(file).name)
        if not prompt:
            raise InputError(f"{folder / PROMPTS / Path(file).name}: the file is empty")
        fixtures[name] = Fixture(name, prompt, _steps(lines, count, f"{path}: case {name}"))
    if not fixtures:
        raise InputError(f"{path}: no record; one begins with: case {_WORDS['case']}")
    return list(fixtures.values())


def compare(model: Loaded, fixtures: Sequence[Fixture], *, strict: bool = False) -> Iterator[Agreement]:
    """Compare the model with each fixture, teacher forced with the selected tokens.

    Raises:
        InputError: the vocabulary has no chat markers, or a fixture is longer than the context.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InputError(f"{model.path or 'the model'}: tokenizer: none in these files; fixtures are texts")
    ids_of = {tokenizer.token_bytes(i): i for i in reversed(range(tokenizer.vocab_size))}
    prompts = [_rendered(tokenizer, fixture.prompt) for fixture in fixtures]
    for fixture, ids in zip(fixtures, prompts, strict=True):
        needed = len(ids) + len(fixture.steps)
        if needed > model.config.max_context:
            raise InputError(
                f"case {fixture.id}: {needed} tokens, more than the model's context of {model.config.max_context}; leave it out"
            )
    for fixture, ids in zip(fixtures, prompts, strict=True):
        yield _agreement(model, tokenizer, fixture, ids, ids_of, strict)


def _rendered(tokenizer: Tokenizer, prompt: str) -> list[int]:
    return list(chat_prompt([{"role": "user", "content": prompt}], tokenizer=tokenizer).ids)


def _agreement(
    model: Loaded, tokenizer: Tokenizer, fixture: Fixture, ids: list[int], ids_of: Mapping[bytes, int], strict: bool
) -> Agreement:
    known = [ids_of[step.selected] for step in fixture.steps if step.selected in ids_of]
    if len(known) < len(fixture.steps):
        unknown = next(step.selected for step in fixture.steps if step.selected not in ids_of)
        failure = f"{_shown(unknown)} was selected, which this vocabulary does not have as one token"
        return Agreement(fixture.id, len(ids), len(fixture.steps), 0, 0, 0, 0.0, (failure,))
    selected = compared = missing = 0
    largest, failures = 0.0, []
    rows = following(model, ids, known, strict=strict)
    for i, (step, row_V) in enumerate(zip(fixture.steps, rows, strict=True)):
        ours = tokenizer.token_bytes(int(row_V.argmax()))
        selected += ours == step.selected
        if ours != step.selected:
            failures.append(f"step {i}: {_shown(step.selected)} was selected, the model selects {_shown(ours)}")
        differences = {token: abs(float(row_V[ids_of[token]]) - logprob) for token, logprob in step.top if token in ids_of}
        compared += len(differences)
        missing += len(step.top) - len(differences)
        largest = max([largest, *differences.values()])
        failures += [
            f"step {i}: the log-probability of {_shown(token)} differs by {difference:.2f}"
            for token, difference in differences.items()
            if difference >= LIMIT
        ]
    return Agreement(fixture.id, len(ids), len(fixture.steps), selected, compared, missing, largest, tuple(failures))


def _shown(token: bytes) -> str:
    return repr(token.decode("utf-8", "backslashreplace"))


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number and words of each line that is neither empty nor a comment. Checks its kind and its number of words."""
    for number, line in enumerate(_text(path).split("\n"), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        form = _WORDS.get(words[0])
        if form is None:
            raise InputError(f"{path}: line {number}: {words[0][:20]!r} is unknown; lines are case, step, top and end")
        if len(words) != 1 + len(form.split()):
            raise InputError(f"{path}: line {number}: {len(words)} words; the form is: {words[0]} {form}".rstrip())
        yield number, words


def _steps(lines: Iterator[tuple[int, list[str]]], count: int, name: str) -> tuple[Step, ...]:
    """Read the steps of one record up to its `end`."""
    found: list[tuple[bytes, int, list[tuple[bytes, float]]]] = []
    file = name.partition(": case")[0]
    for number, words in lines:
        at = f"{file}: line {number}"
        if found and words[0] != "top" and len(found[-1][2]) != found[-1][1]:
            raise InputError(f"{at}: step {len(found) - 1} promised {found[-1][1]} top lines and has {len(found[-1][2])}")
        if words[0] == "end":
            if len(found) != count:
                raise InputError(f"{at}: {name.rpartition(': ')[2]} promised {count} steps and has {len(found)}")
            return tuple(Step(selected, tuple(top)) for selected, _, top in found)
        if words[0] == "case":
            break
        if words[0] == "step":
            if _integer(words[1], 0, f"{at}: I") != len(found) or len(found) == count:
                raise InputError(f"{at}: step {words[1]}; steps count from 0 to {count - 1}")
            found.append((_bytes(words[2], at), _integer(words[3], 0, f"{at}: COUNT"), []))
        elif not found or len(found[-1][2]) == found[-1][1]:
            raise InputError(f"{at}: one top line more than the step before it promised")
        else:
            found[-1][2].append((_bytes(words[1], at), _logprob(words[2], at)))
    raise InputError(f"{name}: no line 'end' closes it")


def _integer(word: str, minimum: int, name: str) -> int:
    if not (word.isascii() and word.isdigit() and len(word) <= 9 and int(word) >= minimum):
        raise InputError(f"{name} is {word[:20]!r}; it must be an integer of at least {minimum}")
    return int(word)


def _bytes(word: str, at: str) -> bytes:
    try:
        return bytes.fromhex(word)
    except ValueError:
        raise InputError(f"{at}: HEX is {word[:20]!r}; it must be pairs of hexadecimal digits") from None


def _logprob(word: str, at: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{at}: LOGPROB is {word[:20]!r}; it must be a finite number")
    return value


def _text(path: Path) -> str:
    try:
        return read_regular(path).decode()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}") from error

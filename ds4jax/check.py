"""Whether drafting changes anything, on the user's own machine and weights: the lossless test.

Every comparison is between two uses of one compiled program, as a user's own calls are: depth 0 against each depth of the same
model, at one buffer size and one value of `strict`. Compared are the tokens and the fingerprints of the logits that they were
chosen from, so that a difference shows before it is large enough to change a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ds4jax.errors import InputError
from ds4jax.generation import Prompt, Result

if TYPE_CHECKING:
    from ds4jax.language_model import LanguageModel

HELDOUT = Path(__file__).parent / "assets" / "heldout.txt"
LENGTHS, NEW_TOKENS = (3, 128, 500), 96
LONG_LENGTHS, LONG_NEW_TOKENS = (1, 3, 127, 128, 129, 500), 256
BOTH = (False, True)


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        prompt_tokens, strict: of both calls.
        draft: the depth of the call that is judged.
        against: the depth of the call that it is held to; its own means that the same call was made twice.
        tokens, tokens_per_step: of the call that is judged.
        difference: where the two first differ, in words; None where they are equal.
    """

    prompt_tokens: int
    strict: bool
    draft: int
    against: int
    tokens: int
    tokens_per_step: float
    difference: str | None

    def __str__(self) -> str:
        mode, against = "strict" if self.strict else "default", "itself again" if self.draft == self.against else "draft 0"
        told = "equal" if self.difference is None else f"DIFFERENT: {self.difference}"
        return (
            f"prompt {self.prompt_tokens:<4} {mode:<7}  draft {self.draft} against {against:<12}  "
            f"{self.tokens} tokens, {self.tokens_per_step:.2f} a step: {told}"
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be compared.

    Attributes:
        prompts: int32 [T] each.
        new_tokens: tokens that follow each prompt; the end of the text is ignored.
        stricts: values of `strict`.
        depths: drafts a step that are held to none; empty for a model that cannot draft.
        left_out: lengths of prompts for which the context has no room.
        source: what the prompts are.
    """

    prompts: tuple[np.ndarray, ...]
    new_tokens: int
    stricts: tuple[bool, ...]
    depths: tuple[int, ...]
    left_out: tuple[int, ...]
    source: str

    @property
    def comparisons(self) -> int:
        """How many rows the plan gives."""
        return len(self.prompts) * len(self.stricts) * (len(self.depths) + 1 + bool(self.depths))


@dataclasses.dataclass(frozen=True)
class Report:
    """What `check` found: the plan and a row for each comparison. Printed, it is a line for each and the verdict."""

    plan: Plan
    rows: tuple[Row, ...]

    @property
    def equal(self) -> bool:
        """Whether nothing differed."""
        return all(row.difference is None for row in self.rows)

    @property
    def verdict(self) -> str:
        """One line that says whether anything differed."""
        different = sum(row.difference is not None for row in self.rows)
        if different:
            return f"{different} of {len(self.rows)} comparisons differ"
        return f"all {len(self.rows)} comparisons equal, in every token and every bit of the logits it was chosen from"

    def __str__(self) -> str:
        return "\n".join([*map(str, self.rows), self.verdict])


def difference(expected: Result, found: Result) -> str | None:
    """Where two results first differ, in words; None where tokens and fingerprints are equal."""
    length = min(len(expected.ids), len(found.ids))
    for i in range(length):
        if expected.ids[i] != found.ids[i]:
            return f"new token {i + 1} is {found.ids[i]}, not {expected.ids[i]}"
        if not np.array_equal(expected.fingerprints[i], found.fingerprints[i]):
            return f"new token {i + 1} is the same, the bits of its logits are not"
    if len(expected.ids) != len(found.ids):
        return f"it has {len(found.ids)} new tokens, not {len(expected.ids)}"
    if not np.array_equal(expected.fingerprints, found.fingerprints):
        return "the bits of the stop token's logits are not the same"
    return None


def plan(model: LanguageModel, prompt: Prompt | None = None, *, long: bool = False, strict: bool | None = None) -> Plan:
    """What `check` compares; the arguments are those of `LanguageModel.check`.

    Raises:
        InputError: a prompt that cannot be used, or no prompt for which the context has room.
    """
    new_tokens = LONG_NEW_TOKENS if long else NEW_TOKENS
    given, source = _prompts(model, LONG_LENGTHS if long else LENGTHS) if prompt is None else ([model.encode(prompt)], "given")
    fit = [ids for ids in given if len(ids) + new_tokens <= model.config.max_context]
    left_out = tuple(len(ids) for ids in given if len(ids) + new_tokens > model.config.max_context)
    if not fit:
        raise InputError(
            f"{model.path or 'the model'}: its context of {model.config.max_context} has no room for a prompt of {left_out[0]} "
            f"tokens and {new_tokens} new ones"
        )
    return Plan(
        tuple(fit),
        new_tokens,
        BOTH if strict is None else (strict,),
        tuple(range(1, 1 + model.max_draft)) if model.config.n_mtp else (),
        left_out,
        source,
    )


def _prompts(model: LanguageModel, lengths: Sequence[int]) -> tuple[list[np.ndarray], str]:
    """A prompt of each length, and what they are."""
    if model.tokenizer is None:
        random = np.random.default_rng(0)
        ids = random.integers(0, model.config.vocab_size, max(lengths), np.int32)
        return [ids[:length] for length in lengths], "random tokens, since there is no tokenizer"
    text = HELDOUT.read_text("utf-8")
    ids = np.array([model.config.bos_id, *model.tokenizer.encode(text)], np.int32)
    return [ids[:length] for length in lengths], "the held-out text"


def compare(model: LanguageModel, plan: Plan) -> Iterator[Row]:
    """The comparisons of a plan, one after the other."""
    for prompt in plan.prompts:
        for strict in plan.stricts:

            def run(draft: int, prompt: np.ndarray = prompt, strict: bool = strict) -> Result:
                return model.generate(prompt, max_new_tokens=plan.new_tokens, ignore_eos=True, strict=strict, draft=draft)

            plain = run(0)
            yield _row(plain, run(0))
            last = plain
            for depth in plan.depths:
                last = run(depth)
                yield _row(plain, last)
            if plan.depths:
                yield _row(last, run(plan.depths[-1]))


def _row(expected: Result, found: Result) -> Row:
    return Row(
        prompt_tokens=len(found.prompt_ids),
        strict=found.strict,
        draft=int(found.draft),
        against=int(expected.draft),
        tokens=len(found.ids),
        tokens_per_step=found.tokens_per_step,
        difference=difference(expected, found),
    )


def check(model: LanguageModel, prompt: Prompt | None = None, *, long: bool = False, strict: bool | None = None) -> Report:
    """Make every comparison; the arguments are those of `LanguageModel.check`, which says what they mean."""
    planned = plan(model, prompt, long=long, strict=strict)
    return Report(planned, tuple(compare(model, planned)))


def fields(row: Row) -> dict[str, Any]:
    """A comparison as JSON holds it."""
    told = dataclasses.asdict(row) | {"tokens_per_step": round(row.tokens_per_step, 4)}
    return told | {"equal": row.difference is None}

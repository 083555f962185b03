"""The lossless check: whether drafting changes the output, on the user's own machine and weights.

Each comparison makes two calls of one compiled program, like a user's own calls: depth 0 and each other depth of the same model,
with one buffer size and one value of `strict`. It compares the tokens and the fingerprints of their logits. A fingerprint shows a
difference before it is large enough to change a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ds4jax.bounds import HELD_OUT_TEXT
from ds4jax.engine.costs import costs_of
from ds4jax.engine.generation import Generation
from ds4jax.engine.loaded import Loaded
from ds4jax.engine.options import Options, Result
from ds4jax.errors import InputError
from ds4jax.text.prompt import Prompt

LENGTHS, NEW_TOKENS = (3, 128, 500), 96
LONG_LENGTHS, LONG_NEW_TOKENS = (1, 3, 127, 128, 129, 500), 256
BOTH = (False, True)


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        prompt_tokens: length of the prompt of both calls.
        strict: mode of both calls.
        draft: depth of the checked call.
        against: depth of the reference call. If it equals `draft`, the same call was made twice.
        tokens, tokens_per_step: figures of the checked call.
        difference: the first difference, in words; None if the calls are equal.
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
        result = "equal" if self.difference is None else f"DIFFERENT: {self.difference}"
        return (
            f"prompt {self.prompt_tokens:<4} {mode:<7}  draft {self.draft} against {against:<12}  "
            f"{self.tokens} tokens, {self.tokens_per_step:.2f} a step: {result}"
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """The comparisons to make.

    Attributes:
        prompts: int32 [T] each.
        new_tokens: tokens to generate after each prompt; the end-of-text token does not stop it.
        stricts: values of `strict`.
        depths: drafts per step to compare with depth 0; empty for a model that cannot draft.
        left_out: lengths of the prompts that do not fit in the context.
        source: where the prompts come from, in words.
    """

    prompts: tuple[np.ndarray, ...]
    new_tokens: int
    stricts: tuple[bool, ...]
    depths: tuple[int, ...]
    left_out: tuple[int, ...]
    source: str

    @property
    def comparisons(self) -> int:
        """Number of comparisons."""
        return len(self.prompts) * len(self.stricts) * (len(self.depths) + 1 + bool(self.depths))


@dataclasses.dataclass(frozen=True)
class Report:
    """Result of `check`: the plan and a row for each comparison. `print` shows a line per row and the verdict."""

    plan: Plan
    rows: tuple[Row, ...]

    @property
    def equal(self) -> bool:
        """Whether all comparisons are equal."""
        return all(row.difference is None for row in self.rows)

    @property
    def verdict(self) -> str:
        """One line: all comparisons are equal, or how many differ."""
        different = sum(row.difference is not None for row in self.rows)
        if different:
            return f"{different} of {len(self.rows)} comparisons differ"
        return f"all {len(self.rows)} comparisons equal, in every token and every bit of the logits it was chosen from"

    def __str__(self) -> str:
        return "\n".join([*map(str, self.rows), self.verdict])


def difference(expected: Result, found: Result) -> str | None:
    """The first difference between two results, in words; None if tokens and fingerprints are equal."""
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


def plan(model: Loaded, prompt: Prompt | None = None, *, long: bool = False, strict: bool | None = None) -> Plan:
    """The comparisons that `check` makes. `LanguageModel.check` documents the arguments.

    Raises:
        InputError: the prompt is invalid, or no prompt fits in the context.
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
        tuple(range(1, 1 + model.max_draft)) if model.drafter_name != "none" else (),
        left_out,
        source,
    )


def _prompts(model: Loaded, lengths: Sequence[int]) -> tuple[list[np.ndarray], str]:
    """A prompt of each length, and their source in words."""
    if model.tokenizer is None:
        random = np.random.default_rng(0)
        ids = random.integers(0, model.config.vocab_size, max(lengths), np.int32)
        return [ids[:length] for length in lengths], "random tokens, since there is no tokenizer"
    text = HELD_OUT_TEXT.read_text("utf-8")
    ids = np.array([model.config.bos_id, *model.tokenizer.encode(text)], np.int32)
    return [ids[:length] for length in lengths], "the held-out text"


def compare(model: Loaded, plan: Plan) -> Iterator[Row]:
    """Make the comparisons of a plan, and yield a row for each."""
    for prompt in plan.prompts:
        for strict in plan.stricts:

            def run(draft: int, prompt: np.ndarray = prompt, strict: bool = strict) -> Result:
                return generated(model, prompt, Options(plan.new_tokens, ignore_eos=True, strict=strict, draft=draft))

            plain = run(0)
            yield _row(plain, run(0))
            last = plain
            for depth in plan.depths:
                last = run(depth)
                yield _row(plain, last)
            if plan.depths:
                yield _row(last, run(plan.depths[-1]))


def generated(model: Loaded, prompt: np.ndarray, options: Options) -> Result:
    """Generate a continuation in one call of the loop."""
    generation = Generation(model, prompt, options, costs=costs_of(model, options))
    generation.advance(options.max_new_tokens)
    return generation.result()


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


def check(model: Loaded, prompt: Prompt | None = None, *, long: bool = False, strict: bool | None = None) -> Report:
    """Make all comparisons and return the report. `LanguageModel.check` documents the arguments."""
    planned = plan(model, prompt, long=long, strict=strict)
    return Report(planned, tuple(compare(model, planned)))


def fields(row: Row) -> dict[str, Any]:
    """The JSON fields of a comparison."""
    return dataclasses.asdict(row) | {"tokens_per_step": round(row.tokens_per_step, 4), "equal": row.difference is None}

"""How many tokens a step of speculative decode gives on continuations of a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from ds4jax.decode.sampling import Sampling
from ds4jax.errors import InputError
from ds4jax.language_model import LanguageModel

# Tokens of the shortest and of the longest prompt, and new tokens after each.
SHORTEST, LONGEST = 64, 200
NEW_TOKENS = 128


@dataclasses.dataclass(frozen=True)
class Drafting:
    """Result of `measure`.

    Attributes:
        prompts: number of continuations.
        tokens, steps: of all of them.
        acceptance: for each draft of a step, the share that was accepted where the drafts before it were.
    """

    prompts: int
    tokens: int
    steps: int
    acceptance: tuple[float, ...]

    @property
    def tokens_per_step(self) -> float:
        """Tokens of all continuations by their steps."""
        return self.tokens / self.steps


def measure(
    model: LanguageModel, text: str, prompts: int, sampling: Sampling, *, progress: Callable[[int, int], None] | None = None
) -> Drafting:
    """Continue pieces of a text, each by 128 tokens with all drafts that the model's program can make.

    The pieces are spread evenly over the text, and have 64 to 200 tokens after the begin-of-sentence token.

    Args:
        progress: called after each continuation with their number and the total.

    Raises:
        InputError: the model has no tokenizer or no drafter, or the text is shorter than the longest piece.
    """
    if model.tokenizer is None or not model.max_draft:
        lacking = "drafter" if model.tokenizer else "tokenizer"
        raise InputError(f"{model.path or 'the model'}: {lacking}: none here; continuations of a text with drafts need one")
    ids = model.tokenizer.encode(text)
    if len(ids) < LONGEST:
        raise InputError(f"the text has {len(ids)} tokens; continuations need at least {LONGEST}")
    starts = np.linspace(0, len(ids) - LONGEST, prompts).astype(int)
    sizes = np.linspace(SHORTEST, LONGEST, prompts).astype(int)
    tokens = steps = 0
    stood, tried = np.zeros(model.max_draft), np.zeros(model.max_draft)
    for done, (start, size) in enumerate(zip(starts, sizes, strict=True), 1):
        prompt = [model.config.bos_id, *ids[start : start + size]]
        options = {"max_new_tokens": NEW_TOKENS, "sampling": sampling, "ignore_eos": True, "draft": model.max_draft}
        result = model.generate(prompt, **options)
        tokens, steps = tokens + len(result.ids), steps + result.steps
        count = float(result.steps)
        for i, share in enumerate(result.acceptance):
            # A draft counts where those before it were accepted.
            tried[i] += count
            count *= share
            stood[i] += count
        if progress:
            progress(done, prompts)
    acceptance = tuple(float(s / t) for s, t in zip(stood, tried, strict=True) if t)
    return Drafting(prompts, tokens, steps, acceptance)

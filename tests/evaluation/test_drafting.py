"""Tokens a step on continuations of a text: which prompts, and how steps and shares add up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ds4jax import InputError
from ds4jax.decode.sampling import Sampling
from ds4jax.evaluation.drafting import measure


class Scripted:
    """A model of letters whose continuations take 32 and 64 steps in turn."""

    path, max_draft, config = None, 2, SimpleNamespace(bos_id=7)
    tokenizer = SimpleNamespace(encode=lambda text: [ord(letter) for letter in text])

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []

    def generate(self, prompt: list[int], **options: object) -> SimpleNamespace:
        self.prompts.append(prompt)
        assert options["draft"] == 2
        if len(self.prompts) % 2:
            return SimpleNamespace(ids=[0] * 128, steps=32, acceptance=(1.0, 1.0))
        return SimpleNamespace(ids=[0] * 128, steps=64, acceptance=(0.5,))


def test_steps_and_shares_of_all_continuations() -> None:
    model, seen = Scripted(), []
    text = "".join(chr(200 + place % 50) for place in range(1000))
    result = measure(model, text, 3, Sampling(), progress=lambda done, total: seen.append((done, total)))
    assert [len(prompt) for prompt in model.prompts] == [65, 133, 201]
    assert all(prompt[0] == 7 for prompt in model.prompts)
    assert model.prompts[2][1] == 200 + 800 % 50
    assert (result.prompts, result.tokens, result.steps) == (3, 384, 128)
    assert result.tokens_per_step == 3
    assert result.acceptance == pytest.approx((96 / 128, 64 / 64))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_short_text_and_a_model_without_drafts() -> None:
    with pytest.raises(InputError, match="^the text has 5 tokens; continuations need at least 200$"):
        measure(Scripted(), "short", 3, Sampling())
    model = Scripted()
    model.max_draft = 0
    with pytest.raises(InputError, match="^the model: drafter: none here; "):
        measure(model, "text", 3, Sampling())

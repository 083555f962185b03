"""The figures of `ds4jax eval`, on models whose every probability is known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4jax.cli.commands.eval import _agreement
from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.evaluation.evaluate import Score, evaluate, windows

VOCABULARY = 256


class Bigrams:
    """A model of bytes whose logits depend on the last token alone; its MTP block agrees after even tokens, else it does not."""

    def __init__(self, max_context: int, n_mtp: int = 1):
        self.path = None
        self.config = Config(vocab_size=VOCABULARY, max_context=max_context, n_mtp=n_mtp)
        self.tokenizer = SimpleNamespace(encode=lambda text: list(text.encode()))
        self.table = np.random.default_rng(0).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32) * 3
        self.longest = 0

    def logits(self, ids: np.ndarray, *, mtp: bool, strict: bool) -> dict[str, np.ndarray]:
        self.longest = max(self.longest, len(ids))
        arrays = {"ids": ids, "logits": self.table[ids]}
        if mtp:
            sign = np.where(ids[1:, None] % 2 == 0, 1, -1).astype(np.float32)
            arrays["mtp_logits"] = sign * self.table[ids[1:]]
        return arrays


@given(count=st.integers(1, 5000), size=st.integers(2, 1500))
def test_windows_count_every_token_once(count: int, size: int) -> None:
    counted = []
    for start, stop, first in windows(count, size):
        assert 0 < stop - start <= size
        assert start <= first < stop
        assert start == 0 or (stop - start == size and first - start >= size - size // 2)
        counted += range(first + 1, stop + 1)
    assert counted == list(range(1, count + 1))


@pytest.mark.parametrize("max_context", [16, 100, 4096])
def test_bits_and_agreement(max_context: int) -> None:
    model = Bigrams(max_context)
    text = "In the beginning God created the heaven and the earth. “é”\n" * 40
    ids = np.array([model.config.bos_id, *text.encode()])
    probability = np.exp(model.table.astype(np.float64))
    probability /= probability.sum(-1, keepdims=True)
    score = evaluate(model, text)
    assert score.tokens == score.bytes == len(ids) - 1
    assert score.bits_per_byte == pytest.approx(-np.log2(probability[ids[:-1], ids[1:]]).sum() / score.bytes, rel=1e-9)
    assert score.mtp_agreement == pytest.approx(np.mean(ids[1:-1] % 2 == 0), rel=1e-12)
    assert model.longest == min(max_context, 1024)


def test_without_an_mtp_block() -> None:
    assert evaluate(Bigrams(64, n_mtp=0), "text").mtp_agreement is None


def test_a_single_token_has_no_draft_before_it() -> None:
    assert evaluate(Bigrams(64), "a").mtp_agreement is None


def test_nothing_to_score() -> None:
    with pytest.raises(InputError, match="empty"):
        evaluate(Bigrams(64), "")
    model = Bigrams(64)
    model.tokenizer = None
    with pytest.raises(InputError, match="tokenizer"):
        evaluate(model, "text")


@pytest.mark.parametrize(
    ("share", "stages", "words"),
    [
        (0.717, 0, "71.7% (first draft equals the model's own most likely token)"),
        (None, 3, "no MTP block was read; DSpark drafts, and --prompts N counts its tokens a step"),
        (None, 0, "no MTP block"),
    ],
)
def test_agreement_in_words(share: float | None, stages: int, words: str) -> None:
    assert _agreement(Score(1, 1, 1.0, share), SimpleNamespace(config=SimpleNamespace(n_dspark=stages))) == words

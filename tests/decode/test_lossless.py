"""Contract 2: within one program, drafting at any depth says what plain decode says, to the last bit of every logit."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from numerics import arrays, assert_bits_equal, golden_transformer, short_transformer

import ds4jax
from ds4jax.bounds import SHIPPED
from ds4jax.cache import capacity as buckets
from ds4jax.engine.options import Result
from ds4jax.language_model import LanguageModel

MOST = 4
# What `generate` compiles for by default, and texts that its smallest cache holds: no program that other tests do not need too.
ORDINARY, QUICK = 2, {"prompts": (3, 128), "tokens": 96, "drafts": (1, 2)}
SHORT = {"prompts": (3, 128, 500), "tokens": 96, "drafts": (2, 4)}
WHOLE = {"prompts": (1, 3, 127, 128, 129, 500), "tokens": 256, "drafts": (1, 2, 3, 4)}


@functools.cache
def opened(name: str, most: int = MOST) -> LanguageModel:
    if name == "tiny":
        return ds4jax.load(max_draft=most)
    return LanguageModel(short_transformer() if name == "short" else golden_transformer(), None, max_draft=most)


@functools.cache
def ids(name: str) -> np.ndarray:
    if name != "tiny":
        return np.resize(arrays("golden")["ids"], 4096)
    return opened(name).encode((SHIPPED.parent / "heldout.txt").read_text()[:12_000])


@pytest.fixture
def one_bucket(monkeypatch):
    """Short and long prompts in one program: each further one would cost a compilation."""
    monkeypatch.setattr(buckets, "MIN_CAPACITY", 1024)


def assert_same(drafted: Result, plain: Result) -> None:
    assert drafted.ids == plain.ids
    assert drafted.finish_reason == plain.finish_reason
    assert_bits_equal(drafted.fingerprints, plain.fingerprints)
    assert len(plain.fingerprints) == len(plain.ids)


def check(name: str, strict: bool, *, prompts: tuple[int, ...], tokens: int, drafts: tuple[int, ...], most: int = MOST) -> None:
    model = opened(name, most)
    for length in prompts:
        options = {"max_new_tokens": tokens, "ignore_eos": True, "strict": strict}
        plain = model.generate(ids(name)[:length], draft=0, **options)
        assert len(plain.ids) == tokens
        assert len({tuple(mark) for mark in plain.fingerprints.tolist()}) > tokens // 2, "fingerprints tell logits apart"
        for draft in drafts:
            assert_same(model.generate(ids(name)[:length], draft=draft, **options), plain)


@pytest.mark.long
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_drafting_changes_no_bit_of_ordinary_use(strict):
    check("tiny", strict, **QUICK, most=ORDINARY)


@pytest.mark.long
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [pytest.param("tiny", marks=pytest.mark.slow), "short"])
def test_drafting_changes_no_bit(name, strict, one_bucket):
    check(name, strict, **SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["tiny", "golden"])
def test_drafting_changes_no_bit_in_the_full_matrix(name, strict, one_bucket):
    check(name, strict, **WHOLE)


@pytest.mark.gpu
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["tiny", "golden"])
def test_drafting_changes_no_bit_on_the_gpu(name, strict, one_bucket):
    check(name, strict, **WHOLE)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_long_prompt(strict):
    """More than 2,052 tokens, where the original's definitions of attention part: plain and drafted streams."""
    prompt, tokens = ids("tiny")[:2100], 32
    assert len(prompt) == 2100
    options = {"max_new_tokens": tokens, "ignore_eos": True, "strict": strict}
    plain = opened("tiny").generate(prompt, draft=0, **options)
    drafted = opened("tiny").generate(prompt, draft=2, **options)
    assert drafted.steps < tokens
    assert_same(drafted, plain)


@pytest.mark.long
def test_drafting_pays_on_text_that_it_was_not_trained_on():
    """1.5 tokens a step and more at draft 2; the README prints the figures."""
    model = ds4jax.load()
    prompts = [ids("tiny")[start : start + 64] for start in (0, 600, 1200, 1800)]
    results = [model.generate(prompt, max_new_tokens=96, ignore_eos=True) for prompt in prompts]
    tokens, steps = sum(len(result.fingerprints) for result in results), sum(result.steps for result in results)
    assert tokens / steps >= 1.5

"""Engines of small models, and the result that a request has alone."""

from __future__ import annotations

import functools
import random
import time
from typing import Any

import numpy as np
from numerics import assert_bits_equal
from small_models import DRAFTS, shallow_model, small_model, text

import ds4jax
from ds4jax.bounds import HELD_OUT_TEXT
from ds4jax.decode.drafters.ngram import NgramDrafter
from ds4jax.decode.sampling import Sampling
from ds4jax.engine.engine import Engine
from ds4jax.engine.request import RequestResult
from ds4jax.random_models import checkpoint as random_models
from ds4jax.random_models import layouts

CONTEXT, CHUNK, SLOTS = 256, 32, 4
FLASH_LAYERS = 6
# Cache and strict; or the model in the package, whose drafts stand; or models whose steps go by kernels on a GPU, a small one
# with two slots and the first layers of V4-Flash at full widths. Without a case, one layer and drafts copied from the text.
Case = tuple[str, bool] | str | None
tiny_model = functools.cache(ds4jax.load)


@functools.cache
def q2_model() -> ds4jax.LanguageModel:
    whole = random_models.checkpoint(layouts.SMALL_Q2, "small-q2")
    return ds4jax.LanguageModel(random_models.synthetic(whole), None, max_draft=2)


@functools.cache
def flash_model() -> ds4jax.LanguageModel:
    whole = random_models.checkpoint(random_models.config_of("flash-q2", FLASH_LAYERS), "flash-q2")
    return ds4jax.LanguageModel(random_models.synthetic(whole), None, max_draft=2)


def engine(case: Case = None, **options: Any) -> Engine:
    options = {"slots": SLOTS, "context": CONTEXT} | options
    if case in ("tiny", "q2", "flash"):
        # Such calls that prompts of the tests fill some, also on a GPU, where a kept call is 256 rows wide by default.
        options = {"chunk": 2 * CHUNK} | options
    if case == "tiny":
        return Engine(tiny_model(), **options)
    if case == "q2":
        return Engine(q2_model(), **options | {"slots": 2})
    if case == "flash":
        return Engine(flash_model(), **options)
    options = {"chunk": CHUNK} | options
    if case is None:
        return Engine(shallow_model(), drafter=NgramDrafter(), **options)
    return Engine(small_model(case[0]), strict=case[1], **options)


def prompt(case: Case, start: int, length: int) -> np.ndarray:
    if case == "tiny":
        return tiny_model().encode(HELD_OUT_TEXT.read_text()[:4000])[start : start + length]
    return text(start, length)


@functools.cache
def alone(case: Case, start: int, length: int, fields: tuple[tuple[str, Any], ...]) -> RequestResult:
    """The result of a request in a new engine."""
    with engine(case) as one:
        return one.submit(prompt(case, start, length), **dict(fields)).result()


def assert_same(actual: RequestResult, expected: RequestResult) -> None:
    count = len(actual.ids)
    if actual.finish_reason != "cancelled":
        assert (actual.finish_reason, count) == (expected.finish_reason, len(expected.ids))
        assert len(actual.fingerprints) == len(expected.fingerprints)
    assert actual.ids == expected.ids[:count]
    assert_bits_equal(actual.fingerprints, expected.fingerprints[: len(actual.fingerprints)])
    assert actual.seed == expected.seed


def drawn(dice: random.Random) -> tuple[int, int, tuple[tuple[str, Any], ...]]:
    """A request of any kind; some begin like others, and end in other ways."""
    sampling = Sampling() if dice.random() < 0.5 else Sampling(dice.choice([0.7, 1.1]), top_p=0.95, seed=dice.randrange(2**40))
    length = dice.choice([1, 2, CHUNK, CHUNK + 1, 2 * CHUNK + 5, 140, dice.randrange(1, 150)])
    fields = {
        "max_new_tokens": dice.randrange(1, 90),
        "sampling": sampling,
        "draft": dice.choice([0, 1, DRAFTS, None, "auto"]),
        "stop": tuple(dice.randrange(512) for _ in range(dice.choice([0, 0, 7]))),
        "ignore_eos": dice.random() < 0.5,
    }
    return dice.choice([0, 0, 60, 120]), length, tuple(fields.items())


def mixed(one: Engine, case: Case, count: int, seed: int) -> None:
    """Submit requests at random times, cancel some, and compare each with itself alone."""
    dice = random.Random(seed)
    wishes = [drawn(dice) for _ in range(count)]
    requests = []
    for start, length, fields in wishes:
        requests.append(one.submit(prompt(case, start, length), **dict(fields)))
        if dice.random() < 0.3:
            time.sleep(dice.random() * 0.1)
        if dice.random() < 0.2:
            dice.choice(requests).cancel()
    for wish, request in zip(wishes, requests, strict=True):
        result = request.result(600)
        assert result.finish_reason != "cancelled" or request.cancelled
        assert_same(result, alone(case, *wish))
    assert one.running == one.waiting == 0
    results = [request.result() for request in requests]
    assert any(result.reused for result in results), "hits of the prefix cache"
    if case == "tiny":
        assert any(share > 0.3 for result in results for share in result.acceptance), "drafts that stand"

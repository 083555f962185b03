"""Engines of small models, and the result that a request has alone."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numerics import assert_bits_equal
from small_models import shallow_model, small_model, text

import ds4jax
from ds4jax.bounds import HELD_OUT_TEXT
from ds4jax.decode.drafters.ngram import NgramDrafter
from ds4jax.engine.engine import Engine
from ds4jax.engine.request import RequestResult
from ds4jax.random_models import checkpoint as random_models
from ds4jax.random_models import layouts

CONTEXT, CHUNK, SLOTS = 256, 32, 4
# Cache and strict; or the model in the package, whose drafts stand, or one whose eight rows of two slots go by kernels on a GPU.
# Without a case, one layer and drafts copied from the text.
Case = tuple[str, bool] | str | None
tiny_model = functools.cache(ds4jax.load)


@functools.cache
def q2_model() -> ds4jax.LanguageModel:
    whole = random_models.checkpoint(layouts.SMALL_Q2, "small-q2")
    return ds4jax.LanguageModel(random_models.synthetic(whole), None, max_draft=2)


def engine(case: Case = None, **options: Any) -> Engine:
    options = {"slots": SLOTS, "context": CONTEXT} | options
    if case == "tiny":
        return Engine(tiny_model(), **options)
    if case == "q2":
        return Engine(q2_model(), **options | {"slots": 2})
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

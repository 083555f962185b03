"""A slice of V4-Flash on two GPUs has the bits of one, in steps and in a prompt. `ds4jax bench mesh` compares whole models."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from numerics import assert_bits_equal

from ds4jax.language_model import LanguageModel, from_checkpoint
from ds4jax.random_models import checkpoint as synthetic

pytestmark = pytest.mark.gpu
# Layers of every kind, both routers.
LAYOUT, LAYERS = "flash-q2", 4


@pytest.fixture(autouse=True)
def two_gpus() -> None:
    """Skip these tests on a single GPU."""
    if jax.device_count() < 2:
        pytest.skip("it needs two GPUs")


@functools.cache
def model(devices: int) -> LanguageModel:
    """The slice on so many GPUs."""
    config = synthetic.config_of(LAYOUT, LAYERS)
    return from_checkpoint(synthetic.checkpoint(config, LAYOUT), devices=devices, max_draft=0)


def logits(devices: int, length: int, decode_from: int) -> np.ndarray:
    """Logits of a sequence, one token at a time from `decode_from` on."""
    one = model(devices)
    ids = np.random.default_rng(0).integers(0, one.config.vocab_size, length, dtype=np.int32)
    return one.logits(ids, decode_from=decode_from)["logits"]


def test_weights_have_the_bits_of_one_gpu() -> None:
    assert model(2).fingerprint == model(1).fingerprint


def test_steps_have_the_bits_of_one_gpu() -> None:
    assert_bits_equal(logits(2, 24, 0), logits(1, 24, 0))


@pytest.mark.parametrize("length", [64, 256])
def test_a_prompt_has_the_bits_of_one_gpu(length: int) -> None:
    assert_bits_equal(logits(2, length, length), logits(1, length, length))

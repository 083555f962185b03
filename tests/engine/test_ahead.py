"""Calls of a fixed number of steps, ahead of their reader, as a GPU runs them: same tokens, same bits, same end."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_bits_equal
from oracle import visible
from small_models import DRAFTS, small_model, text

from ds4jax import Sampling
from ds4jax.engine import ahead, generation
from ds4jax.engine.generation import Generation

PROMPT, NEW = 21, 23


def streamed(monkeypatch: pytest.MonkeyPatch, steps: int | None, **options: Any) -> Generation:
    monkeypatch.setattr(generation, "fixed_steps", lambda: steps)
    return small_model().stream(text(0, PROMPT), **{"max_new_tokens": NEW, "ignore_eos": True, "draft": 0, **options})


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=3)], ids=["greedy", "sampled"])
def test_fixed_steps_give_the_same_tokens_and_bits_in_pieces(monkeypatch: pytest.MonkeyPatch, sampling: Sampling) -> None:
    whole, at_once, pieces, drafted = (
        streamed(monkeypatch, steps, sampling=sampling, draft=draft)
        for steps, draft in ((None, 0), (ahead.STEPS, 0), (ahead.STEPS, 0), (ahead.STEPS, DRAFTS))
    )
    whole.advance(NEW)
    at_once.advance(NEW)
    assert len(list(pieces)) > 1
    assert len(list(drafted)) > 1
    # Two programs of XLA may differ in the last bit on a CPU, so bits are compared within one.
    # Sampled drafts draw other tokens by the same law.
    for other in (at_once, pieces, *([] if sampling.temperature else [drafted])):
        assert other.ids == whole.ids
        assert_bits_equal(other.result().fingerprints, at_once.result().fingerprints)
        assert other.finish_reason == "length"
    assert (pieces.result().steps, pieces.result().tried) == (at_once.result().steps, at_once.result().tried)
    assert pieces.advance(1) == []


def test_steps_after_the_end_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 2 * ahead.STEPS
    # Its calls end where its tokens end, so no step is in vain.
    expected = streamed(monkeypatch, ahead.STEPS, max_new_tokens=count)
    expected.advance(count)
    stopped = streamed(monkeypatch, ahead.STEPS)
    stopped.prefill()
    stop = expected.ids[-1]
    assert stop not in expected.ids[:-1]
    stopped._limits = dataclasses.replace(stopped._limits, stop_ids=jnp.full((1, 1), stop, jnp.int32))
    stopped.advance(NEW)
    assert stopped.finish_reason == "stop"
    assert stopped.ids == expected.ids[:-1]
    assert stopped.result().steps == count
    ours, theirs = stopped.state, expected.state
    for name in ("count", "last"):
        assert_bits_equal(getattr(ours, name), getattr(theirs, name))
    for name in ("tokens", "fingerprints"):
        assert_bits_equal(getattr(ours, name)[:, :count], getattr(theirs, name)[:, :count])
    seen, wanted = visible(small_model().config, ours.cache), visible(small_model().config, theirs.cache)
    for name, array in wanted.items():
        assert_bits_equal(seen[name], array)


def test_the_device_has_the_next_call_before_the_last_one_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    running = streamed(monkeypatch, ahead.STEPS)
    running.advance(1)
    # One token was asked for, four were read, and four more are on their way.
    assert int(np.asarray(running.state.count)[0]) == ahead.STEPS * ahead.CALLS
    running.advance(NEW)
    assert int(np.asarray(running.state.count)[0]) == NEW
    assert running.finish_reason == "length"

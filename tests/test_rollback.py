"""Rejection leaves no trace: whatever stands and whatever falls, the state is the one that plain decode reaches."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numerics import arrays, assert_bits_equal, golden_transformer
from oracle import Oracle, continued, prefilled, told, visible

import ds4jax
from ds4jax import decode
from ds4jax.decode import DecodeState, Limits
from ds4jax.depth import Policy
from ds4jax.drafter import MTPDrafter
from ds4jax.language_model import LanguageModel
from ds4jax.sampling import Sampling

MOST = 4
STEPS = 8
ORACLE = Oracle()


@functools.cache
def golden() -> LanguageModel:
    return LanguageModel(golden_transformer(), None, max_draft=MOST)


@functools.cache
def tiny() -> LanguageModel:
    return ds4jax.load(max_draft=MOST)


def prompt(model: LanguageModel, length: int) -> np.ndarray:
    ids = (
        arrays("golden")["ids"]
        if model is golden()
        else model.encode((ds4jax.language_model.SHIPPED.parent / "heldout.txt").read_text()[:3000])
    )
    return np.resize(ids, length)


def assert_same_state(model: LanguageModel, actual: DecodeState, expected: DecodeState) -> None:
    count = int(expected.count)
    assert int(actual.count) == count
    assert int(actual.last) == int(expected.last)
    assert_bits_equal(actual.tokens[:count], expected.tokens[:count])
    assert_bits_equal(actual.fingerprints[:count], expected.fingerprints[:count])
    seen, wanted = visible(model.config, actual.cache), visible(model.config, expected.cache)
    for name, array in wanted.items():
        assert_bits_equal(seen[name], array)


@functools.cache
def plain(model: LanguageModel, length: int, tokens: int, capacity: int) -> tuple[DecodeState, DecodeState, np.ndarray]:
    """The state after a prompt, the state after `tokens` more of plain decode, and the tokens of both by position."""
    ids = prompt(model, length)
    before = told(prefilled(model, ids, capacity, ORACLE), ids, [0] * STEPS)
    after = continued(model, before, tokens, 0, ORACLE)
    return before, after, np.concatenate([ids, np.asarray(after.tokens)[:tokens]])


def check(
    model: LanguageModel, length: int, tokens: int, right: list[int], depth: int = MOST, capacity: int = 512
) -> DecodeState:
    before, after, truth = plain(model, length, tokens, capacity)
    # One token more than is asked for stays unknown to the oracle, as it is to the plain run.
    drafted = continued(model, told(before, truth, right), tokens, depth, ORACLE)
    assert_same_state(model, drafted, after)
    return drafted


@pytest.mark.parametrize("right", range(MOST + 1))
@pytest.mark.parametrize("offset", range(4))
def test_every_acceptance_at_every_alignment(right, offset):
    tokens = 3 * (right + 1)
    state = check(golden(), 20 + offset, tokens, [right] * STEPS)
    assert int(state.acceptance.steps) == 3, "the oracle was not believed as planned"
    np.testing.assert_array_equal(state.acceptance.stood[:right], 3 - (np.arange(right) >= right))


@given(
    st.integers(1, 100), st.integers(1, 30), st.lists(st.integers(0, MOST), min_size=STEPS, max_size=STEPS), st.integers(0, MOST)
)
def test_any_mixture_of_acceptances(length, tokens, right, depth):
    """Golden a: window of 16, blocks of 4 and 16, eight rows chosen; both wrap and overflow many times in this range."""
    check(golden(), length, tokens, right, depth)


@pytest.mark.parametrize("length", [125, 126, 127, 128, 253, 254, 255])
@pytest.mark.parametrize("right", [0, 1, 2, 3, 4])
@pytest.mark.long
def test_around_the_real_window_and_blocks(length, right):
    """The shipped model: window and blocks of 128; at 128 tokens its indexer begins to leave rows out."""
    check(tiny(), length, 7, [right, MOST - right] * (STEPS // 2))


@pytest.mark.long
@pytest.mark.parametrize("right", [[4] * STEPS, [0] * STEPS, [1, 3] * (STEPS // 2), [2] * STEPS])
def test_at_the_end_of_the_context(right):
    model = golden()
    length = model.config.max_context - 11
    state = check(model, length, 11, right, capacity=model.config.max_context)
    # The last token is committed and never goes through the model.
    assert int(state.cache.length[0]) == model.config.max_context - 1


@pytest.mark.parametrize("left", range(1, 7))
def test_a_budget_inside_a_draft(left):
    state = check(golden(), 30, left, [MOST] * STEPS)
    assert int(state.count) == left


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 4])
def test_a_stop_token_inside_a_draft(depth):
    model, tokens = golden(), 12
    before, after, truth = plain(model, 30, tokens, 512)
    said = np.asarray(after.tokens)[:tokens]
    for where in range(1, 6):
        if said[where] in said[:where]:
            continue
        stop = int(said[where])
        expected = continued(model, before, tokens, 0, ORACLE, stop=stop)
        drafted = continued(model, told(before, truth, [depth] * STEPS), tokens, depth, ORACLE, stop=stop)
        assert bool(drafted.stopped)
        assert int(drafted.count) == where + 1
        assert_same_state(model, drafted, expected)


@pytest.mark.long
def test_the_mtp_cache_has_no_holes():
    """After any number of steps it holds what one pass of the block over all committed rows writes."""
    model, drafter, tokens = ds4jax.load(), MTPDrafter(), 40
    ids = prompt(tiny(), 100)
    state = continued(model, prefilled(model, ids, 512, drafter), tokens, 2, drafter)
    assert int(state.acceptance.steps) < tokens, "some drafts stood"
    assert int(state.acceptance.stood[0]) < int(state.acceptance.tried[0]), "some fell"
    committed = np.concatenate([ids, np.asarray(state.tokens)[:tokens]])
    plain = continued(model, prefilled(model, ids, 512, drafter), tokens, 0, drafter)
    for name, array in visible(model.config, plain.cache, plain.drafting.cache).items():
        assert_bits_equal(visible(model.config, state.cache, state.drafting.cache)[name], array)
    whole = prefilled(model, committed, 512, drafter)
    for name, array in visible(model.config, whole.cache, whole.drafting.cache).items():
        # The prompt's products are those of a long call, so this is equal up to int8 rounding of what both multiply.
        assert np.abs(visible(model.config, state.cache, state.drafting.cache)[name] - array).mean() < 0.05, name


@pytest.mark.long
def test_one_executable_holds_target_and_mtp_block_and_updates_the_cache_in_place():
    model, drafter = ds4jax.load(), MTPDrafter()
    state = decode.start(model.config, 512, 1, drafter=drafter, max_draft=model.max_draft)
    limits = Limits(jnp.int32(4), jnp.int32(4), jnp.array([-1], jnp.int32))
    policy = Policy(jnp.int32(2), jnp.ones(1 + model.max_draft, jnp.float32))
    arguments = (model.graph, model.weights, state, limits, Sampling().arrays(), policy)
    lowered = decode.run.__wrapped__.lower(*arguments, drafter=drafter, max_draft=model.max_draft, strict=False)
    text = lowered.as_text(debug_info=True)
    assert text.count("stablehlo.while") >= 1
    for scope in ("layer0", f"layer{model.config.n_layers - 1}", "mtp", "mtp_head", "draft"):
        assert f"{scope}/" in text or f'"{scope}"' in text, scope
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves((state.cache, state.drafting)))


def test_depths_share_the_executable():
    model = golden()
    before, _, truth = plain(model, 20, 3, 512)
    continued(model, told(before, truth, [1] * STEPS), 3, 1, ORACLE)
    compiled = decode.run.__wrapped__._cache_size()
    for depth in range(MOST + 1):
        continued(model, told(before, truth, [2] * STEPS), 5, depth, ORACLE)
    assert decode.run.__wrapped__._cache_size() == compiled

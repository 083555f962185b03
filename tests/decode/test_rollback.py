"""Rejection leaves no trace: whatever stands and whatever falls, the state is the one that plain decode reaches."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numerics import arrays, assert_bits_equal, short_transformer
from oracle import Oracle, continued, prefilled, told, visible

import ds4jax
from ds4jax.bounds import SHIPPED
from ds4jax.decode import loop as decode
from ds4jax.decode.depth import Policy
from ds4jax.decode.drafters.mtp import MTPDrafter
from ds4jax.decode.loop import DecodeState, Limits
from ds4jax.decode.sampling import Filters, Sampling
from ds4jax.language_model import LanguageModel

MOST = 4
STEPS = 8
ORACLE = Oracle()


@functools.cache
def short() -> LanguageModel:
    return LanguageModel(short_transformer(), None, max_draft=MOST)


@functools.cache
def tiny() -> LanguageModel:
    return ds4jax.load(max_draft=MOST)


def prompt(model: LanguageModel, length: int) -> np.ndarray:
    ids = arrays("golden")["ids"] if model is short() else model.encode((SHIPPED.parent / "heldout.txt").read_text()[:3000])
    return np.resize(ids, length)


def assert_same_state(model: LanguageModel, actual: DecodeState, expected: DecodeState) -> None:
    (count,) = expected.count.tolist()
    assert actual.count.tolist() == [count]
    assert actual.last.tolist() == expected.last.tolist()
    assert_bits_equal(actual.tokens[0, :count], expected.tokens[0, :count])
    assert_bits_equal(actual.fingerprints[0, :count], expected.fingerprints[0, :count])
    seen, wanted = visible(model.config, actual.cache), visible(model.config, expected.cache)
    for name, array in wanted.items():
        assert_bits_equal(seen[name], array)


@functools.cache
def plain(model: LanguageModel, length: int, tokens: int, capacity: int) -> tuple[DecodeState, DecodeState, np.ndarray]:
    """The state after a prompt, the state after `tokens` more of plain decode, and the tokens of both by position."""
    ids = prompt(model, length)
    before = told(prefilled(model, ids, capacity, ORACLE), ids, [0] * STEPS)
    after = continued(model, before, tokens, 0, ORACLE)
    return before, after, np.concatenate([ids, np.asarray(after.tokens)[0, :tokens]])


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
    state = check(short(), 20 + offset, tokens, [right] * STEPS)
    assert int(state.acceptance.steps[0]) == 3, "the oracle was not believed as planned"
    np.testing.assert_array_equal(state.acceptance.stood[0, :right], 3 - (np.arange(right) >= right))


@pytest.mark.long
@given(
    st.integers(1, 100), st.integers(1, 30), st.lists(st.integers(0, MOST), min_size=STEPS, max_size=STEPS), st.integers(0, MOST)
)
def test_any_mixture_of_acceptances(length, tokens, right, depth):
    """The short model: window of 16, blocks of 4 and 16, eight rows chosen; both wrap and overflow many times in this range."""
    check(short(), length, tokens, right, depth)


@pytest.mark.parametrize("length", [125, 126, 127, 128, 253, 254, 255])
@pytest.mark.parametrize("right", [0, 1, 2, 3, 4])
@pytest.mark.slow
def test_around_the_real_window_and_blocks(length, right):
    """The shipped model: window and blocks of 128; at 128 tokens its indexer begins to leave rows out."""
    check(tiny(), length, 7, [right, MOST - right] * (STEPS // 2))


@pytest.mark.slow
@pytest.mark.parametrize("right", [[4] * STEPS, [0] * STEPS, [1, 3] * (STEPS // 2), [2] * STEPS])
def test_at_the_end_of_the_context(right):
    model = short()
    length = model.config.max_context - 11
    state = check(model, length, 11, right, capacity=model.config.max_context)
    # The last token is committed and never goes through the model.
    assert int(state.cache.length[0]) == model.config.max_context - 1


@pytest.mark.parametrize("left", range(1, 7))
def test_a_budget_inside_a_draft(left):
    state = check(short(), 30, left, [MOST] * STEPS)
    assert int(state.count[0]) == left


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 4])
def test_a_stop_token_inside_a_draft(depth):
    model, tokens = short(), 12
    before, after, truth = plain(model, 30, tokens, 512)
    said = np.asarray(after.tokens)[0, :tokens]
    # A token that was said before would end the text there.
    places = [where for where in range(1, 6) if said[where] not in said[:where]]
    assert places, "every token repeats an earlier one: no stop token inside a draft is tested"
    for where in places:
        stop = int(said[where])
        expected = continued(model, before, tokens, 0, ORACLE, stop=stop)
        drafted = continued(model, told(before, truth, [depth] * STEPS), tokens, depth, ORACLE, stop=stop)
        assert bool(drafted.stopped[0])
        assert int(drafted.count[0]) == where + 1
        assert_same_state(model, drafted, expected)


@pytest.mark.slow
def test_the_mtp_cache_has_no_holes():
    """After any number of steps it holds what one pass of the block over all committed rows writes.

    Strict: the prompt's products and the steps' are the same but for the order of their sums.
    """
    model, drafter, tokens = ds4jax.load(), MTPDrafter(), 40
    ids = prompt(tiny(), 100)
    state = continued(model, prefilled(model, ids, 512, drafter, strict=True), tokens, 2, drafter, strict=True)
    assert int(state.acceptance.steps[0]) < tokens, "some drafts stood"
    assert int(state.acceptance.stood[0, 0]) < int(state.acceptance.tried[0, 0]), "some fell"
    committed = np.concatenate([ids, np.asarray(state.tokens)[0, :tokens]])
    plain = continued(model, prefilled(model, ids, 512, drafter, strict=True), tokens, 0, drafter, strict=True)
    for name, array in visible(model.config, plain.cache, plain.drafting.cache).items():
        assert_bits_equal(visible(model.config, state.cache, state.drafting.cache)[name], array)
    whole = prefilled(model, committed, 512, drafter, strict=True)
    for name, array in visible(model.config, whole.cache, whole.drafting.cache).items():
        difference = np.abs(visible(model.config, state.cache, state.drafting.cache)[name] - array)
        assert difference.max(initial=0) < 1e-3, name
        assert np.abs(array).max(initial=1) > 0.1, "a hole would not be seen"


@pytest.mark.slow
def test_one_executable_holds_target_and_mtp_block_and_updates_the_cache_in_place():
    model, drafter = ds4jax.load(), MTPDrafter()
    state = decode.start(model.config, 512, [1], drafter=drafter, max_draft=model.max_draft)
    limits, filters = Limits.of([4], [4], [[-1]]), Filters.of([Sampling()])
    policy = Policy(jnp.full(1, 2, jnp.int32), jnp.ones(1 + model.max_draft, jnp.float32))
    arguments = (model.graph, model.weights, state, limits, filters, policy)
    lowered = decode.run.__wrapped__.lower(*arguments, drafter=drafter, max_draft=model.max_draft, strict=False)
    text = lowered.as_text(debug_info=True)
    assert text.count("stablehlo.while") >= 1
    for scope in ("layer0", f"layer{model.config.n_layers - 1}", "mtp", "mtp_head", "draft"):
        assert f"{scope}/" in text or f'"{scope}"' in text, scope
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves((state.cache, state.drafting)))


def test_depths_share_the_executable():
    model = short()
    before, _, truth = plain(model, 20, 3, 512)
    continued(model, told(before, truth, [1] * STEPS), 3, 1, ORACLE)
    compiled = decode.run.__wrapped__._cache_size()
    for depth in range(MOST + 1):
        continued(model, told(before, truth, [2] * STEPS), 5, depth, ORACLE)
    assert decode.run.__wrapped__._cache_size() == compiled

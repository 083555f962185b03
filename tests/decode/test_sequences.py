"""Four sequences in one step: each says what it would say alone, and one that has ended keeps all that it has."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import arrays, assert_bits_equal, short_transformer

from ds4jax.bounds import NO_STOP
from ds4jax.cache.capacity import PREFILL, padded
from ds4jax.decode import loop as decode
from ds4jax.decode.depth import AUTO, Policy
from ds4jax.decode.loop import DecodeState, Limits
from ds4jax.decode.sampling import Filters, Sampling
from ds4jax.decode.width import step_rows
from ds4jax.language_model import LanguageModel
from ds4jax.random_models.oracle import OracleDrafter

# The MTP block drafts, and its tokens are replaced by others of which 0, 1 and 2 stand in turn.
DRAFTS, CAPACITY, DRAFTER = 2, 256, OracleDrafter()
ALL = (0, 1, 2, 3)
# Unlike in everything: prompts, depths, ends, seeds, filters and stop lists.
LENGTHS, DEPTHS, GOALS = (5, 40, 130, 17), (0, 1, 2, 2), (21, 34, 40, 27)
SAMPLINGS = (Sampling(), Sampling(0.9, top_k=40, seed=3), Sampling(), Sampling(1.1, top_p=0.9, min_p=0.01, seed=2**40 + 3))


@functools.cache
def model() -> LanguageModel:
    return LanguageModel(short_transformer(), None, max_draft=DRAFTS)


@functools.cache
def prompts() -> list[np.ndarray]:
    return [np.roll(arrays("golden")["ids"], -60 * i)[:length] for i, length in enumerate(LENGTHS)]


@functools.cache
def plain() -> DecodeState:
    """The state after 40 tokens of plain decode each."""
    return ran(prefilled(ALL, False), ALL, depths=(0,) * 4, goals=(40,) * 4, stop_ids=((NO_STOP,) * 2,) * 4)


@functools.cache
def prefilled(chosen: tuple[int, ...], told: bool = True) -> DecodeState:
    """The state with these prompts in their sequences; the others are free. The drafter may be told what is said in truth."""
    shipped = model()
    last_S = [int(ids[-1]) if i in chosen else 0 for i, ids in enumerate(prompts())]
    state = decode.start(shipped.config, CAPACITY, last_S, drafter=DRAFTER, max_draft=DRAFTS)
    cache, drafting = state.cache, state.drafting
    for slot in chosen:
        ids, width = prompts()[slot], PREFILL[0]
        for start in range(0, len(ids) - 1, width):
            following = (padded(ids, start + offset, width) for offset in (0, 1))
            count = jnp.int32(min(width, len(ids) - 1 - start))
            cache, drafting = decode.prefill(
                shipped.graph, shipped.weights, cache, drafting, *following, count, jnp.int32(slot), drafter=DRAFTER, strict=False
            )
    if told:
        truth = np.zeros(drafting.truth.shape, np.int32)
        for i in chosen:
            truth[i, LENGTHS[i] : LENGTHS[i] + 40] = plain().tokens[i, :40]
        drafting = dataclasses.replace(drafting, truth=jnp.asarray(truth), forced=jnp.ones(4, bool))
    return dataclasses.replace(state, cache=cache, drafting=drafting)


@functools.cache
def stops() -> tuple[tuple[int, int], ...]:
    """Two stop tokens for each; the third sequence says one of its own in the middle."""
    tokens = plain().tokens[2, :40].tolist()
    stop = next(token for i, token in enumerate(tokens) if i > 12 and token not in tokens[:i])
    return ((NO_STOP, NO_STOP), (NO_STOP, NO_STOP), (NO_STOP, stop), (NO_STOP, NO_STOP))


def ran(
    state: DecodeState,
    chosen: tuple[int, ...],
    *,
    depths: tuple[int, ...] = DEPTHS,
    goals: tuple[int, ...] = GOALS,
    stop_ids: tuple | None = None,
    places: tuple[int, ...] = ALL,
) -> DecodeState:
    """The state after these sequences have reached their goals; the others have nothing to do. `places` puts them in order."""
    shipped = model()
    goals = tuple(goals[i] if i in chosen else 0 for i in ALL)
    budgets = np.maximum(np.array(goals) - np.asarray(state.count), 0)
    asked = Limits.of(budgets, [max(pair) for pair in zip(goals, GOALS, strict=True)], stops() if stop_ids is None else stop_ids)
    # A copy: the state is given away.
    each = (state, asked, Filters.of(SAMPLINGS), jnp.array(depths, jnp.int32))
    state, limits, filters, depth = jax.tree.map(lambda array: array[jnp.array(places)], each)
    policy = Policy(depth, jnp.array([1.0, 1.2, 1.5], jnp.float32))
    options = {"drafter": DRAFTER, "max_draft": DRAFTS, "strict": False}
    state, _ = decode.run(shipped.graph, shipped.arrays, state, limits, filters, policy, **options)
    return state


@functools.cache
def together() -> DecodeState:
    return ran(prefilled(ALL), ALL)


def assert_same(actual: DecodeState, expected: DecodeState, sequence: int) -> None:
    """All that the states have of a sequence, in every array, to the last bit."""
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(expected), strict=True)
    for path, left, right in zip(paths, jax.tree.leaves(actual), leaves, strict=True):
        try:
            assert_bits_equal(left[sequence : sequence + 1], right[sequence : sequence + 1])
        except AssertionError as error:
            raise AssertionError(jax.tree_util.keystr(path)) from error


@pytest.mark.long
def test_each_reaches_its_own_end():
    state = together()
    count = state.count.tolist()
    assert [count[i] for i in (0, 1, 3)] == [GOALS[i] for i in (0, 1, 3)]
    assert state.stopped.tolist() == [False, False, True, False]
    assert 12 < count[2] < GOALS[2]
    assert int(state.tokens[2, count[2] - 1]) == stops()[2][1]
    assert len(set(state.acceptance.steps.tolist())) == 4, "they end in other steps"
    assert state.cache.length.tolist() == [length - 1 + made for length, made in zip(LENGTHS, count, strict=True)]
    tried, stood = np.asarray(state.acceptance.tried), np.asarray(state.acceptance.stood)
    np.testing.assert_array_equal(tried > 0, np.arange(DRAFTS) < np.array(DEPTHS)[:, None])
    assert (stood[1:, 0] > 0).all(), "several tokens in a step"
    assert (stood[1:, 0] < tried[1:, 0]).all(), "drafts that fall"
    assert (stood[2:, 1] > 0).any(), "both drafts"


@pytest.mark.long
@pytest.mark.parametrize("sequence", ALL)
def test_each_says_what_it_says_alone(sequence):
    """The other three are free, or have ended: in either case nothing of theirs is written, and nothing of this one is other."""
    for held in ((sequence,), ALL):
        before = prefilled(held)
        alone = ran(before, (sequence,))
        assert_same(alone, together(), sequence)
        for other in ALL:
            if other != sequence:
                assert_same(alone, before, other)


@pytest.mark.long
def test_an_interrupted_call_goes_on_where_it_was():
    """Goals that are reached one after the other, some with more tokens than were asked for, come to the same."""
    state = prefilled(ALL)
    for chosen, goals in (((1, 3), (0, 9, 0, 7)), ((0, 2, 3), (4, 0, 11, 12)), ((1, 2), (0, 20, 12, 0)), ((0, 1, 2, 3), GOALS)):
        state = ran(state, chosen, goals=goals)
    for sequence in ALL:
        assert_same(state, together(), sequence)


@pytest.mark.long
def test_automatic_depths_are_each_sequences_own():
    state = ran(prefilled(ALL), ALL, depths=(AUTO, 0, AUTO, 1))
    assert np.asarray(state.acceptance.tried)[[1, 3], 1].tolist() == [0, 0]
    assert int(state.acceptance.tried[0, 0]) > 0
    alone = ran(prefilled((2,)), (2,), depths=(0, 0, AUTO, 0))
    assert_same(state, alone, 2)


@pytest.mark.long
def test_drafting_changes_no_bit_of_a_greedy_sequence():
    (count,), sequence = together().count[2:3].tolist(), 2
    for name in ("tokens", "fingerprints"):
        drafted, expected = (getattr(state, name)[sequence, :count] for state in (together(), plain()))
        assert_bits_equal(drafted, expected)


@pytest.mark.long
def test_a_place_changes_no_bit():
    places = (3, 0, 1, 2)
    moved = ran(prefilled(ALL), ALL, places=places)
    back = jax.tree.map(lambda array: array[jnp.argsort(jnp.array(places))], moved)
    for sequence in ALL:
        assert_same(back, together(), sequence)


@pytest.mark.long
def test_a_chunk_touches_its_own_sequence_alone():
    whole = prefilled(ALL)
    for sequence in ALL:
        assert_same(prefilled((sequence,)), whole, sequence)


def test_rows_of_a_step_come_by_fours():
    """All rows of a step are left over by a CPU's products, or none is."""
    for sequences in range(1, 9):
        for max_draft in range(5):
            rows = sequences * step_rows(max_draft, sequences)
            assert step_rows(max_draft, sequences) > max_draft
            assert rows <= 2 or rows % 4 == 0
    assert [step_rows(max_draft) for max_draft in range(6)] == [1, 2, 4, 4, 8, 8]

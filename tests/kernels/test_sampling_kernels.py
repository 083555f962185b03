"""Filters and the draw: the kernels have the meaning's bits, and the meaning that of whole numbers."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import lowered_for_cuda, pallas_calls
from hypothesis import given
from hypothesis import strategies as st
from kernels.harness import check_lowers
from numerics import assert_bits_equal

from ds4jax.decode.accept import accept
from ds4jax.decode.drafter import Drafts
from ds4jax.decode.sampling import Filters, Sampling
from pallas_kernels.core.dispatch import OPT_OUT
from pallas_kernels.sampling import decode, meaning

FLASH = 129_280
KEEP, PICK = jax.jit(jax.vmap(meaning.keep)), jax.jit(jax.vmap(meaning.pick))
# The whole range, and ends of it.
RANDOM = np.array([0, 1, 2**31, 2**32 - 1, 0x9E3779B9, 0x3C6EF372, 0xDAA66D2B], np.uint32)
FILTERS = [
    (0, 1.0, 0.0), (1, 1.0, 0.0), (5, 1.0, 0.0), (2**31 - 1, 1.0, 0.0), (0, 0.95, 0.0), (0, 0.5, 0.0), (0, 1e-30, 0.0),
    (0, float(np.nextafter(np.float32(1), np.float32(0))), 0.0), (0, 1.0, 1.0), (0, 1.0, 0.03), (40, 0.9, 0.05), (3, 0.5, 0.2),
]  # fmt: skip


def distributions(size: int) -> np.ndarray:
    """Probabilities float32 [N, V] that lie far apart, close together or on each other."""
    random = np.random.default_rng(size)

    def softmax(logits: np.ndarray) -> np.ndarray:
        weights = np.exp(logits.astype(np.float64) - logits.max())
        return weights / weights.sum()

    few = np.zeros(size)
    few[random.permutation(size)[:5]] = [0.5, 0.125, 0.125, 0.125, 0.125][:size]
    last = np.zeros(size)
    last[-1] = 1
    tiny = np.full(size, 1e-41)
    tiny[size // 2 :] = 0
    tiny[size // 3] = 1
    made = (
        softmax(random.normal(size=size) * 4),
        softmax(random.normal(size=size) * 0.1),
        # Twelve values, each of many tokens.
        softmax(random.integers(12, size=size) * 0.7),
        np.full(size, 1 / size),
        last,
        few,
        tiny,
        softmax(-np.arange(size) * 0.9),
    )
    return np.stack(made).astype(np.float32)


def operands(size: int) -> tuple[np.ndarray, ...]:
    """Every filter, and one that keeps exactly V tokens, on every distribution."""
    filters = [*FILTERS, (size, 1.0, 0.0)]
    asked = list(itertools.product(distributions(size), filters))
    top_k, top_p, min_p = zip(*(filters for _, filters in asked), strict=True)
    return np.stack([p for p, _ in asked]), np.array(top_k, np.int32), np.array(top_p, np.float32), np.array(min_p, np.float32)


SIZES = [1500, *(pytest.param(size, marks=pytest.mark.long) for size in (1, 7, 1023, 1024, 1025, 5000))]


@pytest.mark.parametrize("thresholds", [8, 32])
@pytest.mark.parametrize("size", SIZES)
def test_the_kernels_keep_what_the_meaning_keeps(size, thresholds):
    asked = operands(size)
    kept = np.asarray(KEEP(*asked))
    assert_bits_equal(decode.keep(*asked, thresholds=thresholds, interpret=True), kept)
    number = (kept > 0).sum(axis=1)
    assert number.min() == 1
    assert number.max() == size
    random = np.resize(RANDOM, len(kept))
    drawn = np.asarray(PICK(kept, random))
    np.testing.assert_array_equal(decode.pick(kept, random, interpret=True), drawn)
    assert (kept[np.arange(len(kept)), drawn] > 0).all()


@pytest.mark.long
def test_a_row_has_the_same_bits_in_any_company_and_any_programs():
    asked = tuple(array[7::13] for array in operands(5000))
    kept = decode.keep(*asked, interpret=True)
    for rows, programs in ((1, 128), (3, 128), (3, 1), (8, 4)):
        some = (array[:rows] for array in asked)
        assert_bits_equal(decode.keep(*some, programs=programs, interpret=True), kept[:rows])


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_a_part_is_the_upper_half_of_the_product(random, whole):
    assert int(meaning.part(jnp.uint32(random), jnp.uint32(whole))) == random * whole >> 32


def test_a_mass_is_the_nearest_whole_number():
    below = np.nextafter(np.float32(2**-8), np.float32(0))
    p = np.array([0, 1, 0.5, 0.1, 1e-41, 2**-32, 2**-31 * 1.4999, 2**-31 * 2.5, 2**-8, below, 1 / 3, 3e-9], np.float32)
    np.testing.assert_array_equal(meaning.mass(jnp.asarray(p)), np.floor(p.astype(np.float64) * 2**31 + 0.5).astype(np.uint32))


@pytest.mark.parametrize("size", [3, 1500])
def test_a_draw_is_the_token_in_which_the_part_ends(size):
    """By whole numbers of any size: each token is drawn as often as its mass says, and none has two places."""
    random = np.random.default_rng(size)
    weights = random.dirichlet(np.full(size, 0.3)).astype(np.float32)
    weights[1] = 0
    mass = [int(x) for x in np.floor(weights.astype(np.float64) * 2**31 + 0.5)]
    ends, total = np.cumsum(mass), sum(mass)
    # Beside every end, where one more or less is another token.
    asked = {min(max(-(-int(end) * 2**32 // total) + near, 0), 2**32 - 1) for end in ends for near in (-1, 0, 1)}
    numbers = np.array(sorted(asked), np.uint32)
    expected = [int(np.searchsorted(ends, int(r) * total >> 32, side="right")) for r in numbers]
    drawn = PICK(np.broadcast_to(weights, (len(numbers), size)), numbers)
    np.testing.assert_array_equal(drawn, expected)
    assert set(np.flatnonzero(mass)) == set(expected)


def test_nothing_to_draw_from_is_a_token_of_the_vocabulary():
    nothing = np.zeros((2, 1030), np.float32)
    for pick in (PICK, functools.partial(decode.pick, interpret=True)):
        assert np.asarray(pick(nothing, RANDOM[:2])).tolist() == [1029, 1029]


def test_the_passes_reach_all_keys():
    for thresholds in (4, 8, 16, 32, 64):
        *steps, last = decode.steps(thresholds)
        assert last == 1
        assert steps[0] * (thresholds + 1) > decode.LARGEST
        assert decode.LARGEST == int(np.float32(1).view(np.int32))
        assert steps[0] * thresholds + decode.LARGEST < 2**31
        for step, following in itertools.pairwise((*steps, last)):
            assert step <= following * (thresholds + 1 if following > 1 else thresholds - 1)


@pytest.mark.parametrize("rows", [1, *(pytest.param(rows, marks=pytest.mark.long) for rows in (3, 8, 32, 96))])
def test_lowers(rows):
    number, whole = (jnp.zeros(rows, dtype) for dtype in (jnp.float32, jnp.int32))
    p = jnp.zeros((rows, FLASH), jnp.float32)
    thresholds = decode.THRESHOLDS if rows <= decode.FEW_ROWS else decode.FEW_THRESHOLDS
    search, keep, pick = decode.NAMES
    check_lowers(decode.keep, (p, whole, number, number), {search: len(decode.steps(thresholds)), keep: 1})
    check_lowers(decode.pick, (p, jnp.zeros(rows, jnp.uint32)), {pick: 1})


def accepting(strict: bool) -> tuple:
    """`accept` of two sequences without drafts, and what it is called with."""
    filters = Filters.of([Sampling(), Sampling(1.0)])
    whole = jnp.zeros(2, jnp.int32)
    return functools.partial(accept, strict=strict), (jnp.zeros((2, 1, 2000)), Drafts.none(2, 0, 2000), whole, filters, whole)


def test_strict_and_the_opt_out_reach_no_kernel(monkeypatch):
    launches = len(decode.steps(decode.THRESHOLDS)) + 2
    for strict, calls in ((False, launches), (True, 0)):
        rule, asked = accepting(strict)
        assert pallas_calls(lowered_for_cuda(jax.jit(rule), *asked)) == calls
    monkeypatch.setenv(OPT_OUT, "1")
    rule, asked = accepting(False)
    assert pallas_calls(lowered_for_cuda(jax.jit(rule), *asked)) == 0


def primitives(jaxpr: jax.extend.core.Jaxpr, besides: str) -> set[str]:
    """Names of all operations outside a kind of operation."""
    found = set()
    for eqn in jaxpr.eqns:
        found.add(eqn.primitive.name)
        if eqn.primitive.name != besides:
            found |= set().union(*(primitives(inner, besides) for inner in jax.extend.core.jaxprs_in_params(eqn.params)))
    return found


@pytest.mark.parametrize("strict", [False, True])
def test_a_greedy_step_runs_no_part_of_it(strict):
    rule, asked = accepting(strict)
    jaxpr = jax.make_jaxpr(rule)(*asked).jaxpr
    drawing = {"exp", "cumsum", "random_bits", *([] if strict else ["pallas_call"])}
    assert drawing <= primitives(jaxpr, "nothing")
    assert not drawing & primitives(jaxpr, "cond")


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 8, 32, 96])
def test_a_gpu_keeps_and_draws_what_the_meaning_does(rows):
    asked = operands(FLASH)
    some = tuple(array[np.arange(rows) * 7 % len(array)] for array in asked)
    kept = np.asarray(KEEP(*some))
    assert_bits_equal(decode.keep(*some), kept)
    for number in RANDOM:
        random = np.full(rows, number, np.uint32)
        np.testing.assert_array_equal(decode.pick(kept, random), PICK(kept, random))

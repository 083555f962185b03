"""How deep to draft: the break-even, what is counted, probing, and that none of it changes what is said."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import ds4jax
from ds4jax.decode.depth import AUTO, MEMORY, PROBE_EVERY, Acceptance, Policy, choose_depth, expected_tokens
from ds4jax.language_model import LanguageModel

shares = st.floats(1 / 64, 1, width=32)
prices = st.floats(1 / 8, 8, width=32)
several = jax.jit(choose_depth)
add_step = jax.jit(Acceptance.after)


def choose(policy: Policy, acceptance: Acceptance) -> int:
    return int(several(policy, acceptance)[0])


def after(acceptance: Acceptance, depth: int, count: int) -> Acceptance:
    return add_step(acceptance, jnp.full(1, depth, jnp.int32), jnp.full(1, count, jnp.int32), jnp.ones(1, bool))


def policy(depth: int, *costs: float) -> Policy:
    return Policy(jnp.full(1, depth, jnp.int32), jnp.array(costs, jnp.float32))


def seen(*recent: float, steps: int = 0) -> Acceptance:
    """What has been accepted, as far as a choice looks at it."""
    none = jnp.zeros((1, len(recent)), jnp.int32)
    return Acceptance(jnp.full(1, steps, jnp.int32), none, none, jnp.array([recent], jnp.float32))


@given(shares, shares, prices, prices)
def test_a_third_row_pays_from_the_break_even_on(p0, p1, two_rows, third_row):
    break_even = (1 + p0) * third_row / (p0 * two_rows)
    assume(abs(p1 / break_even - 1) > 1e-4)
    depth = choose(policy(AUTO, 1e9, two_rows, two_rows + third_row), seen(p0, p1))
    assert depth == (2 if p1 > break_even else 1)


@given(st.lists(shares, min_size=4, max_size=4), st.lists(prices, min_size=5, max_size=5))
def test_the_depth_with_most_tokens_a_second_is_chosen(recent, costs):
    tokens = [sum(np.prod(recent[:i], dtype=np.float64) for i in range(depth + 1)) for depth in range(5)]
    np.testing.assert_allclose(expected_tokens(jnp.array(recent, jnp.float32)), tokens, rtol=1e-5)
    speeds = np.array(tokens) / costs
    assume(np.sort(speeds)[-1] > np.sort(speeds)[-2] * (1 + 1e-4))
    assert choose(policy(AUTO, *costs), seen(*recent)) == speeds.argmax()


def test_of_equal_depths_the_shallower_is_chosen():
    assert choose(policy(AUTO, 1.0, 2.0, 3.0), seen(1.0, 1.0)) == 0


@pytest.mark.parametrize("depth", range(4))
def test_a_fixed_depth_is_neither_weighed_nor_probed(depth):
    for steps in range(2 * PROBE_EVERY):
        assert choose(policy(depth, 1.0, 0.1, 9.0, 9.0), seen(1.0, 0.5, 0.0, steps=steps)) == depth


def test_every_sixteenth_step_goes_as_deep_as_it_can():
    chosen = [choose(policy(AUTO, 1.0, 50.0, 60.0), seen(0.1, 0.1, steps=steps)) for steps in range(4 * PROBE_EVERY)]
    assert chosen == ([0] * (PROBE_EVERY - 1) + [2]) * 4


def counted(*outcomes: tuple[int, int], most: int = 3) -> Acceptance:
    """After steps of which `count` drafts stood out of `depth`."""
    acceptance = Acceptance.none(most)
    for depth, count in outcomes:
        acceptance = after(acceptance, depth, count)
    return acceptance


def test_counts_of_a_hand_written_run():
    """A draft counts as tried only where those before it stood and the step was that deep."""
    acceptance = counted((3, 3), (3, 0), (3, 1), (1, 1), (0, 0), (2, 2))
    assert acceptance.steps.tolist() == [6]
    assert acceptance.tried.tolist() == [[5, 3, 1]]
    assert acceptance.stood.tolist() == [[4, 2, 1]]
    first = 1 - MEMORY * (1 - MEMORY) ** 3
    np.testing.assert_allclose(acceptance.recent[0], [first, 1 - MEMORY * (1 - MEMORY), 1], rtol=1e-6)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=30))
def test_counts_of_any_run(pairs):
    outcomes = [(depth, min(depth, count)) for depth, count in pairs]
    acceptance = counted(*outcomes, most=4)
    for i in range(4):
        tries = [count > i for depth, count in outcomes if depth > i and count >= i]
        recent = functools.reduce(lambda share, stood: share + MEMORY * (stood - share), tries, 1.0)
        assert (int(acceptance.tried[0, i]), int(acceptance.stood[0, i])) == (len(tries), sum(tries))
        assert float(acceptance.recent[0, i]) == pytest.approx(recent, rel=1e-5)
    assert acceptance.steps.tolist() == [len(outcomes)]


def simulate(acceptance: Acceptance, steps: int, stands: int, costs: tuple[float, ...]) -> tuple[Acceptance, list[int]]:
    """Steps of which at most `stands` drafts stand, and the depths chosen."""
    depths = []
    for _ in range(steps):
        depth = choose(policy(AUTO, *costs), acceptance)
        acceptance = after(acceptance, depth, min(depth, stands))
        depths.append(depth)
    return acceptance, depths


def test_depth_falls_with_acceptance_and_comes_back():
    costs = (1.0, 1.2, 1.4)
    acceptance, depths = simulate(Acceptance.none(2), 200, 0, costs)
    assert depths[0] == 2, "every depth gets its chance"
    assert sum(depth > 0 for depth in depths[100:]) == 100 // PROBE_EVERY, "probes alone"
    acceptance, depths = simulate(acceptance, 200, 1, costs)
    assert set(depths[-PROBE_EVERY:]) == {1, 2}
    assert depths[-PROBE_EVERY:].count(2) == 1
    acceptance, depths = simulate(acceptance, 400, 2, costs)
    assert set(depths[-PROBE_EVERY:]) == {2}


# ----- in the loop


TOKENS = 60


@functools.cache
def model() -> LanguageModel:
    return ds4jax.load(max_draft=2)


@functools.cache
def plain(strict: bool) -> ds4jax.Result:
    return said(0, strict)


def said(draft: int | str, strict: bool) -> ds4jax.Result:
    return model().generate("And it came to pass", max_new_tokens=TOKENS, ignore_eos=True, draft=draft, strict=strict)


@pytest.mark.parametrize("strict", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.long
def test_auto_says_what_plain_decode_says_at_measured_costs(strict):
    costs = model().step_costs(512, strict=strict)
    assert len(costs) == 3
    assert all(np.isfinite(cost) and cost > 0 for cost in costs)
    result = said("auto", strict)
    assert model().step_costs(512, strict=strict) is costs, "measured once"
    assert result.draft == "auto"
    assert result.ids == plain(strict).ids
    np.testing.assert_array_equal(result.fingerprints, plain(strict).fingerprints)


@pytest.mark.long
@pytest.mark.parametrize("strict", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize(
    "costs",
    [
        (1.0, 9.0, 9.0),
        (1.0, 1.3, 1.75),
        *(pytest.param(costs, marks=pytest.mark.slow) for costs in ((1.0, 1.0, 1.0), (1.0, 9.0, 1.1))),
    ],
    ids=["never", "mixed", "deep", "not one"],
)
def test_auto_says_what_plain_decode_says_at_any_costs(costs, strict, monkeypatch):
    monkeypatch.setattr(model(), "step_costs", lambda capacity, **asked: costs)
    result = said("auto", strict)
    assert result.ids == plain(strict).ids
    np.testing.assert_array_equal(result.fingerprints, plain(strict).fingerprints)
    if min(costs[1:]) > 2:
        probes = result.steps // PROBE_EVERY
        assert result.steps >= TOKENS - 2 * probes, "probes alone draft"
    else:
        assert result.steps < TOKENS - 10
    assert result.acceptance

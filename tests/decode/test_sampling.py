"""Each filter against its definition in numpy, and the draw against the filtered distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import lowered_for_cuda
from hypothesis import given
from hypothesis import strategies as st

from ds4jax.decode.accept import accept
from ds4jax.decode.drafter import Drafts
from ds4jax.decode.sampling import Filters, Sampling, filtered
from ds4jax.errors import InputError

V = 16
NO_DRAFTS = Drafts.none(1, 0, V)


def choose(logits: jax.Array, filters: Filters, position: jax.Array) -> jax.Array:
    """The token that plain decode commits after `position`."""
    one = jax.tree.map(lambda field: field[None], filters)
    return accept(logits[None, None], NO_DRAFTS, jnp.zeros(1, jnp.int32), one, position[None])[1][0]


logit_lists = st.lists(st.floats(-6, 6, width=32), min_size=V, max_size=V)
jitted = jax.jit(filtered)


def by_definition(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The documented rule, token by token, in float64."""
    scaled = np.asarray(logits, np.float32) / np.float32(sampling.temperature)
    p = np.exp(scaled.astype(np.float64) - scaled.max())
    p /= p.sum()
    order = sorted(range(V), key=lambda i: (-p[i], i))
    kept, total = np.zeros(V), 0.0
    for rank, token in enumerate(order):
        in_k = sampling.top_k == 0 or rank < sampling.top_k
        in_p = sampling.top_p >= 1 or total < sampling.top_p
        in_min = p[token] >= sampling.min_p * p[order[0]]
        kept[token] = p[token] if rank == 0 or (in_k and in_p and in_min) else 0.0
        total += p[token]
    return kept / kept.sum()


@given(
    logit_lists,
    st.floats(0.25, 3),
    st.integers(0, V + 2),
    st.sampled_from([0.13, 0.5, 0.77, 0.9, 1.0]),
    st.sampled_from([0.0, 0.03, 0.21, 1.0]),
)
def test_filters(logits, temperature, top_k, top_p, min_p):
    # Distinct logits far from every threshold are not guaranteed; a kept set may differ only where rounding decides.
    logits = np.float32(logits) + np.arange(V, dtype=np.float32) * np.float32(1e-3)
    sampling = Sampling(temperature, top_k, top_p, min_p)
    actual = np.asarray(jitted(jnp.asarray(logits), sampling.arrays()))
    expected = by_definition(logits, sampling)
    assert actual.sum() == pytest.approx(1, abs=1e-5)
    if ((actual > 0) == (expected > 0)).all():
        np.testing.assert_allclose(actual, expected, atol=2e-6)
    else:
        close = by_definition(logits, Sampling(temperature, top_k, min(top_p * 1.0001, 1.0), min_p * 0.9999))
        far = by_definition(logits, Sampling(temperature, top_k, top_p * 0.9999, min(min_p * 1.0001, 1.0)))
        assert ((close > 0) != (far > 0)).any(), "differs from the definition away from any threshold"


@pytest.mark.parametrize(
    "sampling",
    [Sampling(0.7), Sampling(1.0, top_k=3), Sampling(1.3, top_p=0.6), Sampling(1.0, min_p=0.2), Sampling(1.0, 5, 0.9, 0.05)],
)
def test_draws_follow_the_filtered_distribution(sampling):
    logits = jnp.asarray(np.random.default_rng(1).normal(size=V).astype(np.float32) * 2)
    count = 200_000
    filters = sampling.arrays()
    tokens = jax.jit(jax.vmap(lambda position: choose(logits, filters, position)))(jnp.arange(count, dtype=jnp.int32))
    observed = np.bincount(np.asarray(tokens), minlength=V) / count
    assert 0.5 * np.abs(observed - by_definition(np.asarray(logits), sampling)).sum() < 0.01


@pytest.mark.parametrize(
    ("sampling", "count"),
    [
        (Sampling(1.0), 16),
        (Sampling(1.0, top_k=1), 1),
        (Sampling(1.0, top_k=5), 5),
        (Sampling(1.0, top_k=2**31 - 1), 16),
        (Sampling(1.0, top_p=1 / 16), 1),
        (Sampling(1.0, top_p=0.5), 8),
        (Sampling(1.0, top_p=float(np.nextafter(np.float32(0.5), np.float32(1)))), 9),
        (Sampling(1.0, top_p=1e-30), 1),
        (Sampling(1.0, top_k=7, top_p=0.5), 7),
        (Sampling(1.0, top_k=9, top_p=0.5), 8),
        (Sampling(1.0, min_p=1.0), 16),
    ],
)
def test_the_first_of_equals_stay(sampling, count):
    """Sixteen tokens of probability 1/16: the sums are exact, so that the rule for ties alone decides."""
    actual = np.asarray(jitted(jnp.zeros(V, jnp.float32), sampling.arrays()))
    np.testing.assert_array_equal(actual > 0, np.arange(V) < count)


def test_equals_below_others():
    """The threshold lies among tokens of equal probability, some of which stay."""
    logits = np.zeros(V, np.float32)
    logits[[2, 9, 11]] = np.log(2), np.log(2), np.log(4)
    # 21 parts in all: 4, then 2 and 2, then 13 times 1.
    for parts, ids in ((4, [11]), (5, [2, 11]), (7, [2, 9, 11]), (8, [2, 9, 11]), (10, [0, 1, 2, 9, 11])):
        actual = np.asarray(jitted(jnp.asarray(logits), Sampling(1.0, top_p=(parts - 0.01) / 21).arrays()))
        assert np.flatnonzero(actual).tolist() == ids


def test_a_row_keeps_the_same_tokens_in_any_company():
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(5, 1000)).astype(np.float32) * 3)
    filters = Sampling(0.8, top_p=0.9).arrays()
    alone = [np.asarray(jitted(row, filters)) for row in logits]
    for rows in (2, 3, 5):
        together = jax.jit(jax.vmap(filtered, in_axes=(0, None)))(logits[:rows], filters)
        np.testing.assert_array_equal(np.asarray(together) > 0, np.stack(alone[:rows]) > 0)


@pytest.mark.parametrize(("backend", "strict", "loops"), [("cpu", False, 1), ("gpu", False, 0), ("gpu", True, 0)])
def test_no_vocabulary_is_sorted(monkeypatch, backend, strict, loops):
    """On a GPU there is no loop either, see `smallest`."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    asked = jax.jit(lambda *numbers: filtered(*numbers, strict=strict)), jnp.zeros(V, jnp.float32), Sampling(1.0).arrays()
    program = lowered_for_cuda(*asked) if backend == "gpu" else asked[0].lower(*asked[1:]).as_text()
    assert ("sort" in program, program.count("stablehlo.while")) == (False, loops)


@pytest.mark.parametrize("temperature", [1e-37, 1e-6, 1e39, 1e300])
def test_extreme_temperatures(temperature):
    logits = np.arange(V, dtype=np.float32)
    p = np.asarray(jitted(jnp.asarray(logits), Sampling(temperature).arrays()))
    expected = np.eye(V)[-1] if temperature < 1 else np.full(V, 1 / V)
    np.testing.assert_allclose(p, expected, atol=1e-6)


def test_greedy_takes_the_first_of_equals():
    logits = jnp.zeros(V, jnp.float32).at[jnp.array([3, 9])].set(2.0)
    assert int(choose(logits, Sampling().arrays(), jnp.int32(0))) == 3


@pytest.mark.long
def test_seeds_differ_and_reproduce():
    logits = jnp.zeros(V, jnp.float32)

    def tokens(seed: int) -> list[int]:
        return [int(choose(logits, Sampling(1.0, seed=seed).arrays(), jnp.int32(i))) for i in range(12)]

    assert tokens(0) == tokens(0)
    assert tokens(0) != tokens(1)
    assert tokens(1) != tokens(1 + 2**40)
    assert tokens(-1) != tokens(1)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-0.1, float("nan"), float("inf")]),
        ("top_k", [-1]),
        ("top_p", [0.0, 1.01, float("nan"), -0.5]),
        ("min_p", [-0.01, 1.5, float("nan")]),
        ("seed", [2**63]),
    ],
)
def test_bad_values_are_named(field, values):
    for value in values:
        with pytest.raises(InputError, match=field.replace("_", "-")):
            Sampling(**{field: value})

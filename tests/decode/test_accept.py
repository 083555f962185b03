"""The accept rule alone: what is committed follows the plain sampler's distribution, whoever drafted and however well."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ds4jax.decode.accept import Decision
from ds4jax.decode.accept import accept as of_several
from ds4jax.decode.drafter import Drafts
from ds4jax.decode.sampling import Filters, Sampling, most_likely, propose

V = 32
DRAWS = 400_000
AT_ONCE = 10_000
# Between the positions of two draws, so that no two share a key.
APART = 16
FILTERS = [Sampling(0.8, top_p=0.9, seed=11), Sampling(1.2, top_k=20, min_p=0.05, seed=12)]
K, FEW = 3, 8


def logit_pairs() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Logits of p and of q, float32 [V]: from a drafter that is always right to one that is nearly always wrong."""
    random = np.random.default_rng(7)
    p, noise, other = (random.normal(size=V).astype(np.float32) * 1.5 for _ in range(3))
    half = np.where(np.arange(V) < V // 2, np.float32(3), np.float32(0))
    second = np.zeros(V, np.float32)
    second[np.argsort(p)[-2]] = 60
    return {
        "equal": (p, p),
        "close": (p, p + np.float32(0.3) * noise),
        "partly disjoint": (p + half, other + np.roll(half, V // 4)),
        "q one-hot": (p, second),
        "q sharper": (p, 4 * p),
    }


def exact(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The filtered distribution in float64 for distinct logits."""
    scaled = logits.astype(np.float64) / sampling.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]
    kept = (before < sampling.top_p) & (p[order] >= sampling.min_p * p.max())
    kept &= (np.arange(len(p)) < sampling.top_k) | (sampling.top_k == 0)
    p[order[~kept]] = 0
    return p / p.sum()


def distance(tokens: np.ndarray, expected: np.ndarray) -> float:
    """Total variation between draws of cells and their distribution."""
    return float(0.5 * np.abs(np.bincount(tokens.reshape(-1), minlength=expected.size) / tokens.size - expected).sum())


def at_many_positions(one: Callable) -> Callable:
    """`one(position, *arguments)`, compiled once for all arguments, at DRAWS positions: a list of arrays."""
    positions = np.arange(DRAWS, dtype=np.int32) * APART
    many = jax.jit(lambda *given: jax.lax.map(lambda position: one(position, *given), positions, batch_size=AT_ONCE))
    return lambda *given: [np.asarray(array) for array in many(*given)]


def proposed(logits_KV: jax.Array, filters: Filters, position: jax.Array) -> Drafts:
    """Drafts of one sequence as the MTP drafter makes them."""
    positions = position + jnp.arange(len(logits_KV), dtype=jnp.int32)
    return Drafts(*propose(logits_KV, jax.tree.map(lambda field: jnp.repeat(field[None], len(logits_KV)), filters), positions))


def accept(logits_WV: jax.Array, drafts: Drafts, depth: jax.Array, filters: Filters, position: jax.Array) -> Decision:
    """The rule for one sequence."""
    count_S, follower_S = of_several(*jax.tree.map(lambda array: array[None], (logits_WV, drafts, depth, filters, position)))
    return count_S[0], follower_S[0]


def first_committed(drafts: Drafts, decision: Decision) -> jax.Array:
    count, follower = decision
    return jnp.where(count > 0, drafts.tokens[0], follower)


@at_many_positions
def one_draft(position: jax.Array, logits_WV: jax.Array, q_logits_KV: jax.Array, filters: Filters) -> Decision:
    drafts = proposed(q_logits_KV, filters, position)
    decision = accept(logits_WV, drafts, jnp.int32(1), filters, position)
    return first_committed(drafts, decision), decision[0]


@pytest.mark.parametrize("sampling", [FILTERS[0], pytest.param(FILTERS[1], marks=pytest.mark.long)], ids=["top-p", "top-k min-p"])
@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[] if name in ("close", "q one-hot") else pytest.mark.slow) for name in logit_pairs()]
)
def test_the_committed_token_follows_p(case, sampling):
    p_logits, q_logits = logit_pairs()[case]
    tokens, stood = one_draft(np.stack([p_logits] * 2), q_logits[None], sampling.arrays())
    p, q = exact(p_logits, sampling), exact(q_logits, sampling)
    assert distance(tokens, p) < 0.01
    assert p[np.unique(tokens)].min() > 0, "a token that the filters remove"
    assert abs(stood.mean() - np.minimum(p, q).sum()) < 0.01


def given_q(name: str, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is drawn from, and what is said to have been drawn from, of drafters that do not filter as the verifier does."""
    least, most = np.argsort(np.where(p > 0, p, np.inf))[0], np.argmax(p)
    one_hot = {"unlikely": np.eye(V)[least], "likely": np.eye(V)[most], "impossible": np.eye(V)[np.argmin(p)]}
    drawn = one_hot.get(name, np.full(V, 1 / V) if name == "uniform" else p)
    # Nothing of p lies above twice itself: half of the drafts are refused and the residual is empty.
    return drawn, drawn * (2 if name == "empty residual" else 1)


@at_many_positions
def one_given(position: jax.Array, logits_WV: jax.Array, drawn_V: jax.Array, said_V: jax.Array, filters: Filters) -> Decision:
    key = jax.random.fold_in(jax.random.key(3), position)
    drafts = Drafts(jax.random.categorical(key, jnp.log(drawn_V)).astype(jnp.int32)[None], said_V[None])
    decision = accept(logits_WV, drafts, jnp.int32(1), filters, position)
    return first_committed(drafts, decision), decision[0]


@pytest.mark.parametrize(
    "name",
    ["uniform", *(pytest.param(name, marks=pytest.mark.long) for name in ("unlikely", "likely", "impossible", "empty residual"))],
)
def test_any_q_is_made_up_for(name):
    sampling, logits = FILTERS[0], logit_pairs()["equal"][0]
    p = exact(logits, sampling)
    drawn, said = given_q(name, p)
    tokens, stood = one_given(np.stack([logits] * 2), drawn.astype(np.float32), said.astype(np.float32), sampling.arrays())
    assert distance(tokens, p) < 0.01
    ratio = np.divide(p, said, out=np.ones(V), where=said > 0)
    assert abs(stood.mean() - (drawn * np.minimum(1, ratio)).sum()) < 0.01


@functools.cache
def chain() -> tuple[np.ndarray, np.ndarray]:
    """Logits [K+2, FEW] of p and q at consecutive positions, which depend on nothing; of few tokens, to count pairs."""
    random = np.random.default_rng(12)
    p = random.normal(size=(K + 2, FEW)).astype(np.float32)
    return p, p + random.normal(size=p.shape).astype(np.float32)


@at_many_positions
def two_tokens(position: jax.Array, depth: jax.Array, filters: Filters) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The first two committed tokens, from one step or two, and how many drafts the first step kept."""
    logits, q_logits = map(jnp.asarray, chain())

    def step(position: jax.Array, row: int) -> tuple[Drafts, Decision]:
        drafts = proposed(q_logits[row : row + K], filters, position)
        return drafts, accept(logits[row : row + K + 1], drafts, depth, filters, position)

    drafts, (count, follower) = step(position, 0)
    first = first_committed(drafts, (count, follower))
    second = jnp.where(count == 0, first_committed(*step(position + 1, 1)), jnp.where(count == 1, follower, drafts.tokens[1]))
    return first, second, count


@pytest.mark.long
@pytest.mark.parametrize("sampling", [Sampling(0.8, top_p=0.9, seed=1), Sampling(1.2, top_k=6, min_p=0.05, seed=2)])
@pytest.mark.parametrize("depth", [pytest.param(depth, marks=[] if depth == K else pytest.mark.slow) for depth in range(K + 1)])
def test_a_chain_of_drafts_commits_independent_tokens(depth, sampling):
    """The second step after a refused first draft judges, with the same keys, positions that the first step drafted for."""
    first, second, count = two_tokens(jnp.int32(depth), sampling.arrays())
    p, q = (np.stack([exact(row, sampling) for row in rows]) for rows in chain())
    assert distance(first * FEW + second, np.outer(p[0], p[1]).reshape(-1)) < 0.01
    assert count.max() == depth
    stands = np.minimum(p, q).sum(axis=1)
    assert 0.3 < stands.min() < stands.max() < 0.95, "every row must refuse some"
    leading = np.cumprod(stands)
    for i in range(depth):
        assert abs((count > i).mean() - leading[i]) < 0.01


@pytest.mark.parametrize("most", [pytest.param(1, marks=pytest.mark.long), 3])
def test_greedy_keeps_the_longest_matching_prefix(most):
    logits_WV = jnp.asarray(np.random.default_rng(most).normal(size=(most + 1, V)).astype(np.float32))
    best = np.asarray(most_likely(logits_WV))
    judge = jax.jit(lambda tokens, q, depth: accept(logits_WV, Drafts(tokens, q), depth, Sampling().arrays(), jnp.int32(5)))
    q_KV = jnp.full((most, V), jnp.nan)
    for depth, right in itertools.product(range(most + 1), itertools.product([True, False], repeat=most)):
        tokens = np.where(right, best[:-1], (best[:-1] + 1) % V)
        count, follower = judge(jnp.asarray(tokens, jnp.int32), q_KV, jnp.int32(depth))
        expected = next((i for i in range(depth) if not right[i]), depth)
        assert (int(count), int(follower)) == (expected, best[expected]), (depth, right)


@jax.jit
def with_poison(depth: jax.Array, dead_from: jax.Array, filters: Filters, dead_token_K: jax.Array, dead: jax.Array) -> Decision:
    """Decisions at many positions with `dead` as q and logits of the drafts from `dead_from` on."""
    rows = poison_rows()
    dead_K, dead_W = jnp.arange(K) >= dead_from, jnp.arange(K + 1) > dead_from

    def one(position: jax.Array) -> Decision:
        drafts = proposed(rows[:K] * 2, filters, position)
        bad = Drafts(jnp.where(dead_K, dead_token_K, drafts.tokens), jnp.where(dead_K[:, None], dead, drafts.q))
        return accept(jnp.where(dead_W[:, None], dead, rows), bad, depth, filters, position)

    return jax.vmap(one)(jnp.arange(400, dtype=jnp.int32))


def poison_rows() -> jax.Array:
    """Logits [K+1, V] at which every draft may stand, sampled or greedy."""
    return jnp.asarray(np.random.default_rng(5).normal(size=(K + 1, V)).astype(np.float32))


@pytest.mark.parametrize("sampling", [Sampling(), *FILTERS], ids=["greedy", "top-p", "top-k min-p"])
@pytest.mark.parametrize("depth", range(K + 1))
def test_what_lies_beyond_the_depth_is_not_read(depth, sampling):
    """Tokens that would be taken or do not exist, distributions and logits that are no numbers."""
    for token, dead in itertools.product([None, V + 9, -1], [np.nan, 0.0, np.inf]):
        dead_tokens = most_likely(poison_rows()[:K]) if token is None else jnp.full(K, token, jnp.int32)
        clean, poisoned = (
            with_poison(jnp.int32(depth), jnp.int32(first), sampling.arrays(), dead_tokens, jnp.float32(dead))
            for first in (K, depth)
        )
        for actual, expected in zip(poisoned, clean, strict=True):
            np.testing.assert_array_equal(actual, expected)
        assert int(jnp.max(clean[0])) == depth


FOREIGN = np.array([V, V + 9, 2**30, -1, -2], np.int32)


@at_many_positions
def one_of(position: jax.Array, tokens: jax.Array, logits_WV: jax.Array, q_KV: jax.Array, filters: Filters) -> Decision:
    """One draft, another of the tokens [5] at each position."""
    return accept(logits_WV, Drafts(tokens[position // APART % 5][None], q_KV), jnp.int32(1), filters, position)


def test_a_draft_that_p_rules_out_never_stands():
    logits_WV = np.stack([np.eye(V, dtype=np.float32)[3]] * 2)
    counts, followers = one_of(
        np.full(5, 4, np.int32), logits_WV, np.full((1, V), 1 / V, np.float32), Sampling(1.0, top_k=1).arrays()
    )
    assert not counts.any()
    assert (followers == 3).all()


@pytest.mark.parametrize("said", ["uniform", "nothing"])
def test_a_draft_outside_the_vocabulary_never_stands(said):
    """At the greedy temperature and above it, and what replaces it is a token."""
    logits_WV = np.stack([logit_pairs()["equal"][0]] * 2)
    q_KV = np.full((1, V), 1 / V if said == "uniform" else 0, np.float32)
    for sampling in (Sampling(), FILTERS[0]):
        counts, followers = one_of(FOREIGN, logits_WV, q_KV, sampling.arrays())
        assert not counts.any()
        assert 0 <= followers.min() <= followers.max() < V
    if said == "nothing":
        assert distance(followers, exact(logits_WV[0], FILTERS[0])) < 0.01


@pytest.mark.long
@pytest.mark.parametrize("entry", [np.nan, -1.0])
def test_an_entry_of_q_that_is_no_probability_counts_as_zero(entry):
    sampling, logits = FILTERS[1], logit_pairs()["close"][0]
    p = exact(logits, sampling)
    # Never drawn, so that 0 is what it should have been; of p it has a share.
    odd = int(np.argmax(p))
    drawn = np.where(np.arange(V) == odd, 0.0, np.full(V, 1 / (V - 1)))
    said = np.where(np.arange(V) == odd, entry, drawn)
    tokens, _ = one_given(np.stack([logits] * 2), drawn.astype(np.float32), said.astype(np.float32), sampling.arrays())
    assert p[odd] > 0.1
    assert distance(tokens, p) < 0.01
    # Drawn all the same, it stands, and nobody meets it in a residual.
    alone = np.eye(V)[odd].astype(np.float32)
    _, stood = one_given(np.stack([logits] * 2), alone, np.where(alone > 0, np.float32(entry), alone), sampling.arrays())
    assert stood.all()


@pytest.mark.long
def test_sequences_are_judged_each_by_its_own_rule():
    """Greedy and sampled ones in one call, with other depths, positions, seeds and filters, decide as alone."""
    random = np.random.default_rng(8)
    p_SWV = jnp.asarray(random.normal(size=(4, K + 1, V)).astype(np.float32))
    samplings, depth_S = [Sampling(), FILTERS[0], FILTERS[1], Sampling(seed=4)], jnp.array([3, 1, 3, 0], jnp.int32)
    several, alone, drafted, counts = jax.jit(of_several), jax.jit(accept), jax.jit(proposed), []
    filters, each = Filters.of(samplings), [sampling.arrays() for sampling in samplings]
    for start in range(12):
        position_S = np.array([start, start + 7, start, 90 + start], np.int32)
        asked = list(zip(each, position_S, strict=True))
        made = [drafted(p_WV[:K] * 2, *its) for p_WV, its in zip(p_SWV, asked, strict=True)]
        drafts = jax.tree.map(lambda *arrays: np.stack(arrays), *made)
        count_S, follower_S = several(p_SWV, drafts, depth_S, filters, position_S)
        for i, its in enumerate(asked):
            count, follower = alone(p_SWV[i], made[i], depth_S[i], *its)
            assert (int(count_S[i]), int(follower_S[i])) == (int(count), int(follower))
        counts.append(count_S.tolist())
    assert len({tuple(count) for count in counts}) > 4, "drafts that stand and that fall"

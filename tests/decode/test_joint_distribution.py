"""Several committed tokens at once: the loop draws sequences from the plain sampler's joint distribution.

First with a model of eight tokens whose next token depends on the last one alone, so that the joint distribution is a product of
table entries and a hundred thousand sequences cost two seconds; then with the shipped model, weights and caches and all.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import LEAST_P, overlaid, p_value
from flax import nnx
from numerics import golden_config

import ds4jax
from ds4jax.bounds import NO_STOP
from ds4jax.cache.capacity import MIN_CAPACITY, PREFILL, padded
from ds4jax.cache.state import Cache, LayerCache, Rows
from ds4jax.config import Config
from ds4jax.decode import loop as decode
from ds4jax.decode.accept import Decision, accept
from ds4jax.decode.depth import AUTO, Acceptance, Policy
from ds4jax.decode.drafter import Drafter, Drafts
from ds4jax.decode.drafters.mtp import MTPDrafter, MTPState
from ds4jax.decode.drafters.ngram import NgramDrafter, NgramState
from ds4jax.decode.drafters.second_opinion import Opinions, SecondOpinion
from ds4jax.decode.loop import DecodeState, Limits
from ds4jax.decode.sampling import REPLACEMENT, Filters, Sampling, draw, filtered
from ds4jax.language_model import LanguageModel

FAR = 1000

# ----- a model of two tables

V, FIRST, MAX_DRAFT, LENGTH, LONG = 8, 5, 3, 3, 24
SEQUENCES = 100_000
AT_ONCE = 2_000
SAMPLINGS = [Sampling(0.8, top_p=0.9, seed=1), Sampling(1.2, top_k=6, min_p=0.05, seed=2)]
QUICK = [((2, FAR), SAMPLINGS[0]), ((3, LENGTH), SAMPLINGS[1])]
THOROUGH = [((0, FAR), SAMPLINGS[1]), ((1, FAR), SAMPLINGS[1]), ((3, FAR), SAMPLINGS[0])]


class TableModel(nnx.Module):
    """Logits, and the MTP block's, are rows of two tables; the streams are the last token's number."""

    def __init__(self, logits_VV: np.ndarray, mtp_logits_VV: np.ndarray, config: Config):
        self.main, self.mtp = nnx.Param(jnp.asarray(logits_VV)), nnx.Param(jnp.asarray(mtp_logits_VV))
        self.config = config

    def tapped(self, ids_T: jax.Array, rows: Rows, cache: Cache, taps: tuple[int, ...]) -> tuple[jax.Array, Cache, list]:
        return ids_T.astype(jnp.float32)[:, None, None], dataclasses.replace(cache, length=rows.end), []

    def logits(self, h_TND: jax.Array, *, strict: bool) -> jax.Array:
        return self.main.get_value()[h_TND[:, 0, 0].astype(jnp.int32)]

    def mtp_streams(self, h_TND: jax.Array, ids_T: jax.Array, rows: Rows, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
        return ids_T.astype(jnp.float32)[:, None, None], cache

    def mtp_logits(self, h_TND: jax.Array, *, strict: bool) -> jax.Array:
        return self.mtp.get_value()[h_TND[:, 0, 0].astype(jnp.int32)]


@functools.cache
def tables() -> tuple[np.ndarray, np.ndarray]:
    """Logits [V, V] of the model and of its drafts, which are right more often than not."""
    random = np.random.default_rng(2)
    p = random.normal(size=(V, V)).astype(np.float32) * np.float32(1.2)
    return p, p + random.normal(size=p.shape).astype(np.float32)


def table_state() -> DecodeState:
    """After a prompt that ends with FIRST."""
    drafting = MTPState(LayerCache(jnp.zeros((1, 0, 1), jnp.float32)), jnp.full((1, 1, 1), FIRST, jnp.float32))
    return DecodeState(
        cache=Cache((), jnp.zeros(1, jnp.int32)),
        drafting=drafting,
        last=jnp.full(1, FIRST, jnp.int32),
        tokens=jnp.zeros((1, LONG), jnp.int32),
        fingerprints=jnp.zeros((1, LONG, 2), jnp.uint32),
        count=jnp.zeros(1, jnp.int32),
        stopped=jnp.zeros(1, bool),
        acceptance=Acceptance.none(MAX_DRAFT),
    )


class Stranger(MTPDrafter):
    """Its second draft is no token of the vocabulary, and q says so."""

    def draft(self, model: Any, state: MTPState, last_S: jax.Array, rows: Rows, *asked: Any) -> tuple[Drafts, MTPState]:
        drafts, state = super().draft(model, state, last_S, rows, *asked)
        foreign = jnp.array([V, V + 1, 2**30, -1, -2, -V], jnp.int32)
        tokens = drafts.tokens.at[:, 1].set(foreign[rows.start % len(foreign)])
        return Drafts(tokens, drafts.q.at[:, 1].set(0)), state


def table_loop(run: Callable, drafter: Drafter | None = None, state: Callable[[], DecodeState] = table_state) -> Callable:
    """`run` over many keys: tokens [sequences, LONG], their counts, and drafts that stood and were tried at each depth."""
    graph, weights = nnx.split(TableModel(*tables(), dataclasses.replace(golden_config(), vocab_size=V)))

    @jax.jit
    def many(limits: Limits, filters: Filters, policy: Policy) -> tuple[jax.Array, ...]:
        def one(key: jax.Array) -> tuple[jax.Array, ...]:
            asked = limits, dataclasses.replace(filters, key=key[None]), policy
            end, _ = run(graph, weights, state(), *asked, drafter=drafter or MTPDrafter(), max_draft=MAX_DRAFT, strict=False)
            return end.tokens[0], end.count[0], end.acceptance.stood[0], end.acceptance.tried[0]

        return jax.lax.map(one, jax.random.split(filters.key[0], SEQUENCES), batch_size=AT_ONCE)

    return lambda *asked: tuple(np.asarray(array) for array in many(*asked))


@functools.cache
def loop() -> Callable:
    return table_loop(decode.run)


def asked(sampling: Sampling, depth: int, goal: int = LENGTH, most: int = FAR, stop: int = NO_STOP) -> tuple:
    # From the deepest, which pays while every draft stands, these costs lead to all the others.
    policy = Policy(jnp.full(1, depth, jnp.int32), jnp.array([1.0, 1.3, 1.7, 2.2], jnp.float32))
    return Limits.of([goal], [most], [[stop]]), Filters.of([sampling]), policy


def transitions(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities [V, V] of the next token given the last."""
    return np.asarray(jax.vmap(filtered, in_axes=(0, None))(jnp.asarray(logits), sampling.arrays()), np.float64)


def joint(p_VV: np.ndarray, start_V: np.ndarray) -> np.ndarray:
    """Probabilities [V, V, V] of three tokens of which the first follows `start`."""
    return start_V[:, None, None] * p_VV[:, :, None] * p_VV[None]


def counted(tokens_N3: np.ndarray) -> np.ndarray:
    return np.bincount(tokens_N3 @ [V * V, V, 1], minlength=V**3).reshape(V, V, V)


def _marks(case: tuple[int, int], sampling: Sampling) -> tuple[pytest.MarkDecorator, ...]:
    if (case, sampling) in QUICK:
        return ()
    return (pytest.mark.long if (case, sampling) in THOROUGH else pytest.mark.slow,)


@pytest.mark.parametrize(
    ("depth", "most", "sampling"),
    [
        pytest.param(*case, sampling, marks=_marks(case, sampling))
        for case in ((0, FAR), (1, FAR), (2, FAR), (3, FAR), (2, LENGTH), (3, LENGTH))
        for sampling in SAMPLINGS
    ],
)
def test_three_tokens_follow_the_chain(depth, most, sampling):
    tokens, count, stood, tried = loop()(*asked(sampling, depth, most=most))
    assert (count <= most).all()
    p = transitions(tables()[0], sampling)
    assert p_value(counted(tokens[:, :LENGTH]), joint(p, p[FIRST])) > LEAST_P
    assert tried[:, :depth].any(axis=0).all()
    assert not tried[:, depth:].any()
    assert (stood[:, :depth].sum(axis=0) < 0.9 * tried[:, :depth].sum(axis=0)).all(), "some drafts must fail"


@pytest.mark.slow
def test_a_draft_outside_the_vocabulary_changes_nothing():
    sampling = SAMPLINGS[0]
    tokens, count, stood, tried = table_loop(decode.run, Stranger())(*asked(sampling, MAX_DRAFT))
    said = tokens[np.arange(LONG) < count[:, None]]
    assert 0 <= said.min() <= said.max() < V
    p = transitions(tables()[0], sampling)
    assert p_value(counted(tokens[:, :LENGTH]), joint(p, p[FIRST])) > LEAST_P
    assert stood[:, 0].any()
    assert tried[:, 1].any()
    assert not stood[:, 1].any()


def remembered(both: bool) -> DecodeState:
    """After a longer prompt, which the n-gram drafter knows."""
    state, past = table_state(), np.append(np.random.default_rng(3).integers(V, size=40), FIRST).astype(np.int32)
    known = NgramState(jnp.asarray(np.pad(past, (0, LONG)))[None])
    drafting = Opinions(state.drafting, known) if both else known
    return dataclasses.replace(state, cache=Cache((), jnp.full(1, len(past) - 1, jnp.int32)), drafting=drafting)


@pytest.mark.long
@pytest.mark.parametrize("both", [False, True], ids=["alone", "second opinion"])
def test_drafts_from_the_text_follow_the_chain(both):
    """Matches of one to three tokens; with a second opinion the MTP block drafts after one."""
    ngram = NgramDrafter(longest=3, shortest=1)
    drafter = SecondOpinion(MTPDrafter(), ngram, long=2) if both else ngram
    run, p = table_loop(decode.run, drafter, functools.partial(remembered, both)), transitions(tables()[0], SAMPLINGS[0])
    for depth in (MAX_DRAFT, AUTO):
        tokens, _, stood, tried = run(*asked(SAMPLINGS[0], depth))
        assert p_value(counted(tokens[:, :LENGTH]), joint(p, p[FIRST])) > LEAST_P
        assert 0 < stood[:, 0].sum() < tried[:, 0].sum()


@pytest.mark.slow
def test_many_steps_at_changing_depths_follow_the_chain():
    sampling = SAMPLINGS[0]
    tokens, count, stood, tried = loop()(*asked(sampling, AUTO, goal=LONG))
    assert (count >= LONG).all()
    assert ((tried[:, 2] > 0) & (stood[:, 1] > tried[:, 2])).mean() > 0.2, "sequences that changed their depth"
    p = transitions(tables()[0], sampling)
    start_V = np.linalg.matrix_power(p, LONG - LENGTH + 1)[FIRST]
    assert p_value(counted(tokens[:, -LENGTH:]), joint(p, start_V)) > LEAST_P


@pytest.mark.long
@pytest.mark.parametrize("depth", [2, *(pytest.param(depth, marks=pytest.mark.slow) for depth in (0, AUTO))])
def test_a_stop_token_inside_a_draft_ends_what_plain_decode_would_end(depth):
    sampling = SAMPLINGS[1]
    p = transitions(tables()[0], sampling)
    stop = int(np.argsort(p.sum(axis=0))[-2])
    tokens, count, _, _ = loop()(*asked(sampling, depth, stop=stop))
    ended = tokens == stop
    length = np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, LONG)
    np.testing.assert_array_equal(count[count < LENGTH], length[count < LENGTH])
    assert (count <= length).all()
    assert (length[count >= LENGTH] >= LENGTH).all()
    expected = joint(p, p[FIRST])
    # What follows a stop token was never drawn, and its place holds 0.
    for cut in (1, 2):
        prefix = (slice(None),) * (cut - 1) + (stop,)
        whole = expected[prefix].sum(axis=tuple(range(cut - 1, LENGTH - 1)))
        expected[prefix] = 0
        expected[(*prefix, *[0] * (LENGTH - cut))] = whole
    assert p_value(counted(np.where(np.arange(LENGTH) < count[:, None], tokens[:, :LENGTH], 0)), expected) > LEAST_P


def every_draft_stands(
    logits_SWV: jax.Array, drafts: Drafts, depth_S: jax.Array, filters: Filters, position_S: jax.Array, *, strict: bool
) -> Decision:
    return depth_S, accept(logits_SWV, drafts, jnp.int32(0) * depth_S, filters, position_S, strict=strict)[1]


def replaced_from_p(
    logits_SWV: jax.Array, drafts: Drafts, depth_S: jax.Array, filters: Filters, position_S: jax.Array, *, strict: bool
) -> Decision:
    count_S, follower_S = accept(logits_SWV, drafts, depth_S, filters, position_S, strict=strict)

    def plain(logits_WV: jax.Array, count: jax.Array, filters: Filters, position: jax.Array) -> jax.Array:
        return draw(filtered(logits_WV[count], filters, strict=strict), filters, position + count, REPLACEMENT, strict=strict)

    return count_S, jnp.where(count_S < depth_S, jax.vmap(plain)(logits_SWV, count_S, filters, position_S), follower_S)


@pytest.mark.long
@pytest.mark.parametrize("wrong", [pytest.param(every_draft_stands, marks=pytest.mark.slow), replaced_from_p])
def test_the_statistic_tells_a_wrong_rule(wrong, monkeypatch):
    monkeypatch.setattr(decode, "accept", wrong)
    sampling = SAMPLINGS[0]
    # Not through `decode.run`, which keeps what it has compiled.
    tokens, _, _, _ = table_loop(inspect.unwrap(decode.run))(*asked(sampling, 2))
    p = transitions(tables()[0], sampling)
    observed = counted(tokens[:2_000, :LENGTH])
    assert p_value(observed, overlaid(joint(p, p[FIRST]), observed)) < LEAST_P


# ----- the shipped model

PROMPT = "And it came to pass"
TOP_K = 8
TOP = Sampling(1.0, top_k=TOP_K)
DRAFTS = 2
GENERATIONS = 20_000


@functools.cache
def model() -> LanguageModel:
    return ds4jax.load(max_draft=DRAFTS)


@functools.cache
def prompt() -> tuple[int, ...]:
    """A text whose last token is the fixed first one."""
    return tuple(model().encode(PROMPT).tolist())


@functools.cache
def continuations() -> tuple[np.ndarray, np.ndarray]:
    """All that three draws can give, int32 [TOP_K³, 3], and their probabilities from plain forward passes."""
    prefixes, probabilities = [prompt()], [1.0]
    for _ in range(LENGTH):
        following, its = [], []
        for prefix, probability in zip(prefixes, probabilities, strict=True):
            logits_V = model().logits(prefix, strict=True)["logits"][-1].astype(np.float64)
            top = np.argsort(-logits_V)[:TOP_K]
            weights = np.exp(logits_V[top] - logits_V[top[0]])
            following += [(*prefix, int(token)) for token in top]
            its += list(probability * weights / weights.sum())
        prefixes, probabilities = following, its
    return np.array(prefixes)[:, len(prompt()) :], np.array(probabilities)


def generations(count: int) -> Iterator[np.ndarray]:
    """What the loop draws with seeds 0, 1, ... after the prompt, which is taken into the cache once."""
    shipped, known, drafter = model(), len(prompt()) - 1, MTPDrafter()
    state = decode.start(shipped.config, MIN_CAPACITY, prompt()[-1:], drafter=drafter, max_draft=DRAFTS)
    taken = (padded(np.array(prompt(), np.int32), start, PREFILL[0]) for start in (0, 1))
    cache, drafting = decode.prefill(
        shipped.graph, shipped.arrays, state.cache, state.drafting, *taken, jnp.int32(known), drafter=drafter, strict=True
    )
    state = dataclasses.replace(state, cache=cache, drafting=drafting)
    limits, _, policy = asked(TOP, DRAFTS)
    # As `generate` asks, so that it is the same executable.
    policy = dataclasses.replace(policy, costs=jnp.ones(1 + DRAFTS, jnp.float32))
    for seed in range(count):
        filters = Filters.of([dataclasses.replace(TOP, seed=seed)])
        copy = jax.tree.map(jnp.copy, state)
        static = {"drafter": drafter, "max_draft": DRAFTS, "strict": True}
        end, _ = decode.run(shipped.graph, shipped.arrays, copy, limits, filters, policy, **static)
        yield np.array(end.tokens[0, :LENGTH])


def observed_continuations(count: int) -> np.ndarray:
    """How often each continuation was drawn; nothing else may be."""
    index = {tuple(ids): i for i, ids in enumerate(continuations()[0].tolist())}
    drawn = [index[tuple(ids.tolist())] for ids in generations(count)]
    return np.bincount(drawn, minlength=len(index))


@pytest.mark.slow
def test_the_shipped_model_draws_from_its_own_joint_distribution():
    ids, probability = continuations()
    assert len(np.unique(ids, axis=0)) == TOP_K**LENGTH
    assert p_value(observed_continuations(GENERATIONS), probability) > LEAST_P


@pytest.mark.long
def test_the_same_seed_says_the_same_however_it_is_read():
    def text(seed: int, draft: int, budget: int | None) -> list[int]:
        sampling = Sampling(1.0, top_p=0.95, seed=seed)
        generation = model().stream(prompt(), max_new_tokens=24, sampling=sampling, strict=True, draft=draft, ignore_eos=True)
        if budget is None:
            return sum(generation, [])
        while generation.advance(budget):
            pass
        return generation.ids

    for draft in range(DRAFTS + 1):
        texts = {tuple(text(5, draft, budget)) for budget in (None, 1, 3, 24)}
        assert len(texts) == 1
        assert len(next(iter(texts))) == 24
        assert tuple(text(6, draft, 24)) not in texts

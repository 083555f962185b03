"""Drafts copied from the text: what is copied, what is kept of the text, and that none of it changes what is said."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from hypothesis import given
from hypothesis import strategies as st
from numerics import arrays, assert_bits_equal, golden_transformer
from oracle import continued, prefilled, visible

import ds4jax
from ds4jax.cache.state import Rows
from ds4jax.decode.drafter import Drafts, Tapping, committed, taps_of
from ds4jax.decode.drafters.ngram import NgramDrafter, NgramState
from ds4jax.decode.drafters.second_opinion import Opinions, SecondOpinion
from ds4jax.decode.sampling import Filters, Sampling
from ds4jax.engine.session import Session
from ds4jax.errors import InputError
from ds4jax.language_model import LanguageModel
from ds4jax.random_models.oracle import OracleDrafter

V, K, CAPACITY, ROWS = 6, 5, 24, 8
MODEL: Any = SimpleNamespace(config=SimpleNamespace(vocab_size=V))
ORDINARY, BRIEF = NgramDrafter(), NgramDrafter(longest=3, shortest=1)


def expected(text: list[int], drafter: NgramDrafter) -> tuple[list[int], int]:
    """Drafts after a text, whose first token nobody knows, and the length of the match."""
    known = text[1:]
    for length in range(min(drafter.longest, len(known) - 1), drafter.shortest - 1, -1):
        for end in range(len(known) - 1, length - 1, -1):
            if known[end - length : end] == known[-length:]:
                distance, copied = len(known) - end, list(known)
                for _ in range(K):
                    copied.append(copied[-distance])
                return copied[-K:], length
    return [-1] * K, 0


def held(texts: list[list[int]], stale: list[int]) -> NgramState:
    """The state of these texts. What is not known of them holds other tokens."""
    tokens = np.resize(np.array(stale, np.int32), (len(texts), CAPACITY + ROWS))
    for row, text in zip(tokens, texts, strict=True):
        row[1 : len(text)] = text[1:]
    return NgramState(jnp.asarray(tokens))


@functools.partial(jax.jit, static_argnums=0)
def _draft(drafter: Any, state: Any, last_S: jax.Array, start_S: jax.Array) -> tuple[Drafts, Any]:
    ones_S = jnp.ones_like(last_S)
    filters = Filters.of([Sampling()] * len(last_S))
    drafted: tuple[Drafts, Any] = drafter.draft(MODEL, state, last_S, Rows.step(start_S, 1, ones_S), K * ones_S, K, filters)
    return drafted


def drafted(drafter: Any, state: Any, texts: list[list[int]]) -> Drafts:
    last_S, start_S = (jnp.array(numbers, jnp.int32) for numbers in ([t[-1] for t in texts], [len(t) - 1 for t in texts]))
    return _draft(drafter, state, last_S, start_S)[0]


tokens_of_few = st.lists(st.integers(0, 2), min_size=1, max_size=CAPACITY + 1)


@pytest.mark.parametrize("drafter", [ORDINARY, BRIEF], ids=["2 to 8", "1 to 3"])
@pytest.mark.parametrize("sequences", [1, 3])
@given(data=st.data())
def test_the_longest_match_is_copied_and_of_equal_ones_the_latest(sequences, drafter, data):
    texts = data.draw(st.lists(tokens_of_few, min_size=sequences, max_size=sequences))
    drafts = drafted(drafter, held(texts, data.draw(tokens_of_few)), texts)
    wanted, lengths = zip(*(expected(text, drafter) for text in texts), strict=True)
    assert drafts.tokens.tolist() == list(wanted)
    np.testing.assert_array_equal(drafts.q, np.array(wanted)[..., None] == np.arange(V))
    equal = np.array([[length + i if length else 0 for i in range(K)] for length in lengths])
    np.testing.assert_allclose(drafts.confidence, equal / (equal + 3), rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "copied"),
    [
        ([0, 1, 2, 3, 4, 5, 1, 2], [3, 4, 5, 1, 2]),
        ([0, 1, 2, 3, 1, 2, 4, 1, 2], [4, 1, 2, 4, 1]),
        ([0, 5, 1, 2, 3, 4, 1, 2, 4, 5, 1, 2], [3, 4, 1, 2, 4]),
        ([0, 4, 4, 4], [4, 4, 4, 4, 4]),
        ([0, 3, 1, 2, 1, 2, 1, 2], [1, 2, 1, 2, 1]),
        ([1, 2, 3, 1, 2], [-1] * K),
        ([2], [-1] * K),
    ],
    ids=["prompt lookup", "the latest", "the longest", "one token", "a period", "the first is unknown", "a single token"],
)
def test_what_is_copied(text, copied):
    assert drafted(ORDINARY, held([text], [3, 1, 2, 4, 1, 2]), [text]).tokens.tolist() == [copied]


@pytest.mark.parametrize(("longest", "shortest"), [(0, 0), (65, 2), (4, 5), (4, 0), (2.0, 1)])
def test_lengths_out_of_bounds_are_refused(longest, shortest):
    with pytest.raises(InputError, match="longest is|shortest is"):
        NgramDrafter(longest, shortest)


def committed_to(state: NgramState, next_ids_T: jax.Array, rows: Rows) -> np.ndarray:
    return np.asarray(ORDINARY.commit(MODEL, state, jnp.zeros((len(next_ids_T), 1, 1)), next_ids_T, rows).tokens)


def test_a_step_keeps_accepted_tokens_only():
    state = held([[0] * 5, [0] * 9, [0] * 3], [5])
    new_SW = jnp.array([[1, 2, 3, 4], [1, 2, 3, 4], [2, 3, 4, 1]], jnp.int32)
    rows = Rows.step(jnp.array([4, 8, 2], jnp.int32), 4, jnp.array([2, 0, 4], jnp.int32))
    wanted = np.array(state.tokens)
    wanted[0, 5:7], wanted[2, 3:7] = [1, 2], [2, 3, 4, 1]
    np.testing.assert_array_equal(committed_to(state, rows.spread(new_SW), rows), wanted)


def test_a_prompts_chunk_keeps_no_padding():
    state = held([[0] * 5, [0] * 9, [0] * 3], [5])
    rows = Rows.following(jnp.array([4, 8, 2], jnp.int32), 8, jnp.int32(5), slot=1)
    wanted = np.array(state.tokens)
    wanted[1, 9:14] = [1, 2, 3, 4, 1]
    np.testing.assert_array_equal(committed_to(state, jnp.array([1, 2, 3, 4, 1, 0, 0, 0], jnp.int32), rows), wanted)


# ----- a second opinion


@dataclasses.dataclass(frozen=True)
class Steady:
    """Drafts token 5 with a confidence that its state tells, or without one; counts its drafts."""

    confident: bool = True

    def init(self, config: Any, capacity: int, rows: int, sequences: int) -> dict[str, jax.Array]:
        return {"confidence": jnp.zeros((sequences, K), jnp.float32), "drafts": jnp.int32(0), "means": jnp.float32(0)}

    def draft(self, model: Any, state: Any, last_S: jax.Array, *asked: Any) -> tuple[Drafts, Any]:
        tokens = jnp.full((len(last_S), K), 5, jnp.int32)
        q = jnp.full((*tokens.shape, V), 1 / V, jnp.float32)
        return Drafts(tokens, q, state["confidence"] if self.confident else None), state | {"drafts": state["drafts"] + 1}

    def commit(self, model: Any, state: Any, h_TND: jax.Array, next_ids_T: jax.Array, rows: Rows) -> Any:
        return state | {"means": jnp.float32(-1)}


class Tapped(Steady):
    """Reads two layers."""

    def taps(self, config: Any) -> tuple[int, ...]:
        return (3, 4)

    def commit(self, model: Any, state: Any, h_TND: Any, next_ids_T: Any, rows: Rows, means: Any = None) -> Any:
        return state | {"means": sum(jnp.sum(mean) for mean in means)}


# Matches of six, six, three and no tokens.
TEXTS = [[0, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2], [0, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2], [0, 3, 1, 2, 3, 4, 1, 2, 3], [0, 1, 2, 3]]
SURE, UNSURE, NAN = ([value] + [0.9] * (K - 1) for value in (0.7, 0.5, np.nan))


def opinions(drafter: SecondOpinion, confidence: list[list[float]]) -> Opinions:
    first = drafter.first.init(None, CAPACITY, ROWS, len(TEXTS))
    return Opinions(first | {"confidence": jnp.array(confidence, jnp.float32)}, held(TEXTS, [1]))


@pytest.mark.parametrize(
    ("first", "confidence", "chosen"),
    [
        (Steady(), [UNSURE, SURE, UNSURE, UNSURE], [True, False, False, False]),
        (Tapped(), [SURE, NAN, NAN, SURE], [False, True, False, False]),
        (Steady(confident=False), [SURE] * 4, [True, True, False, False]),
    ],
    ids=["confidence", "no number", "without confidence"],
)
def test_a_long_match_replaces_doubtful_drafts(first, confidence, chosen):
    drafter = SecondOpinion(first)
    state = opinions(drafter, confidence)
    drafts, ours = drafted(drafter, state, TEXTS), drafted(first, state.first, TEXTS)
    copied = drafted(drafter.ngram, state.ngram, TEXTS)
    lengths = [expected(text, drafter.ngram)[1] for text in TEXTS]
    assert [length >= drafter.long for length in lengths] == [True, True, False, False]
    assert (drafts.confidence is None) == (ours.confidence is None)
    for name in ("tokens", "q") + ("confidence",) * (ours.confidence is not None):
        for i, other in enumerate(chosen):
            np.testing.assert_array_equal(getattr(drafts, name)[i], getattr(copied if other else ours, name)[i], err_msg=name)
    last_S = jnp.zeros(len(TEXTS), jnp.int32)
    assert int(_draft(drafter, state, last_S, last_S)[1].first["drafts"]) == 1


@pytest.mark.parametrize(("first", "taps", "seen"), [(Steady(), (), -1), (Tapped(), (3, 4), 7)])
def test_both_drafters_commit(first: Any, taps: tuple[int, ...], seen: int):
    drafter = SecondOpinion(first)
    assert isinstance(drafter, Tapping)
    assert taps_of(drafter, MODEL.config) == taps
    rows = Rows.step(jnp.full(4, 2, jnp.int32), 1, jnp.ones(4, jnp.int32))
    means = [jnp.array([[1.0], [2.0]]), jnp.array([[4.0]])][: len(taps)]
    state = committed(drafter, MODEL, opinions(drafter, [SURE] * 4), jnp.zeros((4, 1, 1)), means, jnp.full(4, 5, jnp.int32), rows)
    assert float(state.first["means"]) == seen
    assert state.ngram.tokens[:, 3].tolist() == [5] * 4


@pytest.mark.parametrize(("long", "sure"), [(0, 0.5), (9, 0.5), (5, 1.5), (5, float("nan"))])
def test_bounds_of_a_second_opinion(long, sure):
    with pytest.raises(InputError, match="long is|sure is"):
        SecondOpinion(Steady(), long=long, sure=sure)


# ----- the loop

MOST, TOKENS = 4, 48
BEGINNINGS = (
    "And it came to pass in the days of Hezekiah the king of Judah, that the word of the LORD came unto Jeremiah the prophet, "
    "saying,\n",
    "And God called the light Day, and the darkness he called Night. And the evening and the morning were the first day.",
)
OPTIONS = {"drafter": ORDINARY, "ignore_eos": True, "max_new_tokens": TOKENS}


@functools.cache
def tiny() -> LanguageModel:
    return ds4jax.load(max_draft=MOST)


@functools.cache
def edit(beginning: str) -> str:
    """A prompt with the passage that the model writes after this beginning, one word changed, and the beginning again."""
    passage = tiny().generate(beginning, **OPTIONS).text
    changed = passage.replace(" and ", " or ", 1)
    assert changed != passage
    return f"{beginning}{changed}\n{beginning}"


@pytest.mark.long
@pytest.mark.parametrize("beginning", BEGINNINGS, ids=["Hezekiah", "Day"])
def test_a_repeated_passage_takes_few_steps_and_changes_no_bit(beginning: str):
    results = {draft: tiny().generate(edit(beginning), draft=draft, **OPTIONS) for draft in (0, 2, MOST)}
    for draft in (2, MOST):
        assert results[draft].ids == results[0].ids
        assert_bits_equal(results[draft].fingerprints, results[0].fingerprints)
    assert results[0].steps == TOKENS
    assert results[2].tokens_per_step >= 1.5
    assert results[MOST].tokens_per_step >= 2
    assert results[MOST].acceptance[0] < 1, "some drafts fall"


def known(session: Session) -> list[int]:
    """What the drafter's state holds of a session's text."""
    state = session._current()[0].state
    return state.drafting.tokens[0, 1 : int(state.cache.length[0]) + 1].tolist()


@pytest.mark.long
def test_a_session_keeps_and_rewinds_the_text(tmp_path: Path):
    """Drafts depend on the state alone, so equal numbers of steps tell that nothing was lost."""
    model, prompt = tiny(), tiny().encode(edit(BEGINNINGS[0])).tolist()
    uninterrupted = model.stream(prompt, **OPTIONS)
    uninterrupted.advance(TOKENS)
    session = Session(model, **OPTIONS)
    reply = session.stream(prompt).advance(9)
    session.save(tmp_path / "saved")
    restored = ds4jax.restore(tmp_path / "saved", model, drafter=ORDINARY)
    for branch in (session.fork(), restored):
        assert known(branch) == known(session)
        generation = branch.resume()
        generation.advance(TOKENS - len(reply))
        result, expected = generation.result(), uninterrupted.result()
        assert (result.ids, result.steps) == (expected.ids, expected.steps)
        assert_bits_equal(result.fingerprints, expected.fingerprints)
    longer = [*prompt, *prompt[1:41]]
    session.stream(longer)
    assert session.reused == len(prompt) - 1
    assert known(session) == longer[1:]


@pytest.mark.long
def test_a_session_that_outgrew_its_cache_is_saved_and_rewound(tmp_path: Path):
    """The state grows with the capacity, so the mark at the end of the prompt has to grow, too."""
    model, options = small_models.shallow_model(), {"strict": True, "ignore_eos": True, "drafter": ORDINARY, "max_new_tokens": 60}
    prompt = small_models.text(0, 440).tolist()
    session = Session(model, **options)
    session.stream(prompt).advance(60)
    assert session.resume().state.tokens.shape[1] == 2 * 512
    session.save(tmp_path / "saved")
    longer = [*prompt, *small_models.text(11, 20).tolist()]
    wanted = model.generate(longer, **options)
    for one in (session, ds4jax.restore(tmp_path / "saved", model, drafter=ORDINARY)):
        generation = one.stream(longer)
        assert one.reused >= len(prompt) - 2
        assert known(one) == longer[1:]
        assert sum(generation, []) == list(wanted.ids)


@functools.cache
def golden() -> LanguageModel:
    return LanguageModel(golden_transformer(), None, max_draft=2)


@pytest.mark.long
def test_a_second_opinion_changes_no_bit_and_loses_no_state():
    """The prompt ends with a long match. After it the first drafter drafts the truth in some steps."""
    model, drafter, tokens = golden(), SecondOpinion(OracleDrafter()), 24
    prompt = np.resize(arrays("golden")["ids"][:25], 60)
    before = prefilled(model, prompt, 512, drafter)
    match = drafter.ngram.repeat(before.drafting.ngram, before.last, before.cache.length, 2)
    assert int(match.length[0]) >= drafter.long
    plain = continued(model, before, tokens, 0, drafter)
    text = np.append(prompt, plain.tokens[0, :tokens])
    oracle = before.drafting.first
    told = dataclasses.replace(oracle, truth=oracle.truth.at[0, : len(text)].set(text), forced=jnp.ones(1, bool))
    before = dataclasses.replace(before, drafting=dataclasses.replace(before.drafting, first=told))
    drafted = continued(model, before, tokens, 2, drafter)
    assert (np.asarray(drafted.acceptance.stood) > 0).all(), "drafts that stand"
    assert int(drafted.acceptance.stood[0, 0]) < int(drafted.acceptance.tried[0, 0]), "drafts that fall"
    for name in ("tokens", "fingerprints"):
        assert_bits_equal(getattr(drafted, name)[:, :tokens], getattr(plain, name)[:, :tokens])
    found, wanted = (visible(model.config, state.cache, state.drafting.first.inner.cache) for state in (drafted, plain))
    for name, array in wanted.items():
        assert_bits_equal(found[name], array)
    assert drafted.drafting.ngram.tokens[0, 1 : len(text)].tolist() == text[1:].tolist()

"""A kept cache says what computing every prompt anew would say, and holds nothing of what was dropped."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import arrays, assert_bits_equal, golden_model
from oracle import prefilled, visible

import ds4jax
from ds4jax.cache.capacity import chunks, padded
from ds4jax.decode import loop as decode
from ds4jax.decode.drafters.mtp import MTPDrafter
from ds4jax.decode.loop import DecodeState
from ds4jax.engine.costs import costs_of
from ds4jax.engine.generation import Generation
from ds4jax.engine.options import Options
from ds4jax.engine.session import Session
from ds4jax.errors import InputError
from ds4jax.text.encoder import chat_prompt, follow_up
from ds4jax.text.reply import Reading

OPTIONS = {"strict": True, "ignore_eos": True}


def text(start: int, count: int) -> list[int]:
    """Tokens of the golden text, from anywhere on."""
    return np.roll(arrays("golden")["ids"], -start)[:count].tolist()


def assert_same(actual: DecodeState, expected: DecodeState) -> None:
    """Equal to the last bit in everything that a later row can see, the drafter's part included."""
    config = golden_model().config
    seen, wanted = (visible(config, state.cache, state.drafting.cache) for state in (actual, expected))
    assert seen.keys() == wanted.keys()
    for name, array in wanted.items():
        assert_bits_equal(seen[name], array)
    assert_bits_equal(actual.drafting.h_SND, expected.drafting.h_SND)
    assert actual.last.tolist() == expected.last.tolist()


def continued(first: list[int], kept: int, prompt: list[int]) -> DecodeState:
    """The state after a prompt of which the first rows come from another, in a cache that saw no reply."""
    model, drafter = golden_model(), MTPDrafter()
    state = prefilled(model, np.asarray(first), 512, drafter, strict=True)
    cache, drafting = dataclasses.replace(state.cache, length=jnp.full(1, kept, jnp.int32)), state.drafting
    ids_T, missing = np.asarray(prompt), len(prompt) - 1 - kept
    for start, width, count in chunks(missing, missing):
        ids, following = padded(ids_T, kept + start, width), padded(ids_T, kept + start + 1, width)
        cache, drafting = decode.prefill(
            model.graph, model.arrays, cache, drafting, ids, following, jnp.int32(count), drafter=drafter, strict=True
        )
    return dataclasses.replace(state, cache=cache, drafting=drafting, last=jnp.array(prompt[-1:], jnp.int32))


@given(st.integers(2, 90), st.integers(0, 60), st.integers(0, 1), st.integers(1, 90), st.sampled_from([0, 2, "auto"]))
@settings(max_examples=15)
@pytest.mark.long
def test_a_reply_that_is_dropped_leaves_no_trace(known: int, said: int, cut: int, new: int, draft: int | str) -> None:
    first = text(7, known)
    session = Session(golden_model(), max_new_tokens=64, draft=draft, **OPTIONS)
    reply = session.stream(first).advance(said)
    # Another token than the reply's first, so that nothing of it is shared.
    prompt = [*first[: known - cut], *((token + 1) % 512 for token in reply[:1]), *text(40, new)]
    generation = session.stream(prompt)
    assert session.reused <= known - 1
    assert session.reused >= known - 2 - cut or known <= 3
    assert_same(generation.state, continued(first, session.reused, prompt))


@pytest.mark.long
def test_only_what_is_new_is_computed() -> None:
    model = golden_model()
    session = Session(model, max_new_tokens=10, **OPTIONS)
    first = text(0, 40)
    reply = sum(session.stream(first), [])
    assert session.reused == 0
    # The whole reply stands: everything but its last token is in the cache.
    second = [*first, *reply, *text(3, 20)]
    answer = sum(session.stream(second), [])
    assert session.reused == len(first) + len(reply) - 1
    # The reply is dropped: its prompt stands, but for the row whose next token changed.
    third = [*second[:-1], *text(9, 12)]
    session.stream(third).advance(1)
    assert session.reused == len(second) - 2
    # The same prompt again: nothing is computed again.
    session.stream(third).advance(1)
    assert session.reused == len(third) - 1
    assert answer
    # What parts further back is computed anew.
    session.stream([*first, *text(30, 8)]).advance(1)
    assert session.reused == 0


@pytest.mark.parametrize("strict", [True, pytest.param(False, marks=pytest.mark.long)])
def test_the_same_prompt_again_uses_all_that_is_held(strict: bool) -> None:
    session, prompt = Session(golden_model(), max_new_tokens=12, ignore_eos=True, strict=strict), text(0, 62)
    first = session.stream(prompt)
    first.advance(12)
    for said in (12, 3):
        again = session.stream(prompt)
        assert session.reused == len(prompt) - 1
        again.advance(said)
        assert again.ids == first.ids[:said]
        assert_bits_equal(again.result().fingerprints, first.result().fingerprints[:said])
    # What ends inside the reply is continued from the end of the prompt: the drafter knows only rows that it was given last.
    shorter = [*prompt, *first.ids[:2]]
    session.stream(shorter).advance(3)
    assert session.reused == len(prompt) - 1


def test_a_continuation_that_was_overtaken_says_so() -> None:
    session, prompt = Session(golden_model(), max_new_tokens=30, **OPTIONS), text(0, 40)
    first = session.stream(prompt)
    second = session.resume()
    said = second.advance(4)
    with pytest.raises(InputError, match="this continuation was overtaken by a later one of its session; advance that one"):
        first.advance(20)
    with pytest.raises(InputError):
        session.stream([])
    # A prompt that is refused overtakes nothing.
    assert len(second.advance(3)) == 3
    third = session.stream(prompt)
    with pytest.raises(InputError, match="overtaken"):
        second.advance(1)
    assert third.advance(4) == said


def test_a_prompt_is_taken_in_by_steps() -> None:
    model, prompt, told = golden_model(), np.asarray(text(0, 41), np.int32), []
    options = Options(max_new_tokens=5, chunk=9, **OPTIONS)
    generation = Generation(model, prompt, options, costs=costs_of(model, options), progress=lambda *rows: told.append(rows))
    assert told == []
    assert [generation.prefill_step() for _ in range(3)] == [(9, 31), (18, 22), (27, 13)]
    assert told == [(9, 40), (18, 40), (27, 40)]
    # What is missing is taken in before the first step.
    assert generation.advance(5) == list(model.generate(prompt, max_new_tokens=5, chunk=9, **OPTIONS).ids)
    assert generation.prefill_step() == (40, 0)


@pytest.mark.slow
def test_a_larger_cache_holds_what_the_smaller_one_held() -> None:
    model = golden_model()
    session = Session(model, max_new_tokens=16, **OPTIONS)
    prompt = text(0, 400)
    capacities = []
    for i in range(4):
        generation = session.stream(prompt)
        capacities.append(generation.state.tokens.shape[1])
        assert sum(generation, []) == list(model.generate(prompt, max_new_tokens=16, **OPTIONS).ids)
        prompt = [*prompt, *generation.ids, *text(i, 60)]
        assert session.reused > 0 or i == 0
    assert capacities == [512, 512, 512, 1024]


def test_a_lost_cache_is_made_anew() -> None:
    model = golden_model()
    session = Session(model, max_new_tokens=6, **OPTIONS)
    prompt = text(0, 40)
    generation = session.stream(prompt)
    generation.advance(6)
    for leaf in jax.tree.leaves(generation.state):
        leaf.delete()
    longer = [*prompt, *generation.ids, *text(5, 9)]
    assert sum(session.stream(longer), []) == list(model.generate(longer, max_new_tokens=6, **OPTIONS).ids)
    assert session.reused == 0


def test_a_prompt_that_is_refused_leaves_the_cache() -> None:
    session = Session(golden_model(), max_new_tokens=6, **OPTIONS)
    prompt = text(0, 40)
    reply = session.stream(prompt).advance(6)
    for bad in ([], [512], np.zeros(1024, np.int32)):
        with pytest.raises(InputError):
            session.stream(bad)
    session.stream([*prompt, *reply, 3])
    assert session.reused == len(prompt) + len(reply) - 1


def test_prompts_of_one_token() -> None:
    model = golden_model()
    session = Session(model, max_new_tokens=4, **OPTIONS)
    for prompt in ([17], [17], [18], [17, 18], [17]):
        assert sum(session.stream(prompt), []) == list(model.generate(prompt, max_new_tokens=4, **OPTIONS).ids)


@pytest.mark.long
@pytest.mark.parametrize("max_draft", [pytest.param(0, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("think", [False, True])
def test_a_conversation_of_three_turns(think: bool, max_draft: int) -> None:
    model = ds4jax.load(max_draft=max_draft)
    tokenizer = model.tokenizer
    options = {"max_new_tokens": 24, "strict": True}
    session = Session(model, **options)
    messages, ids, answer_ids = [{"role": "system", "content": "Speak as a prophet would."}], [], []
    for question in ("And what of the king?", "Who was his father? " * 8, "And what then?"):
        messages.append({"role": "user", "content": question})
        if ids:
            tail = follow_up(tokenizer, question, think=think)
            ids = [*ids[:-1], tokenizer.marker_id("</think>"), *answer_ids, *tail]
        whole = list(chat_prompt(messages, tokenizer=tokenizer, think=think).ids)
        ids = ids or whole
        generation = session.stream(ids)
        reply = sum(generation, [])
        assert reply == list(model.generate(ids, **options).ids)
        reading = Reading(tokenizer, chat=True, think=think)
        assert [*reading.push(reply), *reading.flush()]
        answer_ids = reading.answer_ids
        messages.append({"role": "assistant", "content": reading.answer})
        # The reply's own ids may spell its text in another way than the tokenizer would, never another text.
        assert tokenizer.decode(ids) == tokenizer.decode(whole)
    assert session.reused > 0

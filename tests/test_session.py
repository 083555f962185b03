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
from ds4jax import chat, decode
from ds4jax.buckets import chunks, padded
from ds4jax.decode import DecodeState
from ds4jax.drafter import MTPDrafter
from ds4jax.errors import InputError
from ds4jax.session import Session

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
    assert_bits_equal(actual.drafting.h_ND, expected.drafting.h_ND)
    assert int(actual.last) == int(expected.last)


def continued(first: list[int], kept: int, prompt: list[int]) -> DecodeState:
    """The state after a prompt of which the first rows come from another, in a cache that saw no reply."""
    model, drafter = golden_model(), MTPDrafter()
    state = prefilled(model, np.asarray(first), 512, drafter, strict=True)
    cache, drafting = dataclasses.replace(state.cache, length=jnp.full(1, kept, jnp.int32)), state.drafting
    ids_T, missing = np.asarray(prompt), len(prompt) - 1 - kept
    for start, width, count in chunks(missing, missing):
        ids, following = padded(ids_T, kept + start, width), padded(ids_T, kept + start + 1, width)
        cache, drafting = decode.prefill(
            model.graph, model.weights, cache, drafting, ids, following, jnp.int32(count), drafter=drafter, strict=True
        )
    return dataclasses.replace(state, cache=cache, drafting=drafting, last=jnp.int32(prompt[-1]))


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
    # The same prompt again: one row is computed again.
    session.stream(third).advance(1)
    assert session.reused == len(third) - 2
    assert answer
    # What parts further back is computed anew.
    session.stream([*first, *text(30, 8)]).advance(1)
    assert session.reused == 0


@pytest.mark.long
def test_a_larger_cache_holds_what_the_smaller_one_held() -> None:
    model = golden_model()
    session = Session(model, max_new_tokens=16, **OPTIONS)
    prompt = text(0, 400)
    capacities = []
    for i in range(4):
        generation = session.stream(prompt)
        capacities.append(len(generation.state.tokens))
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
@pytest.mark.parametrize("max_draft", [0, 2])
@pytest.mark.parametrize("think", [False, True])
def test_a_conversation_of_three_turns(think: bool, max_draft: int) -> None:
    model = ds4jax.load(max_draft=max_draft)
    tokenizer = model.tokenizer
    options = {"max_new_tokens": 24, "strict": True}
    session = Session(model, **options)
    turns, ids, answer_ids = [chat.Turn("system", "Speak as a prophet would.")], [], ()
    for question in ("And what of the king?", "Who was his father? " * 8, "And what then?"):
        turns.append(chat.Turn("user", question))
        if ids:
            tail = chat.follow_up(tokenizer, question, think=think)
            ids = [*ids[:-1], tokenizer.marker_id("</think>"), *answer_ids, *tail]
        whole = chat.encode(tokenizer, turns, think=think)
        ids = ids or whole
        generation = session.stream(ids)
        reply = sum(generation, [])
        assert reply == list(model.generate(ids, **options).ids)
        parts = chat.split_reasoning(tokenizer, reply, think=think)
        answer_ids = parts.answer_ids
        turns.append(chat.Turn("assistant", parts.answer))
        # The reply's own ids may spell its text in another way than the tokenizer would, never another text.
        assert tokenizer.decode(ids) == tokenizer.decode(whole)
    assert session.reused > 0

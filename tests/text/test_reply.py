"""Continuations read for a screen: reasoning apart from the answer, the answer's tokens, plain texts."""

from __future__ import annotations

import itertools

import chat_golden
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4jax.text.reply import Piece, Reading
from ds4jax.text.tokenizer import END_THINK, EOS, THINK, Tokenizer

# Short texts, some of them with markers spelled out.
WORDS = st.lists(st.sampled_from(["a", " the", "\n", "12", "é", "😀", "你好", THINK, END_THINK, EOS]), max_size=6).map("".join)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return chat_golden.small_tokenizer(tmp_path_factory.mktemp("chat"))


@given(WORDS, WORDS, st.lists(st.integers(0, 60), max_size=6))
def test_a_reply_comes_apart_at_any_cut(small: Tokenizer, reasoning: str, answer: str, cuts: list[int]) -> None:
    ids = [*small.encode(reasoning), small.marker_id(END_THINK), *small.encode(answer)]
    reading, shown = Reading(small, chat=True, think=True), {"reasoning": "", "answer": ""}
    for start, end in itertools.pairwise([0, *sorted(cuts), len(ids)]):
        for kind, text in reading.push(ids[start:end]):
            assert text
            shown[kind] += text
        assert reading.reasons == (small.marker_id(END_THINK) not in ids[: max(start, end)])
    assert list(reading.flush()) == []
    assert shown == {"reasoning": reasoning, "answer": answer} == {"reasoning": reading.reasoning, "answer": reading.answer}
    assert reading.text == f"{reasoning}{END_THINK}{answer}"
    assert (reading.ids, reading.answer_ids) == (ids, small.encode(answer))


def test_replies_that_end_early(small: Tokenizer) -> None:
    end, smile = small.marker_id(END_THINK), small.encode("😀")
    assert len(smile) == 4
    for ids, reasoning, answer, answer_ids in (
        (small.encode("Hm"), "Hm", "", []),
        ([], "", "", []),
        ([end], "", "", []),
        # Half a character is given up where the reasoning ends; it must not run into the answer.
        ([*smile[:2], end, *smile[2:]], "\ufffd", "\ufffd\ufffd", smile[2:]),
        # Only the first marker ends the reasoning.
        ([*small.encode("a"), end, *small.encode("b"), end], "a", "b</think>", [*small.encode("b"), end]),
    ):
        reading = Reading(small, chat=True, think=True)
        list(reading.push(ids))
        list(reading.flush())
        assert (reading.reasoning, reading.answer, reading.answer_ids) == (reasoning, answer, answer_ids)
    reading = Reading(small, chat=True, think=True)
    assert list(reading.push(smile[:3])) == []
    assert list(reading.flush()) == [Piece("reasoning", "\ufffd")]


def test_a_marker_that_the_prompt_ends_in_is_no_answer(small: Tokenizer) -> None:
    """The next prompt puts the answer's ids behind that marker."""
    reading = Reading(small, chat=True)
    ids = small.encode("ok")
    assert list(reading.push([small.marker_id(END_THINK), *ids]))
    assert (reading.answer, reading.answer_ids) == ("ok", ids)
    plain = Reading(small)
    assert list(plain.push([small.marker_id(END_THINK), *ids]))
    assert plain.answer == "</think>ok"

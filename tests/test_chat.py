"""Conversations rendered as the golden ones, and replies taken apart while they come."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import v4_vocabulary
from gguf_files import vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4jax.chat import Piece, Reply, ReplyStream, Turn, encode, follow_up, render, split_reasoning
from ds4jax.errors import InputError
from ds4jax.tokenizer import END_THINK, EOS, THINK, Tokenizer, build_bpe

CHATS = v4_vocabulary.GOLDEN_CASES["chats"]
INJECTION = v4_vocabulary.GOLDEN_CASES["chat_injection"]
USER, SYSTEM = Turn("user", "Why?"), Turn("system", "Be brief.")
THOUGHT = Turn("assistant", "Because.", "Hm.")


def turns_of(chat: dict[str, Any]) -> list[Turn]:
    return [Turn(**message) for message in chat["messages"]]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The golden vocabulary of 640 tokens."""
    path = tmp_path_factory.mktemp("chat") / "tokenizer.json"
    words = vocabulary()
    specials = [token for token, kind in zip(words["tokens"], words["token_types"], strict=True) if kind != 1]
    build_bpe(words["tokens"], words["merges"], specials).save(str(path))
    return Tokenizer.from_file(path)


@pytest.mark.parametrize("chat", [*CHATS, INJECTION], ids=lambda chat: chat["name"])
def test_rendered_text(chat: dict[str, Any]) -> None:
    assert render(turns_of(chat), think=chat["think"] == "high") == chat["rendered"]


def test_all_conversations_are_there() -> None:
    assert len(CHATS) == 13
    assert {chat["think"] for chat in CHATS} == {"none", "high"}


@pytest.mark.parametrize("chat", CHATS, ids=lambda chat: chat["name"])
def test_ids(chat: dict[str, Any]) -> None:
    tokenizer = v4_vocabulary.tokenizer()
    assert encode(tokenizer, turns_of(chat), think=chat["think"] == "high") == chat["ids"]
    assert tokenizer.encode(chat["rendered"], parse_special=True) == chat["ids"]


def test_markers_in_a_users_text_stay_text() -> None:
    tokenizer = v4_vocabulary.tokenizer()
    assert encode(tokenizer, turns_of(INJECTION)) == INJECTION["ids_user_text_plain"]
    assert tokenizer.encode(INJECTION["rendered"], parse_special=True) == INJECTION["ids_rendered_parsed"]


def test_what_the_golden_conversations_leave_out(small: Tokenizer) -> None:
    bos, eos, user, assistant = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
    for turns, options, expected in (
        ([SYSTEM, USER], {"think": True, "effort_prefix": "Try.\n\n"}, f"Try.\n\nBe brief.{user}Why?{assistant}<think>"),
        ([USER], {"think": True, "effort_prefix": "Try.\n\n"}, f"Try.\n\n{user}Why?{assistant}<think>"),
        ([Turn("system", ""), SYSTEM, USER], {}, f"Be brief.{user}Why?{assistant}</think>"),
        ([USER, USER], {}, f"{user}Why?{user}Why?{assistant}</think>"),
        ([USER, THOUGHT], {}, f"{user}Why?{assistant}</think>Because.{eos}"),
        ([USER, THOUGHT], {"think": True}, f"{user}Why?{assistant}<think>Hm.</think>Because.{eos}"),
        ([USER, Turn("assistant", "So.")], {"think": True}, f"{user}Why?{assistant}<think></think>So.{eos}"),
    ):
        assert render(turns, **options) == bos + expected
        assert encode(small, turns, **options) == small.encode(bos + expected, parse_special=True)


@pytest.mark.parametrize(
    ("turns", "options", "message"),
    [
        ([], {}, "turns: there is no user turn"),
        ([SYSTEM], {}, "turns: there is no user turn"),
        ([Turn("tool", "3")], {}, r"turns\[0\]: role: 'tool' is unknown; it must be one of system, user, assistant"),
        ([THOUGHT, USER], {}, r"turns\[0\]: role: an assistant's turn must follow a user's"),
        ([SYSTEM, THOUGHT, USER], {}, r"turns\[1\]: role: an assistant's turn must follow"),
        ([USER, THOUGHT, THOUGHT], {}, r"turns\[2\]: role: an assistant's turn must follow"),
        ([USER, SYSTEM], {}, r"turns\[1\]: role: a system turn after the first user turn"),
        ([USER, THOUGHT, SYSTEM, USER], {}, r"turns\[2\]: role: a system turn after the first user turn"),
        ([dataclasses.replace(USER, reasoning="")], {}, r"turns\[0\]: reasoning: only an assistant's turn has any"),
        ([USER], {"effort_prefix": "Try."}, "effort_prefix: it asks for reasoning, which think=False rules out"),
    ],
)
def test_conversations_that_the_format_lacks(turns: list[Turn], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        render(turns, **options)
    assert "\n" not in str(raised.value)


def test_a_vocabulary_without_markers_is_refused() -> None:
    tokens = [token for token in vocabulary()["tokens"] if token != "<think>"]
    bpe = build_bpe(tokens, [], [])
    plain = Tokenizer(tokens, [0, 1], lambda _: bpe, bos_id=0, eos_id=1)
    with pytest.raises(InputError, match="tokenizer: <｜User｜>: the vocabulary has no such marker"):
        encode(plain, [USER])
    with pytest.raises(InputError, match="tokenizer: </think>: the vocabulary has no such marker"):
        ReplyStream(plain)


# Short texts, some of them with markers spelled out.
WORDS = st.lists(st.sampled_from(["a", " the", "\n", "12", "é", "😀", "你好", THINK, END_THINK, EOS]), max_size=6).map("".join)


@given(st.lists(WORDS, min_size=1, max_size=3), WORDS, st.booleans(), st.booleans())
def test_a_conversation_goes_on_where_it_was(
    small: Tokenizer, questions: list[str], answer: str, think: bool, think_next: bool
) -> None:
    turns = [SYSTEM, *(Turn("user", question) for question in questions)]
    prompt = encode(small, turns, think=think)
    longer = [*turns, Turn("assistant", answer, "dropped" if think else None), USER]
    tail = follow_up(small, USER.content, think=think_next)
    assert encode(small, longer, think=think_next) == [
        *prompt[:-1],
        small.marker_id(END_THINK),
        *small.encode(answer),
        *tail,
    ]
    if not think:
        assert encode(small, longer, think=think_next) == [*prompt, *small.encode(answer), *tail]


@given(WORDS, WORDS, st.lists(st.integers(0, 60), max_size=6))
@settings(max_examples=200)
def test_a_reply_comes_apart_at_any_cut(small: Tokenizer, reasoning: str, answer: str, cuts: list[int]) -> None:
    ids = [*small.encode(reasoning), small.marker_id(END_THINK), *small.encode(answer)]
    stream, shown = ReplyStream(small, think=True), {"reasoning": "", "answer": ""}
    for start, end in itertools.pairwise([0, *sorted(cuts), len(ids)]):
        for kind, text in stream.push(ids[start:end]):
            assert text
            shown[kind] += text
        assert reasoning.startswith(shown["reasoning"])
        assert answer.startswith(shown["answer"])
        assert shown["reasoning"] == reasoning or not shown["answer"]
    assert stream.flush() == []
    assert shown == {"reasoning": reasoning, "answer": answer}
    whole = split_reasoning(small, ids, think=True)
    assert whole == Reply(reasoning, answer, tuple(small.encode(answer)))
    assert stream.answer_ids == list(whole.answer_ids)


def test_replies_that_end_early(small: Tokenizer) -> None:
    end, smile = small.marker_id(END_THINK), small.encode("😀")
    assert len(smile) == 4
    assert split_reasoning(small, small.encode("Hm"), think=True) == Reply("Hm", "", ())
    assert split_reasoning(small, [], think=True) == Reply("", "", ())
    assert split_reasoning(small, [end], think=True) == Reply("", "", ())
    # Half a character is given up where the reasoning ends; it must not run into the answer.
    assert split_reasoning(small, [*smile[:2], end, *smile[2:]], think=True) == Reply("\ufffd", "\ufffd\ufffd", tuple(smile[2:]))
    stream = ReplyStream(small, think=True)
    assert stream.push(smile[:3]) == []
    assert stream.flush() == [Piece("reasoning", "\ufffd")]


def test_only_the_first_marker_ends_the_reasoning(small: Tokenizer) -> None:
    end = small.marker_id(END_THINK)
    ids = [*small.encode("a"), end, *small.encode("b"), end, *small.encode("c")]
    assert split_reasoning(small, ids, think=True) == Reply("a", "b</think>c", tuple(ids[2:]))
    assert split_reasoning(small, ids) == Reply(None, "a</think>b</think>c", tuple(ids))

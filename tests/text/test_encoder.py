"""Prompts as DeepSeek's encoder writes them: every golden conversation, and what they leave out."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import chat_golden
import pytest
import v4_vocabulary
from gguf_files import vocabulary
from hypothesis import given
from hypothesis import strategies as st

import ds4jax
from ds4jax.errors import InputError
from ds4jax.text.efforts import NAMES, effort
from ds4jax.text.encoder import chat_prompt, follow_up
from ds4jax.text.tokenizer import END_THINK, EOS, THINK, Tokenizer, build_bpe

CASES = chat_golden.RENDER["cases"]
USER = {"role": "user", "content": "Why?"}
NOW = {"type": "function", "function": {"name": "now"}}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return chat_golden.small_tokenizer(tmp_path_factory.mktemp("chat"))


def test_all_conversations_are_there() -> None:
    assert len(CASES) == 138
    assert sum("refused" in case["expected"] for case in CASES) == 8


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden_conversations(case: dict[str, Any]) -> None:
    chosen = {key: case[key] for key in ("tools", "tool_choice", "response_format", "generate", "drop_thinking") if key in case}
    chosen |= {key: case[key] for key in ("think", "effort", "revision", "level")}
    expected, tokenizer = case["expected"], v4_vocabulary.tokenizer()
    if "refused" in expected:
        with pytest.raises(InputError) as refused:
            ds4jax.chat_prompt(case["messages"], tokenizer=tokenizer, **chosen)
        assert "\n" not in str(refused.value)
        return
    prompt = ds4jax.chat_prompt(case["messages"], tokenizer=tokenizer, **chosen)
    assert prompt.text == expected["text"]
    assert list(prompt.ids) == expected["ids"]
    parsed = tokenizer.encode(prompt.text, parse_special=True)
    assert parsed == expected.get("ids_all_parsed", expected["ids"])


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("revision", ["preview", "0731"])
@pytest.mark.parametrize("case", chat_golden.OFFICIAL, ids=lambda case: str(case["case"]))
def test_deepseeks_own_conversations(case: dict[str, Any], revision: str, generate: bool) -> None:
    messages, tools, text = chat_golden.official(case["case"])
    prompt = chat_prompt(
        messages,
        tokenizer=v4_vocabulary.tokenizer(),
        tools=tools,
        think=case["think"],
        effort=case["effort"],
        revision=revision,
        generate=generate,
        level="encoder",
    )
    assert revision in case["revisions"]
    assert prompt.text == text
    assert list(prompt.ids) == case["ids"]


def test_efforts_by_the_names_of_the_api() -> None:
    prefixes = chat_golden.RENDER["effort_prefixes"]
    tables = chat_golden.RENDER["api_efforts"]
    for revision in ("preview", "0731"):
        table = next(table for title, table in tables.items() if title.startswith(revision))
        for name, level in table.items():
            wanted = effort("high" if name == "absent" else name, think=True, revision=revision)
            assert wanted == ((False, "") if level == "no thinking" else (True, prefixes[revision][level])), name
        assert all(effort(name, think=True, revision=revision).think == (name != "none") for name in NAMES)
        assert effort(None, think=True, revision=revision) == (True, "")
        assert effort("max", think=False, revision=revision) == (False, "")


def test_effort_none_turns_reasoning_off(small: Tokenizer) -> None:
    asked = chat_prompt([USER], tokenizer=small, think=True, effort="none")
    assert asked == chat_prompt([USER], tokenizer=small)
    assert asked.text.endswith(END_THINK)


BOS, USER_MARK, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"


@pytest.mark.parametrize(
    ("messages", "options", "expected"),
    [
        ([USER], {"generate": False}, f"{USER_MARK}Why?"),
        ([{"role": "system", "content": "Hm."}], {"generate": False}, "Hm."),
        # Several messages of one turn: reasoning first, then the texts that are there.
        (
            [
                USER,
                {"role": "assistant", "content": "a", "reasoning": "r"},
                {"role": "assistant", "content": "", "reasoning_content": "s"},
                {"role": "assistant", "content": "b", "prefix": True},
            ],
            {"think": True},
            f"{USER_MARK}Why?{ASSISTANT}{THINK}r\n\ns{END_THINK}a\n\nb",
        ),
        # DeepSeek's own roles: results count as the user, and a search agent's turn stays without reasoning.
        (
            [{"role": "developer", "content": "d"}, USER],
            {"level": "encoder"},
            f"{USER_MARK}d{USER_MARK}Why?{ASSISTANT}{END_THINK}",
        ),
        (
            [{"role": "developer", "content": "d"}, USER],
            {"level": "encoder", "think": True},
            f"{USER_MARK}Why?{ASSISTANT}{THINK}",
        ),
        # "none" shows no tools, so reasoning is dropped.
        (
            [USER, {"role": "assistant", "content": "a", "reasoning": "r"}, USER],
            {"think": True, "tools": [NOW], "tool_choice": "none"},
            f"{USER_MARK}Why?{ASSISTANT}{END_THINK}a{EOS}{USER_MARK}Why?{ASSISTANT}{THINK}",
        ),
        # JSON, but no object.
        (
            [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "null"}}]}, USER],
            {},
            f'{USER_MARK}Why?{ASSISTANT}{END_THINK}\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter '
            f'name="arguments" string="true">null</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>{EOS}'
            f"{USER_MARK}Why?{ASSISTANT}{END_THINK}",
        ),
    ],
)
def test_what_the_golden_conversations_leave_out(
    small: Tokenizer, messages: list[dict[str, Any]], options: dict[str, Any], expected: str
) -> None:
    prompt = chat_prompt(messages, tokenizer=small, **options)
    assert prompt.text == BOS + expected
    assert list(prompt.ids) == small.encode(BOS + expected, parse_special=True)


def test_tools_and_format_at_deepseeks_own_developer(small: Tokenizer) -> None:
    format = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
    by_request = chat_prompt(
        [{"role": "developer", "content": "d"}], tokenizer=small, level="encoder", tools=[NOW], response_format=format
    )
    own = {"role": "developer", "content": "d", "tools": [NOW], "response_format": {"type": "object"}}
    assert by_request == chat_prompt([own], tokenizer=small, level="encoder")
    assert by_request.text.startswith(f"{BOS}{USER_MARK}d\n\n## Tools\n\n")
    assert by_request.text.endswith(f'reply:\n{{"type": "object"}}{ASSISTANT}{END_THINK}')


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ("Why?", {}, "messages: is a str; it must be a list"),
        (["Why?"], {}, r"messages\[0\]: is a str; it must be an object"),
        ([{"content": "Why?"}], {}, r"messages\[0\]\.role: 'None' is unknown"),
        ([{"role": "latest_reminder", "content": "x"}], {}, r"messages\[0\]\.role: 'latest_reminder' is unknown"),
        ([{"role": "user", "content": 3}], {}, r"messages\[0\]\.content: is a int"),
        ([{"role": "user", "content": ["x"]}], {}, r"messages\[0\]\.content\[0\]: is a str; it must be an object"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], {}, r"messages\[0\]\.content\[0\]\.text: is a int"),
        ([{"role": "user", "prefix": True}], {}, r"messages\[0\]\.prefix: only an assistant's message"),
        ([USER, {"role": "assistant", "prefix": "yes"}], {}, r"messages\[1\]\.prefix: is 'yes'; it must be true or false"),
        ([USER, {"role": "assistant", "tool_calls": {}}], {}, r"messages\[1\]\.tool_calls: is a dict"),
        ([USER, {"role": "assistant", "tool_calls": [{}]}], {}, r"messages\[1\]\.tool_calls\[0\]\.function: missing"),
        ([USER, {"role": "assistant", "tool_calls": [{"function": {}}]}], {}, r"tool_calls\[0\]\.function\.name: missing"),
        (
            [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}],
            {},
            r"function\.arguments: is a list; it must be an object as JSON text",
        ),
        ([USER, {"role": "assistant", "reasoning_content": "\ud800"}], {}, r"messages\[1\]\.reasoning_content: character 0"),
        ([USER], {"tools": {}}, "tools: is a dict; it must be a list"),
        ([USER], {"tools": [{"type": "function", "name": "f"}]}, r"tools\[0\]\.function: missing"),
        ([USER], {"tools": [{"function": {"name": ""}}]}, r"tools\[0\]\.function\.name: missing"),
        ([USER], {"tools": [{"function": {"name": "f", "x": {1}}}]}, "tools: 'f': cannot be written as JSON"),
        ([USER], {"tool_choice": "maybe"}, "tool_choice: 'maybe' is unknown"),
        ([USER], {"tool_choice": {"type": "function"}}, "tool_choice: it must name a function"),
        ([USER], {"response_format": {"type": "grammar"}}, r"response_format\.type: 'grammar' is unknown"),
        ([USER], {"response_format": {"type": "json_schema"}}, r"response_format\.json_schema: missing"),
        ([USER], {"revision": "0801"}, "revision: '0801' is unknown; it must be one of preview, 0731"),
        ([USER], {"level": "client"}, "level: 'client' is unknown"),
        ([USER | {"task": "poem"}], {"level": "encoder"}, r"messages\[0\]\.task: 'poem' is unknown"),
        ([{"role": "developer"}], {"level": "encoder"}, r"messages\[0\]\.content: is empty"),
    ],
)
def test_what_cannot_be_used(small: Tokenizer, messages: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        chat_prompt(messages, tokenizer=small, **options)
    assert "\n" not in str(raised.value)


def test_a_vocabulary_without_markers_is_refused() -> None:
    tokens = [token for token in vocabulary()["tokens"] if token != THINK]
    bpe = build_bpe(tokens, [], [])
    plain = Tokenizer(tokens, [0, 1], lambda _: bpe, bos_id=0, eos_id=1)
    with pytest.raises(InputError, match="tokenizer: <｜User｜>: the vocabulary has no such marker"):
        chat_prompt([USER], tokenizer=plain)
    with pytest.raises(InputError, match="tokenizer: </think>: the vocabulary has no such marker"):
        ds4jax.ReplyParser(plain, think=False)


# Short texts, some of them with markers spelled out.
WORDS = st.lists(
    st.sampled_from(["a", " the", "\n", "12", "é", "😀", "你好", THINK, END_THINK, EOS, "<", "｜DSML｜"]), max_size=6
).map("".join)


@given(st.lists(WORDS, min_size=1, max_size=3), WORDS, st.booleans(), st.booleans())
def test_a_conversation_goes_on_where_it_was(
    small: Tokenizer, questions: list[str], answer: str, think: bool, think_next: bool
) -> None:
    said = [{"role": "system", "content": "Be brief."}, *({"role": "user", "content": question} for question in questions)]
    prompt = chat_prompt(said, tokenizer=small, think=think).ids
    longer = [*said, {"role": "assistant", "content": answer, "reasoning": "dropped" if think else None}, USER]
    whole = chat_prompt(longer, tokenizer=small, think=think_next).ids
    tail = [*small.encode(answer), *follow_up(small, USER["content"], think=think_next)]
    assert list(whole) == [*prompt[:-1], small.marker_id(END_THINK), *tail]
    assert small.decode(whole) == chat_prompt(longer, tokenizer=small, think=think_next).text


@given(
    st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), WORDS), min_size=1, max_size=6), st.booleans()
)
def test_texts_never_become_markers(small: Tokenizer, said: list[tuple[str, str]], think: bool) -> None:
    """Whatever is said, the markers are those of the same conversation with other words."""
    markers = {small.marker_id(text) for text in (BOS, EOS, USER_MARK, ASSISTANT, THINK, END_THINK, "｜DSML｜")}
    found = []
    for texts in (said, [(role, "word" if text else "") for role, text in said]):
        messages = [{"role": role, "content": text} for role, text in texts]
        prompt = chat_prompt([*messages, USER], tokenizer=small, think=think, tools=[NOW])
        assert small.decode(prompt.ids) == prompt.text
        found.append([i for i in prompt.ids if i in markers])
    assert found[0] == found[1]


def test_no_jax_is_needed() -> None:
    """A server's front renders and parses without an engine."""
    names = "encoder, parse_reply, reply, revision, efforts"
    program = (
        f"import sys; from ds4jax.text import {names}; import ds4jax; ds4jax.chat_prompt; ds4jax.parse_reply; print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "ds4jax.text.encoder" in loaded
    assert not {"jax", "jaxlib", "flax"} & set(loaded)

"""Replies taken apart: every golden reply, at once and cut anywhere, and replies that no model should write."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Sequence
from typing import Any

import chat_golden
import pytest
import v4_vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st

import ds4jax
from ds4jax.errors import InputError
from ds4jax.text.parse_reply import parse_reply
from ds4jax.text.parsed import CallDelta, Delta, ParsedReply, ToolCall
from ds4jax.text.reply_parser import ReplyParser
from ds4jax.text.tokenizer import DSML, END_THINK, Tokenizer

CASES = chat_golden.PARSE["cases"]
STREAMED = [(case, cut) for case in CASES for cut in case.get("stream", ())]
TOOLS = chat_golden.PARSE["tools"]["std"]
RANDOM_CUTS = 2_000


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return v4_vocabulary.tokenizer()


def agrees(reply: ParsedReply, expected: dict[str, Any]) -> bool:
    """Whether a reply is the expected one; of a call that was cut, arguments between two bounds."""
    if [reply.reasoning, reply.content, reply.finish] != [expected[key] for key in ("reasoning", "content", "finish")]:
        return False
    calls = [(call.name, call.complete) for call in reply.tool_calls]
    if calls != [(call["name"], call.get("complete", True)) for call in expected["tool_calls"]]:
        return False
    pairs = zip((call.arguments for call in reply.tool_calls), expected["tool_calls"], strict=True)
    return all(
        arguments.startswith(call["arguments"]) and call.get("arguments_at_most", call["arguments"]).startswith(arguments)
        for arguments, call in pairs
    )


def joined(deltas: Iterable[Delta]) -> tuple[str, str, list[list[str]]]:
    """Reasoning, content and calls (name and arguments) of the pieces of a stream."""
    deltas, calls = list(deltas), []
    for call in (call for delta in deltas for call in delta.tool_calls):
        if call.name is not None:
            assert call.index == len(calls)
            assert call.name
            calls.append([call.name, ""])
        calls[call.index][1] += call.arguments
    return "".join(delta.reasoning for delta in deltas), "".join(delta.content for delta in deltas), calls


def pieces(ids: Sequence[int], cuts: Iterable[int]) -> list[Sequence[int]]:
    return [ids[start:end] for start, end in itertools.pairwise([0, *sorted(cuts), len(ids)])]


def check_stream(tokenizer: Tokenizer, ids: Sequence[int], cuts: Iterable[int], end: str, **options: Any) -> ParsedReply:
    """A stream says what the reply taken apart at once has, and never more than that on its way."""
    whole = parse_reply(ids, tokenizer=tokenizer, end=end, **options)
    parser = ReplyParser(tokenizer, **options)
    deltas = [parser.push(piece) for piece in pieces(ids, cuts)]
    deltas.append(parser.finish(end))
    reasoning, content, calls = joined(deltas)
    assert parser.result() == whole
    assert (reasoning, content) == (whole.reasoning or "", whole.content)
    if not parser.malformed:
        assert calls == [[call.name, call.arguments] for call in whole.tool_calls]
    for call in whole.tool_calls:
        assert not call.complete or isinstance(json.loads(call.arguments, parse_int=str), dict)
    assert whole.finish != "tool_calls" or whole.tool_calls
    return whole


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden_replies(tokenizer: Tokenizer, case: dict[str, Any]) -> None:
    reply = ds4jax.parse_reply(case["ids"], tokenizer=tokenizer, end=case["end"], **chat_golden.options(case))
    assert agrees(reply, case["expect"]), reply


def test_all_replies_are_there() -> None:
    assert (len(CASES), len(STREAMED), sum(case["tier"] == 1 for case in CASES)) == (151, 82, 110)


@pytest.mark.parametrize(("case", "cut"), STREAMED, ids=lambda value: str(value.get("name", value.get("ids"))))
def test_what_a_stream_has_said_after_a_cut(tokenizer: Tokenizer, case: dict[str, Any], cut: dict[str, Any]) -> None:
    ids = case["ids"][: cut["ids"]]
    for size in (1, 4, len(ids)):
        parser = ReplyParser(tokenizer, **chat_golden.options(case))
        reasoning, content, calls = joined(parser.push(ids[start : start + size]) for start in range(0, len(ids), size))
        assert (reasoning, content) == (cut["reasoning"] or "", cut["content"])
        assert [name for name, _ in calls] == [call["name"] for call in cut["tool_calls"]]
        for (_, arguments), call in zip(calls, cut["tool_calls"], strict=True):
            assert arguments.startswith(call["arguments"])
            assert call["arguments_at_most"].startswith(arguments)


@pytest.mark.parametrize("case", [case for case in CASES if case.get("after_name")], ids=lambda case: case["name"])
def test_a_malformed_call_that_was_given_out_is_told(tokenizer: Tokenizer, case: dict[str, Any]) -> None:
    parser = ReplyParser(tokenizer, **chat_golden.options(case))
    deltas = [parser.push([i]) for i in case["ids"]]
    deltas.append(parser.finish(case["end"]))
    assert parser.malformed
    # The last call of the stream is the malformed one, and its arguments were never closed.
    *_, (_, arguments) = joined(deltas)[2]
    with pytest.raises(json.JSONDecodeError):
        json.loads(arguments)


def test_deltas_are_joined_where_their_order_stays() -> None:
    begun, more = CallDelta(0, "f", ""), CallDelta(0, None, "{")
    assert Delta(reasoning="a").joined(Delta(reasoning="b")) == Delta(reasoning="ab")
    assert Delta(content="a").joined(Delta(content="b")) == Delta(content="ab")
    assert Delta(tool_calls=(begun,)).joined(Delta(tool_calls=(more,))) == Delta(tool_calls=(CallDelta(0, "f", "{"),))
    apart = [Delta(reasoning="a"), Delta(content="a"), Delta(tool_calls=(begun,)), Delta(tool_calls=(CallDelta(1, "f", ""),))]
    for first in apart:
        for second in apart:
            if first is not second or first.tool_calls:
                assert first.joined(second) is None
    assert Delta(tool_calls=(begun,)).joined(Delta(tool_calls=(CallDelta(1, None, "{"),))) is None
    assert Delta(tool_calls=(begun, more)).joined(Delta(tool_calls=(more,))) is None


def test_random_cuts(tokenizer: Tokenizer) -> None:
    """Also of replies that end early or go on with half of another one, and with the other ways to ask for them."""
    source = random.Random(11)
    finished = set()
    for _ in range(RANDOM_CUTS):
        case, other = source.choice(CASES), source.choice(CASES)
        options = chat_golden.options(case)
        ids = list(case["ids"])
        if source.random() < 0.5:
            del ids[source.randint(0, len(ids)) :]
        if source.random() < 0.3:
            ids += other["ids"][source.randint(0, len(other["ids"])) :]
        if source.random() < 0.3:
            options["think"] = not options["think"]
        cuts = [source.randint(0, len(ids)) for _ in range(source.choice((0, 1, 3, 10, len(ids))))]
        finished.add(check_stream(tokenizer, ids, cuts, source.choice(("eos", "length")), **options).finish)
    assert finished == {"stop", "tool_calls", "length"}


# Pieces of markup, of text and of JSON in any order. Markers alone are single tokens.
SOUP = st.lists(
    st.sampled_from(
        [
            *(
                "\n",
                "\r\n",
                "\r",
                " ",
                "a",
                "é",
                "😀",
                '"',
                "\\",
                "{",
                "}",
                '{"command": "ls"}',
                "<",
                "</",
                ">",
                "END",
                "END_THINK",
            ),
            *("<M", "</M", "M", "<Mtool_calls>", "</Mtool_calls>", '<Minvoke name="bash">', '<Minvoke name="now">', "</Minvoke>"),
            *('<Minvoke name="no">', '<Mparameter name="command" string="true">', '<Mparameter name="timeout" string="false">'),
            *(
                '<Mparameter name="arguments" string="true">',
                "</Mparameter>",
                '<parameter name="x">',
                "</parameter>",
                "</invoke>",
            ),
            *('<Mtool_calls>\n<Minvoke name="bash">\n<Mparameter name="command" string="true">', "</Mparameter>\n</Minvoke>\n"),
            *('\n\n<Mtool_calls>\n<Minvoke name="now">\n</Minvoke>\n</Mtool_calls>', "</DSML｜parameter>", "12", "True"),
        ]
    ),
    max_size=14,
)


def soup_ids(tokenizer: Tokenizer, soup: list[str]) -> list[int]:
    ids = []
    for piece in soup:
        if piece == "END_THINK":
            ids.append(tokenizer.marker_id(END_THINK))
            continue
        for i, text in enumerate(piece.split("M")):
            ids += [tokenizer.marker_id(DSML)] if i else []
            ids += tokenizer.encode(text)
    return ids


@given(SOUP, st.lists(st.integers(0, 80), max_size=8), st.booleans(), st.sampled_from([(), ("END",), ("\n\n", "<")]), st.data())
@settings(max_examples=400)
def test_any_markup_cut_anywhere(
    tokenizer: Tokenizer, soup: list[str], cuts: list[int], think: bool, stop: tuple[str, ...], data: st.DataObject
) -> None:
    ids = soup_ids(tokenizer, soup)
    end = data.draw(st.sampled_from(["eos", "length"]))
    options = {"think": think, "tools": TOOLS, "stop": stop}
    whole = check_stream(tokenizer, ids, [cut for cut in cuts if cut <= len(ids)], end, **options)
    assert whole == check_stream(tokenizer, ids, range(1, len(ids)), end, **options)
    if not whole.tool_calls and not stop and not think:
        # Nothing is lost but noise at the end and a marker that the prompt had.
        text = tokenizer.decode(ids)
        assert text.removeprefix(END_THINK).startswith(whole.content) or text.startswith(whole.content)
    if not any(DSML in piece or "M" in piece for piece in soup):
        assert whole.tool_calls == ()


def parsed(tokenizer: Tokenizer, text: str, *, end: str = "eos", think: bool = False, stop: Sequence[str] = ()) -> ParsedReply:
    """The reply of a text in which M stands for the marker of calls and § for the end of the reasoning, cut everywhere, too."""
    ids = soup_ids(tokenizer, [piece for part in text.split("§") for piece in ("END_THINK", part)][1:])
    return check_stream(tokenizer, ids, range(len(ids)), end, think=think, tools=TOOLS, stop=stop)


LS = '\n<Minvoke name="bash">\n<Mparameter name="command" string="true">ls</Mparameter>\n</Minvoke>\n'
BLOCK = f"\n\n<Mtool_calls>{LS}</Mtool_calls>"
CALL = ToolCall("bash", '{"command": "ls"}')


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        # Line ends of both kinds belong to a block.
        (f"a\r\n\r\n\r\n{BLOCK[2:]}", {}, ParsedReply(None, "a\r\n", (CALL,), "tool_calls")),
        (f"a\n\r{BLOCK[1:]}", {}, ParsedReply(None, "a", (CALL,), "tool_calls")),
        # Text shown behind a quoted block, and then a real one.
        (
            f'x\n<Mtool_calls>\n<Minvoke name="no">\n</Minvoke>{LS}</Mtool_calls>\ny{BLOCK}',
            {},
            ParsedReply(
                None,
                f'x\n<Mtool_calls>\n<Minvoke name="no">\n</Minvoke>{LS}</Mtool_calls>\ny'.replace("M", DSML),
                (CALL,),
                "tool_calls",
            ),
        ),
        # A call without its block counts at the beginning of a line, and if it is whole.
        (f"Try it:{LS}", {}, ParsedReply(None, "Try it:", (CALL,), "tool_calls")),
        ('Use <Minvoke name="bash"> here', {}, ParsedReply(None, f'Use <{DSML}invoke name="bash"> here', (), "stop")),
        ('a\n<Minvoke name="bash"> here', {}, ParsedReply(None, f'a\n<{DSML}invoke name="bash"> here', (), "stop")),
        (LS[:-12], {"end": "length"}, ParsedReply(None, LS[:-12].replace("M", DSML), (), "length")),
        # A stop text before a call, in its line ends and behind it.
        (f"a{BLOCK}", {"stop": ["\n\n"]}, ParsedReply(None, "a", (), "stop")),
        (f"aEN{BLOCK}b", {"stop": ["ENb"]}, ParsedReply(None, "aENb", (CALL,), "tool_calls")),
        (f"{BLOCK}{BLOCK}", {"stop": ["\n\n"]}, ParsedReply(None, "", (), "stop")),
        (f"{BLOCK[2:]}{BLOCK}", {"stop": ["\n\n"]}, ParsedReply(None, "", (CALL, CALL), "tool_calls")),
        (f"{BLOCK} b", {"stop": ["b"]}, ParsedReply(None, " ", (CALL,), "tool_calls")),
        # The reasoning: two blocks, a block that a marker of its end cuts, and one that the limit cuts.
        (f"r{BLOCK}{BLOCK}", {"think": True}, ParsedReply(f"r{BLOCK}".replace("M", DSML), "", (CALL,), "tool_calls")),
        (f"r{BLOCK}§ {BLOCK}", {"think": True}, ParsedReply(f"r{BLOCK}".replace("M", DSML), " ", (CALL,), "tool_calls")),
        (f"r{BLOCK[:-4]}§b", {"think": True}, ParsedReply(f"r{BLOCK[:-4]}".replace("M", DSML), "b", (), "stop")),
        (f"r{BLOCK} ", {"think": True, "end": "length"}, ParsedReply(f"r{BLOCK} ".replace("M", DSML), "", (), "length")),
        (f"r{BLOCK}§\n", {"think": True}, ParsedReply("r", "", (CALL,), "tool_calls")),
        # The limit cuts behind a whole call.
        (f"\n\n<Mtool_calls>{LS}</Mtool", {"end": "length"}, ParsedReply(None, "", (CALL,), "length")),
        (f"\n\n<Mtool_calls>{LS}</Mtool", {}, ParsedReply(None, "", (CALL,), "tool_calls")),
        (f"{BLOCK}b", {"end": "length"}, ParsedReply(None, "b", (CALL,), "tool_calls")),
    ],
)
def test_what_the_golden_replies_leave_out(
    tokenizer: Tokenizer, text: str, options: dict[str, Any], expected: ParsedReply
) -> None:
    assert parsed(tokenizer, text, **options) == expected


def arguments(tokenizer: Tokenizer, body: str, name: str = "free") -> str | None:
    """The arguments of one call; None where it is none."""
    reply = parsed(tokenizer, f'<Mtool_calls><Minvoke name="{name}">{body}</Minvoke></Mtool_calls>')
    return reply.tool_calls[0].arguments if reply.tool_calls else None


@pytest.mark.parametrize(
    ("body", "name", "expected"),
    [
        ('<Mparameter name="" string="true">x</Mparameter>', "free", '{"": "x"}'),
        ('<Mparameter name="x"y" string="true">x</Mparameter>', "free", '{"x\\"y": "x"}'),
        ('<Mparameter name="a" string="false"> NONE </Mparameter>', "free", '{"a": null}'),
        (f'<Mparameter name="a" string="false">{"9" * 5000}</Mparameter>', "free", f'{{"a": {"9" * 5000}}}'),
        (f'<Mparameter name="a" string="false">{"[" * 5_000}</Mparameter>', "free", f'{{"a": "{"[" * 5_000}"}}'),
        ('<Mparameter name="input" string="false">{}</Mparameter>', "now", "{}"),
        ('<Mparameter name="arguments" string="true">ls</Mparameter>', "bash", '{"arguments": "ls"}'),
        ('{"a": NaN}', "free", None),
        ('<Mparameter name="a" string="true" type="x">y</Mparameter>', "free", None),
        ('<Mparameter name="a" name="b">y</Mparameter>', "free", None),
        # A tag without the marker that opened a value is closed by one.
        ('<parameter name="a">1</parameter>\n<parameter name="b">2</parameter>\n', "free", '{"a": "1", "b": "2"}'),
    ],
)
def test_arguments(tokenizer: Tokenizer, body: str, name: str, expected: str | None) -> None:
    assert arguments(tokenizer, body, name) == expected


@pytest.mark.parametrize(
    ("schema", "value", "expected"),
    [
        ({"type": ["string", "null"]}, "None", '"None"'),
        ({"type": ["integer", "null"]}, "None", "null"),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "true!", '"true!"'),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "True", '"True"'),
        ({"enum": ["True", "False"]}, "True", '"True"'),
        ({"const": True}, "True", "true"),
        ({"$ref": "#/x"}, "True", "true"),
    ],
)
def test_a_word_that_is_no_json_is_read_by_the_schema(
    tokenizer: Tokenizer, schema: dict[str, Any], value: str, expected: str
) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": schema}}}}
    text = f'<Mtool_calls><Minvoke name="f"><Mparameter name="a" string="false">{value}</Mparameter></Minvoke></Mtool_calls>'
    reply = parse_reply(soup_ids(tokenizer, [text]), tokenizer=tokenizer, think=False, tools=[tool])
    assert reply.tool_calls == (ToolCall("f", f'{{"a": {expected}}}'),)


def test_half_a_character_ends_at_a_marker(tokenizer: Tokenizer) -> None:
    end, smile = tokenizer.marker_id(END_THINK), tokenizer.encode("👩🏽‍🚀")
    first = next(i for i in range(1, len(smile)) if "\ufffd" in tokenizer.decode(smile[:i]))
    reply = check_stream(tokenizer, [*smile[:first], end, *tokenizer.encode("ok")], range(first), "eos", think=True)
    assert (reply.reasoning, reply.content) == (tokenizer.decode(smile[:first]), "ok")
    assert parse_reply(smile[:first], tokenizer=tokenizer, think=False).content == tokenizer.decode(smile[:first])


def test_bad_options(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="end: 'stop' is unknown; it must be one of eos, length"):
        parse_reply([], tokenizer=tokenizer, think=False, end="stop")
    with pytest.raises(InputError, match="stop: the text is empty"):
        parse_reply([], tokenizer=tokenizer, think=False, stop=[""])
    with pytest.raises(InputError, match="token id 129280 is outside the vocabulary"):
        parse_reply([129280], tokenizer=tokenizer, think=False)
    with pytest.raises(InputError, match=r"tools\[0\]: is a int; it must be an object"):
        ReplyParser(tokenizer, think=False, tools=[1])

"""`ds4jax chat`, fed line by line."""

from __future__ import annotations

import io
import re
import signal

import pytest

import ds4jax
from ds4jax.cli import main as cli
from ds4jax.engine.generation import Generation
from ds4jax.text.encoder import chat_prompt, follow_up

QUESTIONS = ["And what of the king?", "Who was his father?", "And then?"]
LINE = ["chat", "--max-new-tokens", "16"]


@pytest.fixture(scope="module")
def model() -> ds4jax.LanguageModel:
    return ds4jax.load()


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: bytes, *options: str) -> tuple[str, str]:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    assert cli.main([*LINE, *options]) == 0
    return capsys.readouterr()


def answers(model: ds4jax.LanguageModel, system: str = "") -> list[str]:
    """What is answered when every prompt is computed anew from the ids before it."""
    tokenizer, found, ids = model.tokenizer, [], []
    for question in QUESTIONS:
        said = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": question}]
        ids = [*ids, *follow_up(tokenizer, question)] if ids else list(chat_prompt(said, tokenizer=tokenizer).ids)
        reply = model.generate(ids, max_new_tokens=16)
        found.append(reply.text)
        ids = [*ids, *reply.ids]
    return found


@pytest.mark.long
def test_three_turns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: ds4jax.LanguageModel) -> None:
    expected = "".join(f"{answer}\n" for answer in answers(model, "Be brief."))
    data = "\n\n".join(QUESTIONS).encode()
    out, err = said(monkeypatch, capsys, data, "--system", "Be brief.", "--stats")
    assert out == expected
    figures = re.findall(r"(\d+) prompt tokens, (\d+) of them kept from before, (\d+) new tokens", err)
    (first, kept, new), second, third = (tuple(map(int, line)) for line in figures)
    assert (kept, new) == (0, 16)
    assert second[1] == first + new - 1
    assert third[1] == second[0] + second[2] - 1
    assert said(monkeypatch, capsys, data + b"\n/exit\nand more\n", "--system", "Be brief.")[0] == expected


def test_reasoning_is_computed_on_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: ds4jax.LanguageModel
) -> None:
    out, err = said(monkeypatch, capsys, "\n".join(QUESTIONS).encode(), "--think", "--stats", "--ignore-eos")
    figures = [tuple(map(int, line)) for line in re.findall(r"(\d+) prompt tokens, (\d+) of", err)]
    # The tiny model never ends its reasoning, so that every answer is empty and all that is kept is the prompt before it.
    assert out == "\n\n\n"
    assert err.count("note: no answer: the reasoning did not end within 16 tokens") == 3
    assert [kept for _, kept in figures] == [0, figures[0][0] - 1, figures[1][0] - 1]


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_the_reply_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    advance, calls = Generation.advance, []

    def pressed(generation: Generation, budget: int) -> list[int]:
        calls.append(budget)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        return advance(generation, budget)

    monkeypatch.setattr(Generation, "advance", pressed)
    out, err = said(monkeypatch, capsys, "\n".join(QUESTIONS[:2]).encode(), "--stats", "--ignore-eos")
    new = [int(count) for count in re.findall(r"(\d+) new tokens", err)]
    assert new == [1, 16]
    assert out.count("\n") >= 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_ends_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(generation: Generation, budget: int) -> list[int]:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")

    monkeypatch.setattr(Generation, "advance", pressed)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Why?\nAnd?\n"), encoding="utf-8"))
    assert cli.main(LINE) == 130


def test_a_stop_text_ends_each_reply(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: ds4jax.LanguageModel
) -> None:
    first = answers(model)[0]
    stop = first[6:9]
    out, _ = said(monkeypatch, capsys, QUESTIONS[0].encode(), "--stop", stop)
    assert out == first[: first.index(stop)] + "\n"


def test_nothing_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(monkeypatch, capsys, b"") == ("", "")
    assert said(monkeypatch, capsys, b"\n  \n/exit\n") == ("", "")


def test_a_terminal_is_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = iter([KeyboardInterrupt, QUESTIONS[0], EOFError])

    def asked(prompt: str) -> str:
        word = next(given)
        if isinstance(word, str):
            return word
        raise word

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    stdin = io.StringIO()
    stdin.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", stdin)
    assert cli.main([*LINE, "--think"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Ctrl-C ends a reply, Ctrl-D or /exit the conversation.\n\n\x1b[2m")
    assert out.endswith("\x1b[0m\n\n")


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (b"\xe9\n", [], "stdin: not UTF-8"),
        (b"word " * 5000, [], "the model's context"),
        (b"", ["--system", ""], "--system: the prompt is empty"),
        (b"", ["--max-new-tokens", "0"], "--max-new-tokens"),
        (b"", ["--draft", "8"], "--draft: 8 is out of range"),
    ],
)
def test_bad_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: bytes, options: list[str], message: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    with pytest.raises(SystemExit) as ended:
        cli.main([*LINE, *options])
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    assert message in err

"""Texts and conversations that are kept in a file, and what is wrong with such a file or with the options beside it."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
from pathlib import Path

import pytest

import ds4jax
from ds4jax.cli import main as cli
from ds4jax.cli.commands.reply import Screen
from ds4jax.engine import session_state as saving

PROMPT = "In the beginning"
QUESTIONS = ["And what of the king?", "Who was his father?", "And then?"]
CHAT = ["chat", "--max-new-tokens", "16", "--stats"]
# So that a file holds the state of a drafter on a CPU, too.
DRAFTING = ["--drafter", "mtp"]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["generate", *arguments]) == 0
    return capsys.readouterr().out


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.long
def test_a_text_goes_on(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    whole = json.loads(printed(capsys, PROMPT, "--max-new-tokens", "36", "--json"))
    greedy = whole["text"]
    first = printed(capsys, PROMPT, "--max-new-tokens", "12", "--save", "kept")
    second = json.loads(printed(capsys, "--restore", "kept", "--max-new-tokens", "11", "--save", "kept", "--json"))
    assert (second["prompt_tokens"], second["tokens"]) == (whole["prompt_tokens"] + 12, whole["tokens"][12:23])
    assert (second["steps"], second["tokens_per_step"]) == (11, 1), "of the added part"
    third = printed(capsys, "--restore", "kept", "--max-new-tokens", "13", "--save", "kept")
    assert first + second["text"] + third == greedy
    longer = PROMPT + greedy + " And so"
    anew = printed(capsys, longer, "--max-new-tokens", "8")
    assert printed(capsys, longer, "--restore", "kept", "--max-new-tokens", "8") == anew


@pytest.mark.long
def test_what_a_stop_text_kept_back_comes_first(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    greedy = printed(capsys, PROMPT, "--max-new-tokens", "24")
    stop = " the"
    shown = printed(capsys, PROMPT, "--max-new-tokens", "24", "--stop", stop, "--save", "kept")
    rest = printed(capsys, "--restore", "kept", "--max-new-tokens", "8", "--save", "kept")
    assert (shown + stop + rest).startswith(greedy[: len(shown + stop + rest)])
    assert rest
    assert shown == greedy[: greedy.index(stop)]


def test_a_stop_text_that_ends_within_a_token_loses_nothing(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    free = json.loads(printed(capsys, PROMPT, "--max-new-tokens", "24", "--json"))
    text, decode = free["text"], ds4jax.load().tokenizer.decode
    starts = [len(decode(free["tokens"][:n])) for n in range(1, 24)]
    # Two characters before a token's begin and the first two of its own, where that is new.
    stops = [text[at - 2 : at + 2] for at, after in itertools.pairwise(starts) if after > at + 2]
    stop = next(stop for at, stop in zip(starts[4:], stops[4:], strict=False) if text.count(stop) == 1)
    first = json.loads(printed(capsys, PROMPT, "--max-new-tokens", "24", "--stop", stop, "--save", "kept", "--json"))
    shown, left = first["text"], 24 - len(first["tokens"])
    assert not decode(first["tokens"]).endswith(stop)
    assert left
    for options in ([], ["--json"]):
        rest = printed(capsys, "--restore", "kept", "--max-new-tokens", str(left), *options)
        assert shown + stop + (json.loads(rest)["text"] if options else rest) == text


def left(command: list[str], monkeypatch: pytest.MonkeyPatch, pieces: int) -> str:
    """What the reader of a command's stdout has, who leaves before the next piece is printed."""
    reader, writer = os.pipe()
    read: list[str] = []
    count, show = itertools.count(), Screen._print

    def leave(screen: Screen, kind: str, text: str) -> None:
        if next(count) == pieces:
            read.append(os.read(reader, 1 << 16).decode())
            os.close(reader)
        show(screen, kind, text)

    with monkeypatch.context() as patched, os.fdopen(writer, "w") as stdout:
        patched.setattr("sys.stdout", stdout)
        patched.setattr(Screen, "_print", leave)
        assert cli.main(command) == 141
    return read[0]


def test_a_text_is_kept_when_its_reader_leaves(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    greedy = printed(capsys, PROMPT, "--max-new-tokens", "24")
    shown = left(["generate", PROMPT, "--max-new-tokens", "24", "--save", "kept"], monkeypatch, 3)
    rest = printed(capsys, "--restore", "kept", "--max-new-tokens", "24")
    assert 0 < len(shown) < len(greedy)
    assert (shown + rest).startswith(greedy)


def test_a_text_is_kept_when_its_object_cannot_be_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    greedy = printed(capsys, PROMPT, "--max-new-tokens", "24")
    first = printed(capsys, PROMPT, "--max-new-tokens", "12")
    with monkeypatch.context() as patched, open("/dev/full", "w") as full:
        patched.setattr("sys.stdout", full)
        with pytest.raises(SystemExit) as ended:
            cli.main(["generate", PROMPT, "--max-new-tokens", "12", "--save", "kept", "--json"])
    assert ended.value.code == 1
    assert first + printed(capsys, "--restore", "kept", "--max-new-tokens", "12") == greedy


def test_an_object_is_printed_when_its_text_cannot_be_kept(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "cannot be saved (No space left on device)", "kept")

    monkeypatch.setattr(saving, "save", full)
    with monkeypatch.context() as patched, open("out", "w") as out:
        patched.setattr("sys.stdout", out)
        with pytest.raises(SystemExit) as ended:
            cli.main(["generate", PROMPT, "--max-new-tokens", "12", "--save", "kept", "--json"])
    assert ended.value.code == 1
    assert len(json.loads((folder / "out").read_text())["tokens"]) == 12


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lines: list[str], *options: str) -> tuple[str, str]:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode()), encoding="utf-8"))
    assert cli.main([*CHAT, *options]) == 0
    return capsys.readouterr()


@pytest.mark.parametrize("options", [["--system", "Be brief."], ["--think", "--ignore-eos"]])
def test_a_conversation_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, options: list[str]
) -> None:
    options = [*options, *DRAFTING]
    out, err = said(monkeypatch, capsys, QUESTIONS, *options)
    outs, errs = "", ""
    for question in QUESTIONS:
        more, figures = said(monkeypatch, capsys, [question], "--session", "kept", *options)
        outs, errs = outs + more, errs + figures
        # It stands at the beginning of the conversation, which the file holds from now on.
        options = options[2:] if options[0] == "--system" else options
        options = [*DRAFTING, "--draft", "2"] if options == DRAFTING else options
    assert outs == out
    kept = r"(\d+) prompt tokens, (\d+) of them kept from before, (\d+) new tokens"
    assert re.findall(kept, errs) == re.findall(kept, err)
    assert len(re.findall(kept, err)) == len(QUESTIONS)


def test_a_reply_that_cannot_be_kept(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "cannot be saved (No space left on device); the old file is unchanged", "kept")

    monkeypatch.setattr(saving, "save", full)
    out, err = said(monkeypatch, capsys, QUESTIONS[:2], "--session", "kept")
    assert out.count("\n") >= 2
    assert err.count("ds4jax: note: this reply is not in the file: [Errno 28] cannot be saved (No space left") == 2
    assert not list(folder.iterdir())


def test_a_reply_is_kept_when_its_reader_leaves(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(QUESTIONS[0].encode()), encoding="utf-8"))
    left([*CHAT, "--session", "kept"], monkeypatch, 3)
    _, err = said(monkeypatch, capsys, QUESTIONS[1:2], "--session", "kept")
    (prompt, reused), *_ = re.findall(r"(\d+) prompt tokens, (\d+) of them kept from before", err)
    assert 0 < int(reused) < int(prompt)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    err = capsys.readouterr().err
    assert (ended.value.code, err.count("\n")) == (2, 1), err
    return err


def test_options_that_contradict_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    printed(capsys, PROMPT, "--max-new-tokens", "2", "--save", "text", *DRAFTING)
    said(monkeypatch, capsys, QUESTIONS[:1], "--session", "talk")
    (folder / "broken").write_bytes((folder / "text").read_bytes()[:-1])
    for line, message in (
        ("chat --session talk --system no", "--system stands at the beginning of a conversation, and .*talk holds one"),
        ("chat --session text", "text: holds a text and no conversation; go on with `ds4jax generate --restore`"),
        ("chat --session broken", "broken: the file has .* bytes"),
        ("generate --restore broken", "broken: the file has .* bytes"),
        ("generate --restore text --strict", "text: strict: the session was saved with strict False"),
        ("generate --restore text --max-draft 0", "text: max_draft: 2, and 0 in .*; open the model with max_draft 2"),
        ("generate --restore text --chat", "--restore goes on with a text"),
        ("generate --restore none", "--restore: none: no such file"),
        ("generate text --save .", "--save: .: exists and is not a file"),
        ("generate --save other", "nothing to continue; give a PROMPT, --prompt-file, --ids or --restore"),
    ):
        assert re.search(message, refused(capsys, *line.split())), line

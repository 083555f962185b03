"""`ds4jax generate` with prompts from elsewhere, conversations, stop texts and log-probabilities."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ds4jax
from ds4jax.cli import main as cli
from ds4jax.text.encoder import chat_prompt
from ds4jax.text.parse_reply import parse_reply
from ds4jax.text.reply import Reading

PROMPT = "In the beginning"
FEW = ["--max-new-tokens", "24"]


@pytest.fixture(scope="module")
def model() -> ds4jax.LanguageModel:
    return ds4jax.load()


def shown(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert cli.main(["generate", *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def told(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    return json.loads(shown(capsys, *arguments, "--json"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    return err


def say(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_prompts_from_files_and_stdin(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: ds4jax.LanguageModel, tmp_path: Path
) -> None:
    text = "And it came to pass,\n"
    expected = model.generate(text, max_new_tokens=24).text
    (tmp_path / "prompt.txt").write_text(text)
    assert shown(capsys, "--prompt-file", tmp_path / "prompt.txt", *FEW) == expected
    say(monkeypatch, text.encode())
    assert shown(capsys, "-", *FEW) == expected
    say(monkeypatch, b"")
    assert "stdin: the file is empty" in refused(capsys, "-")
    say(monkeypatch, b"\xe9")
    assert "stdin: not UTF-8 at byte 0" in refused(capsys, "-")


@pytest.mark.parametrize("think", [False, True])
def test_conversations(capsys: pytest.CaptureFixture[str], model: ds4jax.LanguageModel, think: bool) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    ids = chat_prompt(messages, tokenizer=model.tokenizer, think=think, effort="high", revision="preview").ids
    expected = model.generate(ids, max_new_tokens=24)
    parts = parse_reply(expected.ids, tokenizer=model.tokenizer, think=think)
    line = [PROMPT, "--chat", "--system", "Be brief.", *(["--think"] if think else []), *FEW]
    fields = told(capsys, *line)
    assert fields["prompt_tokens"] == len(ids)
    assert tuple(fields["tokens"]) == expected.ids
    assert (fields["text"], fields["reasoning"], fields["answer"]) == (expected.text, parts.reasoning, parts.content)
    assert (fields["reasoning"] is None) == (not think)
    assert list(fields)[:5] == ["prompt_tokens", "tokens", "text", "reasoning", "answer"]
    assert cli.main(["generate", *line]) == 0
    out, err = capsys.readouterr()
    assert (out, err.count("no answer")) == (parts.content, int(think))


def test_reasoning_is_dimmed_on_a_terminal_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    line = [PROMPT, "--chat", "--think", *FEW]
    reasoning = told(capsys, *line)["reasoning"]
    # Nothing on stdout must not look like nothing said.
    note = "ds4jax: note: no answer: the reasoning did not end within 24 tokens; allow more with --max-new-tokens\n"
    for terminal, expected in ((False, ""), (True, f"\x1b[2m{reasoning}\x1b[0m\n")):
        monkeypatch.setattr("sys.stdout.isatty", lambda terminal=terminal: terminal, raising=False)
        assert cli.main(["generate", *line]) == 0
        assert capsys.readouterr() == (expected, note)


@pytest.mark.parametrize("draft", ["0", "2"])
def test_stop_texts(capsys: pytest.CaptureFixture[str], model: ds4jax.LanguageModel, draft: str) -> None:
    free = model.generate(PROMPT, max_new_tokens=48)
    # Across a token's border, so that a part of it is held back.
    stop = free.text[30:36]
    cut = free.text.index(stop)
    needed = next(n for n in range(49) if stop in model.tokenizer.decode(free.ids[:n]))
    line = [PROMPT, "--max-new-tokens", "48", "--draft", draft, "--stop", "nowhere in it", "--stop", stop]
    fields = told(capsys, *line)
    assert (fields["text"], fields["finish_reason"]) == (free.text[:cut], "stop")
    assert tuple(fields["tokens"]) == free.ids[:needed]
    assert shown(capsys, *line) == free.text[:cut]
    free_again = told(capsys, *line[:-2])
    assert (free_again["text"], free_again["finish_reason"]) == (free.text, free.finish_reason)


def test_stop_texts_leave_the_reasoning_alone(model: ds4jax.LanguageModel) -> None:
    tokenizer = model.tokenizer
    ids = [*tokenizer.encode("a END b"), tokenizer.marker_id("</think>"), *tokenizer.encode("one END two")]
    for size in (1, 3, len(ids)):
        reading = Reading(tokenizer, ["END"], chat=True, think=True)
        pieces = [piece for start in range(0, len(ids), size) for piece in reading.push(ids[start : start + size])]
        pieces += reading.flush()
        assert (reading.reasoning, reading.answer, reading.stopped) == ("a END b", "one ", True)
        assert reading.text == "a END b</think>one "
        assert "".join(text for _, text in pieces) == "a END bone "
        assert tokenizer.decode(reading.ids).endswith("END")
        assert reading.ids == ids[: len(reading.ids)]


def test_what_follows_a_stop_text_in_its_token_is_not_lost(model: ds4jax.LanguageModel) -> None:
    """For a stop text that ends anywhere: what is shown, the stop text and what comes later are the text."""
    tokenizer = model.tokenizer
    text = "In the beginning é日 God"
    ids = tokenizer.encode(text)
    within = 0
    for end in range(1, len(text) + 1):
        stop = text[max(end - 4, 0) : end]
        first, later = Reading(tokenizer, [stop]), Reading(tokenizer, ["\0"])
        shown = "".join(piece.text for piece in (*first.push(ids), *first.flush()))
        read = len(first.ids)
        pieces = [*later.skip(ids[:read], first.rest), *later.push(ids[read:]), *later.flush()]
        assert first.stop == stop
        assert "".join(piece.text for piece in pieces) == later.text
        assert shown + stop + later.text == text
        within += bool(first.rest)
    assert within > 2


def test_a_stop_text_in_what_was_not_shown_ends_a_text(model: ds4jax.LanguageModel) -> None:
    reading = Reading(model.tokenizer, ["ll"])
    assert "".join(piece.text for piece in reading.skip([], "will go")) == "wi"
    assert (reading.stopped, reading.rest, list(reading.push([300])), reading.ids) == (True, " go", [], [])


@pytest.mark.parametrize("mode", [[], pytest.param(["--strict"], marks=pytest.mark.slow)])
@pytest.mark.long
def test_logprobs(capsys: pytest.CaptureFixture[str], model: ds4jax.LanguageModel, mode: list[str]) -> None:
    fields = told(capsys, PROMPT, *FEW, "--temperature", "1.2", "--top-k", "50", "--logprobs", "3", *mode)
    ids = [*model.encode(PROMPT).tolist(), *fields["tokens"]]
    known = fields["prompt_tokens"]
    logits = model.logits(ids, decode_from=known - 1, strict=bool(mode))["logits"][known - 1 : -1].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert [entry["id"] for entry in fields["logprobs"]] == fields["tokens"]
    for row, entry in zip(logprobs, fields["logprobs"], strict=True):
        assert entry["text"] == model.tokenizer.decode([entry["id"]])
        assert entry["logprob"] == pytest.approx(row[entry["id"]], abs=1e-5)
        best = np.argsort(-row, kind="stable")[:3]
        assert [other["id"] for other in entry["top"]] == best.tolist()
        assert [other["logprob"] for other in entry["top"]] == pytest.approx(row[best], abs=1e-5)
    greedy = told(capsys, PROMPT, *FEW, "--logprobs", "1", *mode)
    assert [entry["top"][0]["id"] for entry in greedy["logprobs"]] == greedy["tokens"]
    assert all(entry["top"] == [] for entry in told(capsys, PROMPT, *FEW, "--logprobs", "0")["logprobs"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--ids", "ids.npy", "--chat"], "--chat renders a text"),
        ([PROMPT, "--think"], "--think is for conversations; give --chat"),
        ([PROMPT, "--revision", "0731"], "--revision is for conversations; give --chat"),
        ([PROMPT, "--chat", "--revision", "0801"], "invalid choice: '0801'"),
        ([PROMPT, "--chat", "--effort", "max"], "--effort is for reasoning; give --think"),
        ([PROMPT, "--chat", "--think", "--effort", "some"], "invalid choice: 'some'"),
        ([PROMPT, "--system", "Be brief."], "--system is for conversations; give --chat"),
        ([PROMPT, "--chat", "--system", ""], "--system: the prompt is empty"),
        ([PROMPT, "--logprobs", "2"], "--logprobs goes into the object that --json prints"),
        ([PROMPT, "--json", "--logprobs", "-1"], "--logprobs: -1 is out of range"),
        ([PROMPT, "--stop", ""], "--stop: the text is empty"),
        ([PROMPT, "--prompt-file", "prompt.txt"], "not allowed with argument"),
        (["--prompt-file", "missing.txt"], "missing.txt: No such file"),
        (["--prompt-file", "empty.txt"], "empty.txt: the file is empty"),
    ],
)
def test_options_that_exclude_each_other(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: list[str], message: str
) -> None:
    monkeypatch.setattr("ds4jax.cli.commands.model.open_model", lambda options, **_: pytest.fail("a model was opened"))
    monkeypatch.chdir(tmp_path)
    np.save("ids.npy", np.arange(3))
    Path("prompt.txt").write_text("text")
    Path("empty.txt").touch()
    assert message in refused(capsys, *line)

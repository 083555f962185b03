"""Batches: lines in, lines out, and a batch that was killed goes on as if nothing had happened."""

from __future__ import annotations

import fcntl
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_models import shallow_model, text

from ds4jax.batch import lines as batch_lines
from ds4jax.batch.lines import Line
from ds4jax.batch.output import Output
from ds4jax.batch.run import run
from ds4jax.cli import main as cli
from ds4jax.decode.drafters.ngram import NgramDrafter
from ds4jax.engine.engine import Engine
from ds4jax.errors import InputError

MODE: dict[str, Any] = {"slots": 4}
USUAL = {"max_new_tokens": 20}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(shallow_model(), slots=4, context=256, chunk=32, drafter=NgramDrafter()) as one:
        yield one


def written(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def some_lines(count: int) -> list[Any]:
    """Requests of all kinds, and lines that are none."""
    dice = random.Random(count)
    found: list[Any] = []
    for i in range(count):
        line = {"id": f"r{i}", "ids": text(dice.randrange(300), dice.randrange(1, 70)).tolist()}
        line |= {"max_new_tokens": dice.randrange(1, 30), "ignore_eos": True} if i % 3 else {"id": i}
        line |= {"temperature": 0.9} if i % 2 else {"draft": i % 3, "top_p": None}
        found.append(line)
    found[3] = '{"id": "cut"'
    found[5] = {"id": "outside", "ids": [512]}
    return found


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def replied(engine: Engine, source: Path, out: Path, *, stop_after: int | None = None) -> None:
    """Run a batch, perhaps until so many lines are there."""
    lines = batch_lines.read(source, MODE)
    with Output(out, lines) as output:
        if stop_after is not None:
            write = output.write

            def killed(record: dict[str, Any]) -> None:
                if output.done == stop_after:
                    raise KeyboardInterrupt
                write(record)

            output.write = killed  # type: ignore[method-assign]
        run(engine, lines[output.done :], output, USUAL, lambda done, rate: None)


def test_a_batch_that_is_interrupted_twice_writes_what_another_writes(engine: Engine, tmp_path: Path) -> None:
    source = written(tmp_path / "in", some_lines(12))
    replied(engine, source, tmp_path / "whole")
    out = tmp_path / "out"
    for lines, cut in ((3, 5), (7, 1)):
        with pytest.raises(KeyboardInterrupt):
            replied(engine, source, out, stop_after=lines)
        assert len(records(out)) == lines
        out.write_bytes(out.read_bytes() + (tmp_path / "whole").read_bytes().splitlines()[lines][:cut])
    replied(engine, source, out)
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()
    assert engine.running == engine.waiting == 0

    found = records(out)
    assert [record["id"] for record in found[:6]] == [0, "r1", "r2", None, "r4", "outside"]
    assert [bool(record["error"]) for record in found] == [i in (3, 5) for i in range(12)]
    assert "line 4: not JSON" in found[3]["error"]
    assert found[5]["error"] == "token id 512 is outside the vocabulary of 512"
    assert len(found[0]["tokens"]) <= USUAL["max_new_tokens"]
    assert found[1]["seed"] is not None
    assert found[1]["seed"] != found[7]["seed"]
    alone = engine.submit(json.loads(source.read_text().splitlines()[4])["ids"], max_new_tokens=30, ignore_eos=True, draft=1)
    count = len(found[4]["tokens"])
    assert found[4]["tokens"] == list(alone.result().ids[:count])
    assert found[4]["prompt_tokens"] == len(alone.prompt_ids)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[1]", r"line 1: \[1\]; it must be a JSON object"),
        ('{"prompt": "a", "ids": [1]}', "line 1: prompt and ids given; give one of prompt, messages, ids"),
        ('{"id": 3, "prompt": null}', "line 1: none given"),
        ('{"prompt": "a", "topp": 1}', "line 1: topp: no such field"),
        ('{"id": [1], "prompt": "a"}', r"line 1: id: \[1\]; it must be"),
        ("[" * 100_000, "line 1: not JSON"),
        ('{"prompt": ["a"]}', "prompt: .* it must be a text"),
        ('{"ids": [1.5]}', "ids: .* must be a list of integers"),
        ('{"ids": [1], "temperature": "hot"}', "temperature is 'hot'"),
        ('{"ids": [1], "think": true}', "think and effort: they are for messages"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "tokenizer: none in these files; give ids"),
    ],
)
def test_a_bad_line_says_what_is_wrong(tmp_path: Path, line: str, said: str) -> None:
    [read] = batch_lines.read(written(tmp_path / "in", ["", line]), MODE)
    assert read.number == 2
    with pytest.raises(InputError, match=said.replace("line 1", "line 2")) as refused:
        batch_lines.arguments(read, shallow_model(), USUAL)
    assert "\n" not in str(refused.value)


def test_seeds_come_from_the_line_and_its_place(tmp_path: Path) -> None:
    path = written(tmp_path / "in", ['{"ids": [1]}', '{"ids": [1]}', '{"ids": [1], "seed": 7}', ""])

    def seeds() -> list[int]:
        return [batch_lines.arguments(line, shallow_model(), USUAL)[1]["sampling"].seed for line in batch_lines.read(path, MODE)]

    assert seeds() == seeds()
    assert len(set(seeds())) == 3
    assert seeds()[2] == 7


def lines_of(folder: Path, count: int, mode: dict[str, Any] = MODE) -> list[Line]:
    return batch_lines.read(written(folder / "in", [{"id": i, "ids": [i]} for i in range(count)]), mode)


def test_an_output_goes_on_only_for_the_same_requests(tmp_path: Path) -> None:
    lines, out = lines_of(tmp_path, 3), tmp_path / "out"
    with Output(out, lines) as output:
        for line in lines[:2]:
            output.write({"id": line.id, "request": line.request})
    whole = out.read_bytes()
    for tail in (b"", b'{"id"', b'{"id": 2, "request": "' + lines[2].request.encode() + b'"}', b"\0\0\0\n"):
        out.write_bytes(whole + tail)
        with Output(out, lines) as output:
            assert output.done == 2
        assert out.read_bytes() == whole
    with pytest.raises(InputError, match="line 2: the input has only 1 requests"):
        Output(out, lines[:1])
    for others in (lines_of(tmp_path, 3, {"slots": 5}), [lines[1], lines[0]]):
        with pytest.raises(InputError, match="line 1: a reply to another request or with other options"):
            Output(out, others)
    out.write_bytes(b"no reply\n" + whole)
    with pytest.raises(InputError, match="line 1: no reply"):
        Output(out, lines)
    assert out.read_bytes() == b"no reply\n" + whole, "a file that is refused does not change"
    out.write_bytes(whole)
    with out.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another batch writes this file"):
            Output(out, lines)


def test_a_complete_output_needs_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "in").touch()
    arguments = ["batch", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("ds4jax.cli.commands.model.open_model", lambda *_, **__: pytest.fail("the model was opened"))
    assert cli.main(arguments) == 0
    assert (tmp_path / "out").read_bytes() == b""
    with pytest.raises(SystemExit):
        cli.main(["batch", str(tmp_path / "in"), "--out", str(tmp_path / "in")])
    assert "is the file of requests" in capsys.readouterr().err
    (tmp_path / "in").write_text("x\n")
    with pytest.raises(pytest.fail.Exception):
        cli.main(arguments)


def killed_and_whole(folder: Path, count: int, kills: int, seed: int) -> tuple[bytes, bytes, int]:
    """What the command writes with so many kills at random times, what it writes without, and the kills that hit it."""
    dice = random.Random(seed)
    lines: list[Any] = []
    for i in range(count):
        line: dict[str, Any] = {"id": i, "max_new_tokens": dice.randrange(1, 24), "temperature": dice.choice([0, 0.8])}
        kind = i % 3
        if kind == 0:
            line |= {"messages": [{"role": "user", "content": f"Psalm {i}"}]}
        else:
            line |= {"prompt": f"In the beginning of day {i % 7}", "stop": "," if kind == 2 else None}
        lines.append(line)
    lines[1] = {"id": "bad"}
    source = written(folder / "in", lines)
    command = [sys.executable, "-m", "ds4jax", "batch", str(source), "--slots", "4", "--context", "256", "--out"]
    whole, out = folder / "whole", folder / "out"
    subprocess.run([*command, str(whole)], check=True)
    hits = 0
    while hits < kills:
        before = out.stat().st_size if out.exists() else 0
        process = subprocess.Popen([*command, str(out)])
        while process.poll() is None and (out.stat().st_size if out.exists() else 0) <= before:
            time.sleep(0.005)
        time.sleep(dice.random() * 0.3)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        hits += 1
    subprocess.run([*command, str(out)], check=True)
    assert subprocess.run([*command, str(out)], check=True, capture_output=True).stdout == b""
    return out.read_bytes(), whole.read_bytes(), hits


def test_a_command_that_fails_before_its_first_reply_leaves_no_file(tmp_path: Path) -> None:
    requests, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text('{"id": "a", "prompt": "In the beginning"}\n')
    with pytest.raises(SystemExit) as ended:
        cli.main(["batch", str(requests), "--out", str(out), "--devices", "99"])
    assert ended.value.code == 2
    assert not out.exists()


@pytest.mark.long
def test_a_command_that_is_killed_goes_on(tmp_path: Path) -> None:
    out, whole, hits = killed_and_whole(tmp_path, 24, 2, seed=1)
    assert out == whole
    assert hits > 0
    found = records(tmp_path / "out")
    assert [record["id"] for record in found] == [0, "bad", *range(2, 24)]
    assert [bool(record["error"]) for record in found] == [i == 1 for i in range(24)]
    assert any(record["finish_reason"] == "stop" and "," not in record["text"] for record in found[2::3])


@pytest.mark.slow
def test_a_command_that_is_killed_ten_times_goes_on(tmp_path: Path) -> None:
    out, whole, hits = killed_and_whole(tmp_path, 200, 10, seed=2)
    assert out == whole
    assert hits >= 5

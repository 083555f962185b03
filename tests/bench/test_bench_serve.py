"""`ds4jax bench serve`: its client, its figures, the comparison with the engine, and what is refused."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("llguidance", reason="needs the extra serve")
pytest.importorskip("httpx2", reason="needs the extra test")

from ds4jax.bench import serve, serve_report
from ds4jax.bench.http_client import Heard, Player, Shot, play
from ds4jax.cli import main as cli
from ds4jax.errors import InputError

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
BODY = {"prompt": [1], "max_tokens": 2}


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(**fields: object) -> bytes:
    return chunk(b"data: " + json.dumps(fields).encode() + b"\n\n")


def answered(*answers: list[bytes]) -> tuple[str, list[bytes], threading.Thread]:
    """A server that gives one connection after the other its answer, part by part. Returns what it was sent, too."""
    listening, asked = socket.create_server(("127.0.0.1", 0)), list[bytes]()

    def run() -> None:
        for parts in answers:
            connection, _ = listening.accept()
            with connection:
                asked.append(connection.recv(65536))
                for part in parts:
                    connection.sendall(part)
        listening.close()

    thread = threading.Thread(target=run)
    thread.start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}/base", asked, thread


def test_a_stream_is_read_however_it_comes() -> None:
    pieces = [event(choices=[{"text": "a"}]), event(choices=[{"text": ""}]), event(choices=[{"text": "bc", "fingerprint": "f"}])]
    last = [event(choices=[], usage={"completion_tokens": 3}), chunk(b"data: [DONE]\n\n"), b"0\r\n\r\n"]
    stream = b"".join([*pieces, *last])
    bytewise = [stream[i : i + 1] for i in range(len(stream))]
    url, asked, thread = answered(
        [HEAD, *pieces, *last], [HEAD, *bytewise], [HEAD, pieces[0]], [b"HTTP/1.1 429 No\r\n\r\nfull"], []
    )
    heard = [one for _ in range(5) for one in play(url, [Shot(BODY)], key="k")]
    thread.join()
    for one in heard[:2]:
        assert (len(one.times), one.tokens, one.fingerprint, one.error) == (2, 3, "f", "")
        assert 0 <= one.begun <= one.times[0] <= one.times[1] <= one.ended
    assert heard[2].error == "the stream has no end"
    assert "429" in heard[3].error
    assert "full" in heard[3].error
    assert heard[4].error == "no reply"
    assert asked[0].startswith(b"POST /base/v1/completions HTTP/1.1\r\n")
    assert b"Authorization: Bearer k\r\n" in asked[0]
    assert json.loads(asked[0].split(b"\r\n\r\n")[1]) == {**BODY, "stream": True, "stream_options": {"include_usage": True}}


def test_figures_of_replies() -> None:
    heard = [Heard(0.0, (0.1, 0.3, 0.5), 0.5, 5, "", ""), Heard(1.0, (1.2,), 1.2, 1, "", ""), Heard(2.0, (), 2.1, 0, "", "429")]
    found = serve._figures(heard, [Shot({}, 0.0), Shot({}, 0.95), Shot({}, 2.0)])
    assert found["first_ms"] == {"p50": 150.0, "p90": 190.0, "p99": 199.0}
    assert found["token_ms"]["p50"] == 100.0
    assert found["piece_ms"] == {"p50": 200.0, "p90": 200.0, "p99": 200.0}
    assert found["tokens_per_second"]["p50"] == 10.0
    assert (found["failures"], found["failed"], found["late_ms"]) == (1, ["429"], 50.0)
    assert found["whole_tokens_per_second"] == 5.0


def test_requests_are_those_of_a_seed_and_come_at_the_rate() -> None:
    ids = list(range(1000))
    one, same, other = (serve.Work(ids, serve.Options(prompt=5, seed=seed)) for seed in (1, 1, 2))
    bodies = [one.body() for _ in range(20)]
    assert bodies == [same.body() for _ in range(20)]
    assert bodies != [other.body() for _ in range(20)]
    assert all(len(body["prompt"]) == 5 for body in bodies)
    times = one.times(4.0, 2000)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(500, rel=0.1)
    with pytest.raises(InputError, match="the held-out text has 3 tokens"):
        serve.text_ids(lambda _: [1, 2, 3], 4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--url", "http://127.0.0.1:9", "--model", "."], "exclude each other"),
        (["--prompt", "2000", "--max-new-tokens", "49"], "together more than --context 2048"),
        (["--url", "http://127.0.0.1:9"], "give the address of a running ds4jax server"),
        (["--rate", "-1"], "it must be 0 to 10000"),
    ],
)
def test_what_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "serve", *words])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_client_that_finds_no_server_says_so() -> None:
    with Player() as player, pytest.raises(InputError, match="give the address of a running server"):
        player.play("http://127.0.0.1:9", [Shot(BODY)])


@pytest.mark.long
def test_http_gives_the_engines_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from serving import engine

    pytest.importorskip("matplotlib", reason="needs the extra test")
    options = serve.Options(rate=50, requests=6, prompt=7, tokens=9, streams=3, pairs=2)
    content = serve.bench_engine(engine(prefix_bytes=0), options, lambda _: None) | {"device": "d", "jax": "j"}
    assert serve.good(content)
    assert content["compared"]["different"] == 0
    assert len(content["compared"]["first"]["runs"]["http"]) == 8
    assert len(content["compared"]["streams"]["runs"]["engine"]) == 2
    assert content["open_loop"]["requests"] == 6
    assert len(content["open_loop"]["first_each_ms"]) == 6
    serve_report.show(content)
    assert "3 streams: engine" in capsys.readouterr().out
    serve_report.plot(tmp_path / "serve.png", content)
    assert (tmp_path / "serve.png").read_bytes().startswith(b"\x89PNG")
    assert not serve.good({"open_loop": {"failures": 1}})
    assert not serve.good({"compared": {"different": 1}})

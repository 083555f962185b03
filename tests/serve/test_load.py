"""A server of the tiny model under load, with clients that hang up, do not read, send too much, or send nonsense; and killed."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("llguidance", reason="needs the extra serve")

from serving_process import Process, process

# They run for minutes.
pytestmark = pytest.mark.slow
CLIENTS, MALFORMED, LARGE, KILLS = 200, 1000, 50_000_000, 10
# Replies that clients ask for; each is asked for by many.
BODIES: list[dict[str, Any]] = [
    {
        "prompt": f"And it came to pass in the {i}th year, " * (1 + 3 * (i % 4)),
        "max_tokens": 6 + 2 * i,
        "seed": i,
        "ignore_eos": True,
    }
    for i in range(8)
]
# Most growth of the server's memory over a wave of clients, as a share: what is freed is not always given back.
GROWTH = 0.05
Said = tuple[str, str, str]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with process(tmp_path_factory.mktemp("server")) as one:
        yield one


def head(body: bytes, path: str = "/v1/completions", **fields: str) -> bytes:
    """The beginning of a request."""
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}", "Connection: close"]
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in fields.items()), "", ""]).encode() + body


def opened(server: Process, *, narrow: bool = False) -> socket.socket:
    """A connection, perhaps with a small buffer for what comes."""
    address = urlsplit(server.url)
    connection = socket.socket()
    if narrow:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect((address.hostname, address.port))
    connection.setblocking(False)
    return connection


def said(answer: bytes) -> Said:
    """Text, fingerprint and system_fingerprint of a streamed reply that has come to its end."""
    assert b" 200 " in answer[:20], answer[:300]
    events = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith(b"data: {")]
    assert answer.count(b"data: [DONE]") == 1, answer[-300:]
    choices = [choice for event in events for choice in event["choices"]]
    marks = [choice["fingerprint"] for choice in choices if "fingerprint" in choice]
    assert len(marks) == 1
    return "".join(choice["text"] for choice in choices), marks[0], events[0]["system_fingerprint"]


async def ask(server: Process, body: dict[str, Any], *, hang_up: float | None = None, slow: bool = False) -> Said | None:
    """A streamed reply; None for a client that hangs up after some seconds. A slow one reads little at a time."""
    loop = asyncio.get_running_loop()
    connection = opened(server, narrow=slow)
    try:
        await loop.sock_sendall(connection, head(json.dumps(body | {"stream": True}).encode()))
        answer = b""
        async with asyncio.timeout(hang_up):
            while data := await loop.sock_recv(connection, 100 if slow else 65536):
                answer += data
                await asyncio.sleep(0.02 if slow else 0)
        return said(answer)
    except TimeoutError:
        if random.random() < 0.5:
            # A reset instead of an orderly end.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return None
    finally:
        connection.close()


async def wave(server: Process, count: int, dice: random.Random) -> list[tuple[int, Said | None]]:
    """Many clients at once, half of which hang up. Returns the number of each one's request, and what came."""
    which = [dice.randrange(len(BODIES)) for _ in range(count)]
    hang_ups = [dice.uniform(0, 20) if i % 2 else None for i in range(count)]
    works = [ask(server, BODIES[one], hang_up=hang_ups[i], slow=i % 5 == 0) for i, one in enumerate(which)]
    return list(zip(which, await asyncio.gather(*works), strict=True))


def no_trouble(server: Process) -> None:
    """The log must have no errors of the server's own."""
    text = server.log.read_text()
    assert "Traceback" not in text, text[text.index("Traceback") - 500 :][:3000]
    assert not [one for one in server.records() if one["status"] == 500]


def test_replies_under_load_have_the_bits_that_they_have_alone(server: Process) -> None:
    alone = [asyncio.run(ask(server, body)) for body in BODIES]
    dice, memory, kept = random.Random(1), [], 0
    for _ in range(3):
        began = time.monotonic()
        for which, found in asyncio.run(wave(server, CLIENTS, dice)):
            assert found is None or found == alone[which]
            kept += found is not None
        assert server.idle()
        memory.append(server.rss())
        print(f"{CLIENTS} clients in {time.monotonic() - began:.0f} s, {kept} replies so far, {memory[-1]:.0f} MB")
    assert kept >= 3 * CLIENTS // 2
    assert memory[-1] < (1 + GROWTH) * memory[0]
    statuses = Counter(one["status"] for one in server.records())
    print(dict(statuses))
    assert set(statuses) == {200, 499}
    no_trouble(server)


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_that_are_too_large_are_refused(server: Process, chunked: bool) -> None:
    before = server.rss()
    for _ in range(5):
        connection = opened(server)
        connection.settimeout(60)
        with connection:
            body = b" " * LARGE
            if chunked:
                fields = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
                connection.sendall(fields.encode() + b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n")
            else:
                connection.sendall(head(body))
            answer = b""
            while b"}}" not in answer and (more := connection.recv(65536)):
                answer += more
        assert b" 413 " in answer[:20]
        assert b"body_too_large" in answer
    print(f"{server.rss() - before:+.0f} MB")
    assert server.rss() < (1 + GROWTH) * before + LARGE / 1e6
    assert server.idle()
    no_trouble(server)


def nonsense(dice: random.Random) -> bytes:
    """Bytes of a malformed request: its body, its fields, its length or everything."""
    body = json.dumps(dice.choice(BODIES) | {"stream": dice.random() < 0.5, "max_tokens": 1}).encode()
    path = dice.choice(["/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses", "/tokenize", "/nowhere"])
    match dice.randrange(6):
        case 0:
            return dice.randbytes(dice.randrange(1, 400))
        case 1:
            cut = bytearray(body)
            for _ in range(dice.randrange(1, 8)):
                cut[dice.randrange(len(cut))] = dice.randrange(256)
            return head(bytes(cut), path)
        case 2:
            return head(body[: dice.randrange(len(body))], path)
        case 3:
            return head(body, path).replace(
                b"Content-Length: ", b"Content-Length: " + dice.choice([b"-", b"9", b"x", b"1e", b"1\r\nContent-Length: "])
            )
        case 4:
            fields = {f"X-{i}": "a" * dice.randrange(3000) for i in range(dice.randrange(1, 30))}
            return head(b"[" * dice.randrange(5000), path, **fields)
        case _:
            return head(body, path)[: dice.randrange(200)]


async def throw(server: Process, data: bytes) -> str:
    """Send something. Returns the status of the answer; "" if there is none."""
    loop, connection, answer = asyncio.get_running_loop(), opened(server), b""
    try:
        async with asyncio.timeout(3):
            await loop.sock_sendall(connection, data)
            while more := await loop.sock_recv(connection, 65536):
                answer += more
    except (TimeoutError, ConnectionError):
        pass
    finally:
        connection.close()
    return answer[9:12].decode(errors="replace")


def test_nonsense_beside_readers_that_never_read(server: Process) -> None:
    dice = random.Random(2)
    deaf = [opened(server, narrow=True) for _ in range(16)]
    long = {"prompt": "Hello", "max_tokens": 300, "ignore_eos": True, "stream": True, "logprobs": 20}
    for connection in deaf:
        connection.send(head(json.dumps(long).encode()))
    statuses: Counter[str] = Counter()

    async def all_of(thrown: list[bytes]) -> None:
        statuses.update(await asyncio.gather(*(throw(server, one) for one in thrown)))

    for _ in range(MALFORMED // 100):
        asyncio.run(all_of([nonsense(dice) for _ in range(100)]))
    print(dict(statuses))
    assert sum(statuses.values()) == MALFORMED
    assert set(statuses) <= {"", "200", "400", "404", "405", "413", "431"}
    # Their slots are free although they have read nothing.
    assert server.idle(300)
    for connection in deaf:
        connection.close()
    no_trouble(server)


def test_a_signal_ends_it_within_ten_seconds(server: Process) -> None:
    alone = [asyncio.run(ask(server, body)) for body in BODIES]
    deaf = [opened(server, narrow=True) for _ in range(4)]
    for connection in deaf:
        connection.send(head(json.dumps({"prompt": "Hello", "max_tokens": 40, "stream": True, "logprobs": 20}).encode()))

    async def ended() -> tuple[list[Said | None], float]:
        works = [asyncio.ensure_future(ask(server, body)) for body in BODIES]
        while server.health()["running"] + server.health()["waiting"] < len(BODIES) + len(deaf):
            await asyncio.sleep(0.05)
        began = time.monotonic()
        server.signal(signal.SIGTERM)
        found = await asyncio.gather(*works)
        assert await asyncio.to_thread(server.wait, 60) == 0
        return found, time.monotonic() - began

    found, seconds = asyncio.run(ended())
    print(f"ended after {seconds:.1f} s")
    assert found == alone
    for connection in deaf:
        connection.close()
    no_trouble(server)
    assert seconds < 10


def prompt(i: int) -> dict[str, Any]:
    """A request with a long prompt of its own."""
    return {"prompt": f"In the {i}th chapter " + "it was written that the king and the people " * 60, "max_tokens": 6, "seed": 1}


def told(server: Process, body: dict[str, Any]) -> tuple[Any, int]:
    """The reply's text and bits, and how many tokens of its prompt were known."""
    found = server.post("/v1/completions", **body)
    return found["choices"], found["usage"]["prompt_tokens_details"]["cached_tokens"]


def killed_while_it_writes(server: Process, folder: Path, body: dict[str, Any]) -> bool:
    """Kill a server while a prefix is being written. Returns whether one was."""
    connection = opened(server)
    with connection:
        connection.send(head(json.dumps(body).encode()))
        until = time.monotonic() + 30
        while time.monotonic() < until:
            if any(path.name.endswith(".unfinished") for path in folder.iterdir()):
                break
        server.kill()
    return any(path.name.endswith(".unfinished") for path in folder.iterdir())


def test_a_server_that_is_killed_while_it_writes_prefixes_leaves_good_ones(tmp_path: Path) -> None:
    folder, caught, known = tmp_path / "prefixes", 0, []
    with process(tmp_path) as server:
        cold = [told(server, prompt(i))[0] for i in range(KILLS + 1)]
    for i in range(KILLS):
        with process(tmp_path, "--prefix-dir", str(folder)) as server:
            assert not [path for path in folder.iterdir() if path.name.endswith(".unfinished")]
            choices, cached = told(server, prompt(0))
            assert choices == cold[0]
            known.append(cached)
            no_trouble(server)
            caught += killed_while_it_writes(server, folder, prompt(1 + i))
    with process(tmp_path, "--prefix-dir", str(folder)) as server:
        warm = [told(server, prompt(i)) for i in range(KILLS + 1)]
        no_trouble(server)
    print(f"{caught} of {KILLS} killed in the middle of a file; known tokens of the first prompt: {known}; of all at the end:")
    print([count for _, count in warm])
    assert [choices for choices, _ in warm] == cold
    assert known[0] == 0
    assert min(known[1:]) > 0
    assert caught > 0
    assert not (folder / "bad").exists()

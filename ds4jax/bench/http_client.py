"""Plays requests to a server at given times, in one thread. Started as a process, it takes plays from stdin, so that it shares no
interpreter with the server.

It only notes when bytes come; they are read after the last one. So it takes little time of a machine that it shares with a
server.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from ds4jax.errors import InputError

# Bytes of one read, and the longest wait in seconds.
_READ, _WAIT = 1 << 16, 0.5
_DONE = b"[DONE]"


@dataclasses.dataclass(frozen=True)
class Shot:
    """One request.

    Attributes:
        body: fields of `POST /v1/completions`. It is streamed with its usage.
        at: seconds after the play's beginning.
    """

    body: dict[str, Any]
    at: float = 0.0


@dataclasses.dataclass(frozen=True)
class Heard:
    """What came of a request. Times are seconds after the play's beginning.

    Attributes:
        begun: when it was sent; later than `Shot.at` if the client was late.
        times: when each piece of text was there.
        ended: when the connection ended.
        tokens: new tokens, by the server's count.
        fingerprint: of their logits.
        error: the status and the beginning of the body, or the error in the stream; "" without one.
    """

    begun: float
    times: tuple[float, ...]
    ended: float
    tokens: int
    fingerprint: str
    error: str


class _Connection:
    """A request on its way."""

    def __init__(self, host: str, port: int, data: bytes, begun: float):
        self.begun = begun
        self.came: list[tuple[float, bytes]] = []
        self.socket = socket.create_connection((host, port), timeout=30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(data)
        self.socket.setblocking(False)

    def heard(self, ended: float) -> Heard:
        """Read what came."""
        head, _, body = b"".join(data for _, data in self.came).partition(b"\r\n\r\n")
        status = head.split(b" ", 2)[1:2]
        if status != [b"200"]:
            error = (head[:20] + b" " + body[:200]).decode(errors="replace").strip()
            return Heard(self.begun, (), ended, 0, "", error or "no reply")
        times, tokens, fingerprint = [], 0, ""
        error = "" if _DONE in body else "the stream has no end"
        for when, event in _events(self.came):
            error = str(event["error"]) if "error" in event else error
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            for choice in event.get("choices", ()):
                fingerprint = choice.get("fingerprint", fingerprint)
                if choice["text"]:
                    times.append(when)
        return Heard(self.begun, tuple(times), ended, tokens, fingerprint, error)


def _events(came: Sequence[tuple[float, bytes]]) -> list[tuple[float, dict[str, Any]]]:
    """The events of a stream, each with the time of its last byte. Framing between them has no `data: `."""
    found: list[tuple[float, dict[str, Any]]] = []
    rest = b""
    for when, data in came:
        *lines, rest = (rest + data).split(b"\n")
        events = [line[6:] for line in lines if line.startswith(b"data: ")]
        found += [(when, json.loads(event)) for event in events if event != _DONE]
    return found


def play(url: str, shots: Sequence[Shot], key: str = "") -> list[Heard]:
    """Play requests, each on a connection of its own.

    Args:
        url: the server's address.
        key: its key, if it asks for one.

    Returns:
        What came of each, in the order of `shots`.

    Raises:
        OSError: a connection failed.
    """
    address = urlsplit(url)
    host, port = address.hostname or "", address.port or 80
    prefix = address.path.rstrip("/")
    datas = [_request(prefix, host, shot.body, key) for shot in shots]
    found: dict[int, Heard] = {}
    waiting = sorted(range(len(shots)), key=lambda i: shots[i].at)
    start = time.perf_counter()
    with selectors.DefaultSelector() as selector:
        while len(found) < len(shots):
            while waiting and shots[waiting[0]].at <= time.perf_counter() - start:
                i = waiting.pop(0)
                connection = _Connection(host, port, datas[i], time.perf_counter() - start)
                selector.register(connection.socket, selectors.EVENT_READ, (i, connection))
            pause = shots[waiting[0]].at - (time.perf_counter() - start) if waiting else _WAIT
            for key_, _ in selector.select(max(min(pause, _WAIT), 0)):
                i, connection = key_.data
                data = b""
                with contextlib.suppress(ConnectionError):
                    data = connection.socket.recv(_READ)
                now = time.perf_counter() - start
                if data:
                    connection.came.append((now, data))
                    continue
                selector.unregister(connection.socket)
                connection.socket.close()
                found[i] = connection.heard(now)
    return [found[i] for i in range(len(shots))]


def _request(prefix: str, host: str, body: dict[str, Any], key: str) -> bytes:
    data = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    fields = [f"POST {prefix}/v1/completions HTTP/1.1", f"Host: {host}", "Connection: close", f"Content-Length: {len(data)}"]
    fields += [f"Authorization: Bearer {key}"] if key else []
    return "\r\n".join([*fields, "", ""]).encode() + data


class Player:
    """A process that plays. Use it in a `with` block."""

    def __enter__(self) -> Player:
        command = [sys.executable, "-m", __name__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    def play(self, url: str, shots: Sequence[Shot], key: str = "") -> list[Heard]:
        """Play requests, as `play` does.

        Raises:
            InputError: the server cannot be reached.
        """
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps([url, [dataclasses.asdict(shot) for shot in shots], key]), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline() or '"the client has ended"')
        if isinstance(answer, str):
            raise InputError(f"{url}: {answer}; give the address of a running server")
        return [Heard(**one | {"times": tuple(one["times"])}) for one in answer]


def _serve() -> None:
    for line in sys.stdin:
        url, shots, key = json.loads(line)
        try:
            answer: Any = [dataclasses.asdict(one) for one in play(url, [Shot(**shot) for shot in shots], key)]
        except OSError as error:
            answer = str(error.strerror or error)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()

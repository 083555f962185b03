"""How the processes of a job find each other, and what each says if they do not. Needs no devices."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from ds4jax.cli import main as cli
from ds4jax.errors import InputError
from ds4jax.processes import gather
from ds4jax.processes.channel import Channel
from ds4jax.processes.relay import free_port
from ds4jax.processes.seat import Seat

FACTS = {"--slots": 4, "jax": "1.0"}


def seat(index: int, *, port: int, count: int = 2, patience: int = 20) -> Seat:
    return Seat("127.0.0.1", port, index, count, patience)


def expected(one: Seat) -> dict[int, Channel]:
    with gather.listen(one) as listening:
        return gather.expect(one, listening, FACTS)


def error_of(future: Future[Any]) -> str:
    error = future.exception(60)
    assert isinstance(error, InputError)
    assert "\n" not in str(error)
    return str(error)


def together(*works: Callable[[], Any]) -> list[Future[Any]]:
    """The works, each in a thread of its own, the first one first."""
    with ThreadPoolExecutor(len(works)) as pool:
        return [pool.submit(work) for work in works]


def close(*channels: Channel) -> None:
    for channel in channels:
        channel.close()


def test_messages_arrive_as_they_were_sent() -> None:
    """In any order of the two processes' starts, and with bytes after a message that are not read."""
    port = free_port()
    late = seat(0, port=port, count=3)
    others = [seat(i, port=port, count=3) for i in (2, 1)]

    def first() -> dict[int, Channel]:
        time.sleep(0.3)
        return expected(late)

    leading, *joined = together(first, *(lambda one=one: gather.join(one, FACTS) for one in others))  # type: ignore[misc]
    arrays = [np.arange(6, dtype=np.uint32).reshape(2, 3), np.zeros((0, 4), np.float32), np.float32(1.5).reshape(())]
    fields = {"do": "insert", "temperature": 0.1, "stop_ids": [1, 2]}
    leading.result()[2].send(fields, arrays)
    channel = joined[0].result()
    leading.result()[2].socket.sendall(b"more")
    message = channel.receive()
    assert message.fields == fields
    for found, sent in zip(message.arrays, arrays, strict=True):
        assert (found.dtype, found.shape) == (sent.dtype, sent.shape)
        np.testing.assert_array_equal(found, sent)
    assert channel.socket.recv(4) == b"more"
    close(*leading.result().values(), *(one.result() for one in joined))


def test_a_process_that_never_comes() -> None:
    port = free_port()
    seats = [seat(i, port=port, count=3, patience=1) for i in range(2)]
    leading, other = together(lambda: expected(seats[0]), lambda: gather.join(seats[1], FACTS))
    line = f"--coordinator 127.0.0.1:{port}: process 2 of 3 did not come within 1 s"
    assert [error_of(leading), error_of(other)] == [line, line]
    with pytest.raises(InputError, match=f"^--coordinator 127.0.0.1:{port}: process 0 did not come within 1 s$"):
        gather.join(seats[1], FACTS)


@pytest.mark.parametrize(
    ("other", "facts", "line"),
    [
        ({"index": 1}, FACTS | {"--slots": 8}, "--slots: process 1 has 8, process 0 has 4; start all with the same"),
        ({"index": 1}, {"--slots": 4}, "jax: process 1 has none, process 0 has 1.0; start all with the same"),
        ({"index": 1, "count": 3}, FACTS, "--processes: process 1 has 3, process 0 has 2; start all with the same number"),
        ({"index": 5}, FACTS, "--process 5: there is such a process already; give each a number of its own"),
    ],
)
def test_processes_that_do_not_fit_together(other: dict[str, int], facts: dict[str, Any], line: str) -> None:
    port = free_port()
    found = together(lambda: expected(seat(0, port=port)), lambda: gather.join(seat(port=port, **other), facts))
    assert [error_of(one) for one in found] == [line, line]


def test_what_is_no_process_does_not_disturb() -> None:
    """A scanner's bytes, a client of HTTP, and a connection that is closed at once."""
    port = free_port()
    started = threading.Event()

    def strangers() -> Channel:
        started.wait()
        for said in (b"\x00\x01\x02", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b""):
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(said)
        return gather.join(seat(1, port=port), FACTS)

    def leading() -> dict[int, Channel]:
        with gather.listen(seat(0, port=port)) as listening:
            started.set()
            return gather.expect(seat(0, port=port), listening, FACTS)

    one, other = together(leading, strangers)
    assert list(one.result()) == [1]
    close(*one.result().values(), other.result())


def test_process_0_ends_while_others_wait() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        _, other = together(lambda: listening.accept()[0].close(), lambda: gather.join(seat(1, port=port), FACTS))
    assert error_of(other) == f"--coordinator 127.0.0.1:{port}: process 0 ended before all processes had come"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--coordinator", "here"], "--coordinator here: it must be HOST:PORT, the address of process 0"),
        (["--coordinator", "here:0"], "--coordinator here:0: it must be HOST:PORT, the address of process 0"),
        (["--coordinator", "a:1", "--process", "1"], "--coordinator a:1: give --process and --processes, too"),
        (["--coordinator", "a:1", "--process", "2", "--processes", "2"], "--process 2: of 2 processes, it must be 0 to 1"),
        (["--process", "1"], "--process: give --coordinator HOST:PORT, too"),
        (["--coordinator", "a:1", "--devices", "2"], "--devices 2: several processes use all their devices; leave it out"),
        (["--coordinator", "a:1", "--groups", "2"], "--groups 2: several processes are one group; leave it out"),
        (["--processes", "1"], "argument --processes: 1 is out of range; it must be at least 2"),
    ],
)
def test_options_that_do_not_fit(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["serve", *words])
    assert (exit.value.code, capsys.readouterr().err) == (2, f"ds4jax: error: {line}\n")


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(SystemExit) as exit:
            cli.main(["serve", "--port", "0", "--coordinator", where, "--process", "0", "--processes", "2"])
    line = f"--coordinator {where}: Address already in use; give another port to all processes"
    assert (exit.value.code, capsys.readouterr().err) == (2, f"ds4jax: error: {line}\n")

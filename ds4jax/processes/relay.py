"""JAX's coordination service through the job's own port, so that a job needs one address.

A process that loses JAX's service is aborted by it, with a trace. So a process connects to a relay of its own, which stays open
when process 0 is lost; the job's channel then ends the process with one line.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
import time
from collections.abc import Callable

from ds4jax.processes.channel import Channel
from ds4jax.processes.gather import AGAIN, HELLO
from ds4jax.processes.seat import Seat

HERE = "127.0.0.1"
PIECE = 1 << 16


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.create_server((HERE, 0)) as found:
        port: int = found.getsockname()[1]
        return port


def serve(listening: socket.socket, port: int) -> None:
    """In process 0: connect whoever asks for it to JAX's service at a port of this machine."""

    def service() -> socket.socket:
        until = time.monotonic() + HELLO
        while True:
            try:
                return socket.create_connection((HERE, port))
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(AGAIN)

    def answer(connection: socket.socket) -> None:
        connection.settimeout(HELLO)
        if Channel(connection).receive().fields.get("relay") is True:
            connection.settimeout(None)
            _pump_both(connection, service())

    _accept(listening, answer)


def begin(seat: Seat) -> int:
    """In another process: a port of this machine that leads to JAX's service at process 0."""
    listening = socket.create_server((HERE, 0))

    def answer(connection: socket.socket) -> None:
        far = socket.create_connection((seat.host, seat.port))
        Channel(far).send({"relay": True})
        _pump_both(connection, far)

    _accept(listening, answer)
    port: int = listening.getsockname()[1]
    return port


def _accept(listening: socket.socket, answer: Callable[[socket.socket], None]) -> None:
    def accept() -> None:
        # The socket is closed at the end of the process.
        with contextlib.suppress(OSError):
            while True:
                _start(functools.partial(answer, listening.accept()[0]))

    _start(accept)


def _pump_both(near: socket.socket, far: socket.socket) -> None:
    _start(lambda: _pump(near, far))
    _pump(far, near)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    """Pass on what comes. At its end the sink stays open, see above."""
    while piece := source.recv(PIECE):
        sink.sendall(piece)


def _start(work: Callable[[], None]) -> None:
    def guarded() -> None:
        # A broken connection ends its thread alone.
        with contextlib.suppress(OSError, ValueError):
            work()

    threading.Thread(target=guarded, name="ds4jax relay", daemon=True).start()

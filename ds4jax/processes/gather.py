"""Processes of a job find each other: process 0 listens, the others connect and say who they are.

Whoever reaches the port can join a job: it must be reachable in a private network alone.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import time
from collections.abc import Iterable
from typing import Any

from ds4jax.errors import InputError
from ds4jax.processes.channel import Channel
from ds4jax.processes.seat import Seat

# Seconds that a connection has to say who it is, and between two tries to connect.
HELLO, AGAIN = 10.0, 0.2
# What a process expects of the others: names of options and their values.
Facts = dict[str, Any]


def listen(seat: Seat) -> socket.socket:
    """The socket that process 0 listens on.

    Raises:
        InputError: the address cannot be bound.
    """
    try:
        family = socket.AF_INET6 if ":" in seat.host else socket.AF_INET
        return socket.create_server((seat.host, seat.port), family=family, backlog=128)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]
        other = "; give another port to all processes" if error.errno in (errno.EADDRINUSE, errno.EACCES) else ""
        raise InputError(f"{seat.where}: {reason}{other}") from error


def expect(seat: Seat, listening: socket.socket, facts: Facts) -> dict[int, Channel]:
    """Wait in process 0 for all others. Returns their channels by index.

    Raises:
        InputError: one did not come in time, came twice, or has other options; all that have come hear why.
    """
    found: dict[int, Channel] = {}
    until = time.monotonic() + seat.patience
    try:
        while len(found) < seat.count - 1:
            listening.settimeout(max(until - time.monotonic(), 0.001))
            channel = Channel(listening.accept()[0])
            index = _hello(channel, seat, facts, found)
            if index is not None:
                found[index] = channel
    except TimeoutError:
        missing = ", ".join(str(i) for i in range(1, seat.count) if i not in found)
        raise _refused(
            found.values(), f"{seat.where}: process {missing} of {seat.count} did not come within {seat.patience} s"
        ) from None
    except InputError as error:
        raise _refused(found.values(), str(error)) from None
    listening.settimeout(None)
    for channel in found.values():
        channel.send({"accepted": True})
    return found


def _hello(channel: Channel, seat: Seat, facts: Facts, found: dict[int, Channel]) -> int | None:
    """The index of a process that has just connected; None if it is no process of a job."""
    channel.socket.settimeout(HELLO)
    try:
        fields = channel.receive().fields
        index, count, theirs = int(fields["process"]), fields["processes"], dict(fields["facts"])
    except (OSError, ValueError, TypeError, KeyError):
        channel.close()
        return None
    channel.socket.settimeout(None)
    reason = _difference(index, count, theirs, seat, facts, found)
    if reason:
        raise _refused([channel], reason)
    return index


def _difference(index: int, count: Any, theirs: Facts, seat: Seat, facts: Facts, found: dict[int, Channel]) -> str:
    if count != seat.count:
        return f"--processes: process {index} has {count}, process 0 has {seat.count}; start all with the same number"
    if index in found or not 0 < index < seat.count:
        return f"--process {index}: there is such a process already; give each a number of its own"
    for name, value in facts.items():
        if theirs.get(name) != value:
            return f"{name}: process {index} has {_said(theirs.get(name))}, process 0 has {_said(value)}; start all with the same"
    return ""


def _said(value: Any) -> Any:
    return "none" if value is None else value


def _refused(channels: Iterable[Channel], reason: str) -> InputError:
    for channel in channels:
        with contextlib.suppress(OSError):
            channel.send({"refused": reason})
        channel.close()
    return InputError(reason)


def join(seat: Seat, facts: Facts) -> Channel:
    """Connect to process 0, and wait until all processes are there.

    Raises:
        InputError: process 0 did not come in time, or refuses this process or the job.
    """
    channel = Channel(_connected(seat))
    with contextlib.ExitStack() as unless_accepted:
        unless_accepted.callback(channel.close)
        try:
            channel.send({"process": seat.index, "processes": seat.count, "facts": facts})
            # Process 0 notices who is missing, and a little later.
            channel.socket.settimeout(2 * seat.patience + HELLO)
            answer = channel.receive().fields
        except (OSError, ValueError):
            raise InputError(f"{seat.where}: process 0 ended before all processes had come") from None
        if "refused" in answer:
            raise InputError(str(answer["refused"]))
        unless_accepted.pop_all()
    channel.socket.settimeout(None)
    return channel


def _connected(seat: Seat) -> socket.socket:
    until = time.monotonic() + seat.patience
    while (left := until - time.monotonic()) > 0:
        try:
            return socket.create_connection((seat.host, seat.port), timeout=left)
        except OSError:
            time.sleep(min(AGAIN, left))
    raise InputError(f"{seat.where}: process 0 did not come within {seat.patience} s")

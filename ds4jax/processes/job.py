"""A job while it runs: process 0 gives orders, all others repeat them, and all end together."""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np

from ds4jax.errors import InputError
from ds4jax.processes import gather, relay
from ds4jax.processes.channel import Channel, Message
from ds4jax.processes.gather import Facts
from ds4jax.processes.seat import Seat

# Seconds that processes wait for each other at their end.
SHUTDOWN = 30
INTERRUPTED = 130


class Job:
    """The channels of a process: in process 0 to all others, in each other process to process 0.

    A thread for each channel waits for messages, so a process hears of a lost one wherever its main thread is, as in an exchange
    that will never end.
    """

    def __init__(self, seat: Seat, channels: dict[int, Channel]):
        """Args: `channels`, by the index of the other process."""
        self.seat = seat
        self._channels = channels
        self._orders: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._closing = False
        self._ending = threading.Lock()
        for index, channel in channels.items():
            threading.Thread(target=self._watch, args=(index, channel), name="ds4jax job", daemon=True).start()

    def _watch(self, index: int, channel: Channel) -> None:
        try:
            while True:
                message = channel.receive()
                if "end" in message.fields:
                    self.end(str(message.fields["end"]), int(message.fields["code"]))
                self._closing = self._closing or message.fields.get("do") == "close"
                self._orders.put(message)
        except (OSError, ValueError, TypeError):
            if not self._closing:
                self.end(f"process {index} of {self.seat.count} is lost, and with it the job", 1)

    def meet(self) -> None:
        """Wait until all processes are here. An exchange gives up if one comes half a minute after the others."""
        if not self.seat.index:
            for _ in self._channels:
                self._orders.get()
            self.order("go")
            return
        self._channels[0].send({"do": "here"})
        message = self._orders.get()
        if message.fields["do"] != "go":
            # Process 0 has closed the job.
            self._orders.put(message)

    def order(self, do: str, arrays: Sequence[np.ndarray] = (), **fields: Any) -> None:
        """Let all other processes do something, in the order of these calls; process 0 alone calls it."""
        for channel in self._channels.values():
            # Its own thread ends the job if the channel is broken.
            with contextlib.suppress(OSError):
                channel.send({"do": do} | fields, arrays)

    def orders(self) -> Iterator[Message]:
        """What process 0 orders, until it closes the job."""
        while (message := self._orders.get()).fields.get("do") != "close":
            yield message

    def close(self) -> None:
        """End the job after all orders."""
        self._closing = True
        self.order("close")

    def end(self, reason: str, code: int) -> NoReturn:
        """End all processes at once, each with one line and this exit code."""
        # Two threads may notice. The first one ends the process.
        with self._ending:
            for channel in self._channels.values():
                with contextlib.suppress(OSError):
                    channel.send({"end": reason, "code": code})
            if sys.stderr:
                print(f"ds4jax: error: {reason}", file=sys.stderr, flush=True)
            os._exit(code)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """An error or Ctrl-C inside ends all processes."""
        try:
            yield
        except KeyboardInterrupt:
            self.end(f"process {self.seat.index}: interrupted", INTERRUPTED)
        except Exception as error:
            line = " ".join(str(error).splitlines()) or type(error).__name__
            self.end(f"process {self.seat.index}: {line}", 2 if isinstance(error, InputError) else 1)


def begin(seat: Seat, facts: Facts) -> Job:
    """Gather the processes of a job, and let JAX see the devices of all. Nothing may have used a device before.

    Args:
        facts: what must be equal in all processes.

    Raises:
        InputError: the address cannot be bound, a process does not come in time, or the processes do not fit together.
    """
    if seat.index:
        job = Job(seat, {0: gather.join(seat, facts)})
        port = relay.begin(seat)
    else:
        listening = gather.listen(seat)
        with contextlib.ExitStack() as unless_gathered:
            unless_gathered.callback(listening.close)
            job = Job(seat, gather.expect(seat, listening, facts))
            unless_gathered.pop_all()
        port = relay.free_port()
        relay.serve(listening, port)
    with job.together():
        _initialise(seat, port)
    return job


def _initialise(seat: Seat, port: int) -> None:
    import jax

    # The relay is on this machine, so proxies do not matter. JAX's handler of SIGTERM would replace that of the server.
    os.environ["no_grpc_proxy"] = relay.HERE
    jax.config.update("jax_check_proxy_envs", False)
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        f"{relay.HERE}:{port}",
        seat.count,
        seat.index,
        cluster_detection_method="deactivate",
        coordinator_bind_address=f"{relay.HERE}:{port}",
        initialization_timeout=seat.patience,
        shutdown_timeout_seconds=SHUTDOWN,
    )

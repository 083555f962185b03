"""Runs the application: binds, loads the model, and ends when it should."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import sys
from types import FrameType

import uvicorn

from ds4jax.errors import InputError
from ds4jax.serve.app import application
from ds4jax.serve.runner import Runner

# Seconds that connections have after the last reply.
GRACE = 3


class Server(uvicorn.Server):
    """A server whose first signal lets running requests end; the second one ends them."""

    def __init__(self, config: uvicorn.Config, runner: Runner):
        super().__init__(config)
        self._runner, self._draining = runner, False
        self._loop = asyncio.get_running_loop()
        self._tasks: list[asyncio.Future[None]] = []

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain."""
        if self._runner.state == "loading":
            # Loading cannot be stopped half-way.
            print(f"ds4jax: {signal.Signals(sig).name} while loading", file=sys.stderr, flush=True)
            os._exit(128 + sig)
        if self._draining:
            self.force_exit = self.should_exit = True
            return
        self._draining = True
        print(f"ds4jax: {signal.Signals(sig).name}: running requests end first; a second signal ends them", file=sys.stderr)
        self._loop.call_soon_threadsafe(lambda: self._tasks.append(asyncio.ensure_future(self._drain())))

    async def _drain(self) -> None:
        await self._runner.drain()
        self.should_exit = True


def serve(runner: Runner, host: str, port: int) -> None:
    """Serve until a signal, or until the engine has ended.

    Raises:
        InputError: the model cannot be loaded, or the address cannot be bound.
        RuntimeError: the engine's thread has ended.
    """
    listening = _bound(host, port)
    _log()

    async def main() -> None:
        await run(server(runner), runner, listening)

    asyncio.run(main())
    if isinstance(runner.error, InputError):
        raise runner.error
    if runner.error is not None:
        raise RuntimeError(f"the server has ended: {runner.error}") from runner.error


def server(runner: Runner) -> Server:
    """A server for this runner; to be made in the event loop."""
    # Without a `log_config`: to set one up ends the log handlers of all other packages, and absl's then closes stderr.
    config = uvicorn.Config(
        application(runner), lifespan="off", access_log=False, log_config=None, log_level="warning", server_header=False,
        timeout_graceful_shutdown=GRACE,
    )  # fmt: skip
    return Server(config, runner)


async def run(one: Server, runner: Runner, listening: socket.socket) -> None:
    """Load the model and serve on a socket until the server should exit."""

    async def load() -> None:
        await runner.start()
        if runner.state == "ready":
            host, port = listening.getsockname()[:2]
            print(f"ds4jax: {runner.settings.served_name} is ready at http://{host}:{port}", file=sys.stderr, flush=True)

    async def watch() -> None:
        await runner.watch()
        one.should_exit = True

    tasks = [asyncio.ensure_future(load()), asyncio.ensure_future(watch())]
    try:
        await one.serve(sockets=[listening])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await runner.close()


def _bound(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        # `create_server` adds the address to the system's words.
        reason = (error.strerror or str(error)).partition(" (while")[0]
        other = "; give another --port, or 0 for any" if error.errno in (errno.EADDRINUSE, errno.EACCES) else ""
        raise InputError(f"--host {host} --port {port}: {reason}{other}") from error


def _log() -> None:
    """One line of JSON for each request on stderr; errors of the server beside them."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("ds4jax.access", "ds4jax.serve"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        logger.propagate = False

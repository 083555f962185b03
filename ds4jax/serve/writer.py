"""Writes a stream to a client: its events, and comments while nothing happens."""

from __future__ import annotations

import asyncio

from starlette.types import Send

_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Writer:
    """A stream on its way to one client. Two tasks may write."""

    def __init__(self, send: Send, comment: bytes, *, quiet: float, patience: float):
        """Nothing is sent yet.

        Args:
            comment: what a silent stream gets.
            quiet: seconds of silence before it.
            patience: seconds that a client may leave its connection full.
        """
        self._send, self._comment, self._quiet, self._patience = send, comment, quiet, patience
        self._writing, self._last = False, asyncio.get_running_loop().time()

    async def begin(self) -> None:
        """Send the head."""
        await self._send({"type": "http.response.start", "status": 200, "headers": _STREAM})

    async def part(self, data: bytes, *, more: bool = True) -> None:
        """Send some bytes. Waits while the connection is full.

        Raises:
            OSError: the connection is closed.
        """
        self._writing, self._last = True, asyncio.get_running_loop().time()
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
        self._writing, self._last = False, asyncio.get_running_loop().time()

    async def keep(self) -> None:
        """Send a comment whenever nothing was sent for a while. Returns when the client has stopped reading."""
        pause = self._quiet
        while True:
            await asyncio.sleep(pause)
            silent = asyncio.get_running_loop().time() - self._last
            pause = self._quiet
            if self._writing and silent > self._patience:
                return
            if not self._writing and silent < self._quiet:
                pause = self._quiet - silent
            elif not self._writing:
                try:
                    await asyncio.wait_for(self.part(self._comment), self._patience)
                except TimeoutError:
                    return

"""`ds4jax serve` in a process of its own, over the tiny model."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Process:
    """A server's process.

    Attributes:
        url: its address.
        log: the file of its stderr.
    """

    def __init__(self, folder: Path, *options: str):
        self.log = folder / f"server-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "ds4jax", "serve", "--port", "0", "--slots", "8", "--context", "2048", *options]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(command, stderr=log)
        self.url = ""
        while not self.url:
            assert self._process.poll() is None, self.log.read_text()
            lines = [line for line in self.log.read_text().splitlines() if "is ready at" in line]
            self.url = lines[0].split()[-1] if lines else ""
            time.sleep(0.05)

    def post(self, path: str, **body: Any) -> Any:
        """The answer to a request."""
        with urllib.request.urlopen(self.url + path, json.dumps(body).encode(), timeout=600) as answer:
            return json.load(answer)

    def health(self) -> Any:
        """What `/health` says."""
        with urllib.request.urlopen(f"{self.url}/health", timeout=60) as answer:
            return json.load(answer)

    def idle(self, seconds: float = 120) -> bool:
        """Whether all slots are free within some seconds."""
        until = time.monotonic() + seconds
        while (free := self.health()) != {"status": "ok", "running": 0, "waiting": 0} and time.monotonic() < until:
            time.sleep(0.05)
        return free["running"] == free["waiting"] == 0

    def rss(self) -> float:
        """Bytes of its memory, in MB."""
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines())
        return int(fields["VmRSS"].split()[0]) / 1000

    def records(self) -> list[dict[str, Any]]:
        """Lines of its access log."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def wait(self, seconds: float) -> int:
        """Wait for its end. Returns the exit code."""
        return self._process.wait(seconds)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def process(folder: Path, *options: str) -> Iterator[Process]:
    """A server, killed at the end if it still runs."""
    os.makedirs(folder, exist_ok=True)
    one = Process(folder, *options)
    try:
        yield one
    finally:
        one.kill()

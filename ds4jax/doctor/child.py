"""Work that needs JAX, in a process of its own: starting a backend may hang or abort."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

# Begins each line that the child prints for its parent. Libraries may print others.
MARK = "ds4jax\t"


class ChildError(Exception):
    """The child failed or took too long; the message is one line."""


def say(**fields: Any) -> None:
    """In the child: print an object for the parent."""
    print(MARK + json.dumps(fields), flush=True)


def objects(program: str, *limits: float) -> Iterator[dict[str, Any]]:
    """Run a Python program in a process of its own and yield the objects that it prints with `say`.

    Args:
        limits: seconds until the first object, the second and so on; the last one holds for all that follow, and for the end.

    Raises:
        ChildError: the child fails, or is stopped by a limit.
    """
    # Without this, JAX would reserve three quarters of the GPU's memory.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    late = threading.Event()
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        try:
            child = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                errors="replace",
                env=environment,
            )
        except OSError as error:
            raise ChildError(f"could not be started: {error}") from None
        assert child.stdout

        def stop() -> None:
            late.set()
            child.kill()

        waits, limit = iter(limits), limits[0]
        timer = threading.Timer(0, stop)
        with child:
            try:
                while True:
                    limit = next(waits, limit)
                    timer = threading.Timer(limit, stop)
                    timer.start()
                    line = next((line for line in child.stdout if line.startswith(MARK)), None)
                    if line is None:
                        code = child.wait()
                        break
                    timer.cancel()
                    yield json.loads(line.removeprefix(MARK))
            finally:
                timer.cancel()
                child.kill()
        if late.is_set():
            raise ChildError(f"stopped after {limit:.0f} s")
        if code:
            errors.seek(0)
            lines = [line.strip() for line in errors if line.strip()]
            raise ChildError(lines[-1] if lines else f"exit code {code}")

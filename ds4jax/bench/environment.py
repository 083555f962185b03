"""Where a benchmark ran: the device, its copy bandwidth, and the versions of everything."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds4jax.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
COPY_FLOATS = 2**28
COPIES = 10


def require_gpu() -> None:
    """Start jax on the GPU.

    Raises:
        InputError: jax has none.
    """
    import jax

    if jax.default_backend() != "gpu":
        raise no_gpu(jax.default_backend())


def no_gpu(backend: str) -> InputError:
    """What to tell who has no GPU; `backend` is what jax runs on instead."""
    return InputError(f"bench: jax runs on {backend} here; kernels are timed on an NVIDIA GPU (pip install 'ds4jax[cuda13]')")


def slug(device: str) -> str:
    """A device kind as file names hold it: nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _printed(*command: str) -> str | None:
    """What a command prints, or None when it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _driver() -> str | None:
    """Version of the NVIDIA driver."""
    lines = (_printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "").splitlines()
    return lines[0].strip() if lines else None


def commit() -> str | None:
    """What `DS4JAX_COMMIT` says, else the commit of the checkout, "-dirty" after it when a tracked or new file differs, or None.

    The variable is for a copy of the tree that was sent somewhere with an older history or none. An installed package may lie
    inside a repository that is not this project's; its own folder must be the top.
    """
    if told := os.environ.get("DS4JAX_COMMIT"):
        return told
    top = _printed("git", "rev-parse", "--show-toplevel")
    head = _printed("git", "rev-parse", "HEAD") if top and Path(top).resolve() == ROOT else None
    return head and head + ("-dirty" if _printed("git", "status", "--porcelain") else "")


def kernels_sha256(folder: Path = ROOT / "pallas_kernels") -> str:
    """SHA-256 over the bytes of the folder's *.py files, one after the other, sorted by name."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def command_line(arguments: Sequence[str]) -> str:
    """A process's arguments as a user types them, and of absolute paths the last part only."""
    program = Path(arguments[0])
    if program.name == "__main__.py":
        package = ".".join(program.parts[-3:-1]) if program.parent.name == "bench" else program.parent.name
        name = f"python -m {package}"
    else:
        name = program.name
    words = []
    for word in arguments[1:]:
        option, equals, value = word.rpartition("=")
        words.append(option + equals + (Path(value).name if value.startswith("/") else value))
    return " ".join([name, *words])


def describe() -> dict[str, Any]:
    """Device, driver, versions, commit, hash of the kernels and command line, as every result file carries them."""
    import jax

    return {
        "device": jax.devices()[0].device_kind,
        "driver": _driver(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "python": platform.python_version(),
        "commit": commit(),
        "kernels_sha256": kernels_sha256(),
        "command": command_line(sys.argv),
    }


def copy_gbps() -> float:
    """Bandwidth of a device copy in GB/s: `jnp.copy` of 1 GiB of float32, bytes read plus bytes written.

    Divided by the median of 10 kernel times from the profiler.

    Raises:
        RuntimeError: the trace does not hold the copies.
    """
    import jax
    import jax.numpy as jnp

    from pallas_kernels.timing import device_events

    array = jnp.ones(COPY_FLOATS, jnp.float32)
    copy = jax.jit(jnp.copy)
    jax.block_until_ready(copy(array))
    events = device_events(lambda: [copy(array) for _ in range(COPIES)])
    if len(events) < COPIES:
        raise RuntimeError(f"copy: the trace holds {len(events)} kernels, expected {COPIES}")
    # What else the device did meanwhile is shorter by orders of magnitude.
    longest = sorted(us for _, us in events)[-COPIES:]
    return 2 * array.nbytes / statistics.median(longest) / 1e3

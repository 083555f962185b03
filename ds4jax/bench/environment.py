"""The environment of a benchmark: the device, its copy bandwidth and the versions."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
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
from ds4jax.nvidia import cards

ROOT = Path(__file__).resolve().parents[2]
COPY_FLOATS = 2**28
COPIES = 10
PROBE = "import json; from ds4jax.bench.environment import present; print(json.dumps(present()))"


def require_gpu() -> None:
    """Start JAX on the GPU.

    Raises:
        InputError: JAX finds no GPU.
    """
    import jax

    if jax.default_backend() != "gpu":
        raise no_gpu(jax.default_backend())


def no_gpu(backend: str) -> InputError:
    """The error for a machine without a GPU; `backend` is JAX's backend there."""
    return InputError(f"bench: jax runs on {backend} here; kernels are timed on an NVIDIA GPU (pip install 'ds4jax[cuda13]')")


def slug(device: str) -> str:
    """A device kind for file names, such as nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _printed(*command: str) -> str | None:
    """Output of a command; None if it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str | None:
    """Commit of the source: `DS4JAX_COMMIT` if set, or else the checkout's commit. None outside a checkout.

    "-dirty" follows the checkout's commit if a tracked file is changed or a file is new. The variable is for copies of the tree
    without this history. The project must be the top of its repository: an installed package may lie inside another one.
    """
    if given := os.environ.get("DS4JAX_COMMIT"):
        return given
    top = _printed("git", "rev-parse", "--show-toplevel")
    head = _printed("git", "rev-parse", "HEAD") if top and Path(top).resolve() == ROOT else None
    return head and head + ("-dirty" if _printed("git", "status", "--porcelain") else "")


def kernels_sha256(folder: Path = ROOT / "pallas_kernels") -> str:
    """SHA-256 of all *.py files below the folder, concatenated in the order of their relative paths."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def command_line(arguments: Sequence[str]) -> str:
    """A process's arguments as a user types them. Absolute paths are cut to their last part."""
    program = Path(arguments[0])
    if program.name == "__main__.py":
        name = f"python -m {program.parent.name}"
    else:
        name = program.name
    words = []
    for word in arguments[1:]:
        option, equals, value = word.rpartition("=")
        words.append(option + equals + (Path(value).name if value.startswith("/") else value))
    return " ".join([name, *words])


def describe() -> dict[str, Any]:
    """The fields of every result file: device, driver, versions, commit, hash of the kernels and command line."""
    import jax

    found = cards()
    return {
        "device": jax.devices()[0].device_kind,
        "driver": found[0].driver if found else None,
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "python": platform.python_version(),
        "commit": commit(),
        "kernels_sha256": kernels_sha256(),
        "command": command_line(sys.argv),
    }


def present() -> dict[str, Any]:
    """The fields of `describe`, `backend` and `count` of the devices, and a hash of the package's source, as of the kernels'."""
    import jax

    devices = {"backend": jax.default_backend(), "count": jax.device_count()}
    return describe() | {"source_sha256": kernels_sha256(ROOT / "ds4jax")} | devices


def probe() -> dict[str, Any]:
    """`present`, from a process of its own, so that this one holds no memory of a device.

    Raises:
        InputError: JAX does not start.
    """
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise InputError(f"bench: jax does not start: {reason}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found | {"command": command_line(sys.argv)}


def copy_gbps() -> float:
    """Bandwidth of a device copy in GB/s.

    It is the bytes read plus the bytes written by `jnp.copy` of 1 GiB of float32, divided by the median of 10 kernel times from
    the profiler.

    Raises:
        RuntimeError: the trace does not contain the copies.
    """
    import jax
    import jax.numpy as jnp

    from pallas_kernels.core.timing import device_events

    array = jnp.ones(COPY_FLOATS, jnp.float32)
    copy = jax.jit(jnp.copy)
    jax.block_until_ready(copy(array))
    events = device_events(lambda: [copy(array) for _ in range(COPIES)])
    if len(events) < COPIES:
        raise RuntimeError(f"copy: the trace holds {len(events)} kernels, expected {COPIES}")
    # The device's other kernels in this time are shorter by orders of magnitude.
    longest = sorted(us for _, us in events)[-COPIES:]
    return 2 * array.nbytes / statistics.median(longest) / 1e3

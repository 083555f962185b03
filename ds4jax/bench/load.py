"""Measures the load rate: from a file in the page cache to weights on the device, compared with the machine's limits.

A loader must read the file and copy its bytes to the device. It also checks every value and splits blocks into planes. The target
is a share of the slower of the two unavoidable steps, reading and copying.
"""

from __future__ import annotations

import gc
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from ds4jax.bench.q2_file import config_of, stored_bytes, write_q2
from ds4jax.errors import InputError
from ds4jax.language_model import from_checkpoint
from ds4jax.loading import open_checkpoint

SCHEMA = 1
RUNS = 3
# Target: the load rate divided by the slower of `cat` and `device_put`.
MIN_RATIO = 0.6
# Maximum bytes of one `device_put`: the size of a large tensor.
PIECE = 1 << 28
WAYS = {
    "cat": "cat, from the page cache",
    "put": "device_put, from page-locked memory",
    "load": "ds4jax.load",
}


def measure(nbytes: int, note: Callable[[str], None]) -> dict[str, Any]:
    """Write a file of about `nbytes` bytes, and time `cat`, `device_put` and the loader in turn.

    Args:
        note: called with a line before each step.

    Returns:
        schema, bytes (of the file), tensors, runs (way → GB/s of each run), gbps (way → median), slower (GB/s of the slower of
        `cat` and `device_put`) and ratio (loading divided by `slower`).

    Raises:
        InputError: the file does not fit in the temporary folder, or the weights do not fit on the device.
    """
    config = config_of(nbytes)
    with tempfile.TemporaryDirectory(prefix="ds4jax-load-") as folder:
        _require_room(Path(folder), stored_bytes(config))
        path = Path(folder) / "q2.gguf"
        note(f"writing {stored_bytes(config) / 1e9:.2f} GB")
        write_q2(path, config)
        size, tensors = path.stat().st_size, len(open_checkpoint(path).tensors)
        count = -(-size // PIECE)
        host = _page_locked(-(-size // count))
        works: dict[str, Callable[[], None]] = {
            "cat": lambda: _cat(path),
            "put": lambda: _put(host, count),
            "load": lambda: _load(path),
        }
        for way, work in works.items():
            note(f"warming up: {WAYS[way]}")
            work()
        runs: dict[str, list[float]] = {way: [] for way in WAYS}
        for i in range(RUNS):
            for way, work in works.items():
                note(f"run {i + 1} of {RUNS}: {WAYS[way]}")
                runs[way].append(size / _seconds(work) / 1e9)
    gbps = {way: statistics.median(rates) for way, rates in runs.items()}
    slower = min(gbps["cat"], gbps["put"])
    return {
        "schema": SCHEMA,
        "bytes": size,
        "tensors": tensors,
        "runs": {way: [round(rate, 3) for rate in rates] for way, rates in runs.items()},
        "gbps": {way: round(rate, 3) for way, rate in gbps.items()},
        "slower": round(slower, 3),
        "ratio": round(gbps["load"] / slower, 3),
    }


def _require_room(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < 1.05 * nbytes:
        raise InputError(
            f"{folder.parent}: {free / 1e9:.1f} GB free, {nbytes / 1e9:.1f} GB are needed; give fewer --bytes or another TMPDIR"
        )


def _page_locked(nbytes: int) -> jax.Array | np.ndarray:
    """Page-locked host memory, which the device reads directly."""
    host = np.ones(nbytes, np.uint8)
    if jax.default_backend() == "cpu":
        return host
    return jax.block_until_ready(jax.device_put(host, SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")))


def _cat(path: Path) -> None:
    subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)


def _put(host: jax.Array | np.ndarray, count: int) -> None:
    """Copy the same bytes to the device `count` times. All copies stay there until the last is done, as weights do.

    On a CPU, `device_put` would not copy, so NumPy copies replace it.
    """
    if isinstance(host, np.ndarray):
        _ = [host.copy() for _ in range(count)]
        return
    device = SingleDeviceSharding(jax.devices()[0], memory_kind="device")
    jax.block_until_ready([jax.device_put(host, device) for _ in range(count)])


def _load(path: Path) -> None:
    model = from_checkpoint(open_checkpoint(path))
    jax.block_until_ready(jax.tree.leaves(model.weights))


def _seconds(work: Callable[[], None]) -> float:
    # Free the weights of the run before: modules have reference cycles, so only the collector frees them.
    gc.collect()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def enough(content: Mapping[str, Any]) -> bool:
    """Whether loading reaches the target."""
    return bool(content["ratio"] >= MIN_RATIO)


def show(content: Mapping[str, Any]) -> None:
    """Print the rates and the ratio on stdout."""
    print(f"{content['device']}, jax {content['jax']}: {content['bytes'] / 1e9:.2f} GB in {content['tensors']} tensors")
    for way, name in WAYS.items():
        runs = ", ".join(f"{rate:.2f}" for rate in content["runs"][way])
        print(f"  {name:<36} {content['gbps'][way]:>7.2f} GB/s  (runs: {runs})")
    verdict = "reached" if enough(content) else "not reached"
    print(f"loading is at {content['ratio']:.2f} of the slower of the other two; the target on a GPU is {MIN_RATIO}: {verdict}")

"""The load rate: from a file in the page cache to weights on the device, beside what the machine can do at all.

A loader has to read the file and to bring its bytes onto the device; it looks at every value on the way and splits blocks into
planes there. The slower of the two things that it cannot avoid is what it is held to.
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
# What a loader is asked for, of the slower of `cat` and `device_put`.
LEAST = 0.6
# Bytes that are put at once, at most: a large tensor's.
PIECE = 1 << 28
WAYS = {
    "cat": "cat, from the page cache",
    "put": "device_put, from page-locked memory",
    "load": "ds4jax.load",
}


def measure(nbytes: int, note: Callable[[str], None]) -> dict[str, Any]:
    """Write a file of about so many bytes and time the three ways in turns; `note` is told what comes next.

    Returns:
        schema, bytes (of the file), tensors, runs (way → GB/s of each run), gbps (way → their median), slower (GB/s of the slower
        of `cat` and `device_put`) and ratio (of loading to that).

    Raises:
        InputError: the file does not fit into the folder for temporary files, or the weights onto the device.
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
    """Host memory that the device can read from directly."""
    host = np.ones(nbytes, np.uint8)
    if jax.default_backend() == "cpu":
        return host
    return jax.block_until_ready(jax.device_put(host, SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")))


def _cat(path: Path) -> None:
    subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)


def _put(host: jax.Array | np.ndarray, count: int) -> None:
    """The same bytes onto the device so many times; the pieces stay there until the last has come, as weights do.

    A CPU would take host memory for its own; copies stand for that.
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
    # Of the last round: modules refer to each other, and their weights go when the collector comes by.
    gc.collect()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def enough(content: Mapping[str, Any]) -> bool:
    """Whether loading reaches what a loader is asked for."""
    return bool(content["ratio"] >= LEAST)


def show(content: Mapping[str, Any]) -> None:
    """Print the rates and the ratio on stdout."""
    print(f"{content['device']}, jax {content['jax']}: {content['bytes'] / 1e9:.2f} GB in {content['tensors']} tensors")
    for way, name in WAYS.items():
        runs = ", ".join(f"{rate:.2f}" for rate in content["runs"][way])
        print(f"  {name:<36} {content['gbps'][way]:>7.2f} GB/s  (runs: {runs})")
    verdict = "reached" if enough(content) else "not reached"
    print(f"loading is at {content['ratio']:.2f} of the slower of the other two; {LEAST} is asked for on a GPU: {verdict}")

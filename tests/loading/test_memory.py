"""Loading a file in the published layout: memory for about one tensor at a time, at nearly the speed of a copy."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from q2_files import WIDER

from ds4jax.bench.q2_file import WIDE, write_q2
from ds4jax.loading import open_checkpoint
from ds4jax.loading.gguf_header import TensorInfo, read_header
from ds4jax.loading.gguf_names import slots
from ds4jax.loading.plan import share_bytes
from ds4jax.loading.tensor_reader import read_ahead
from pallas_kernels.formats import FORMATS, Quantized

# Memory of JAX, the model's structure and compiling, without tensors.
ALLOWED = 1_500_000_000
# The same in practice, for a file that would fit into the allowance whole.
USUAL = 250_000_000
MIN_RATE = 0.5
ROUNDS = 5
# Where a block of a file falls into parts.
PARTS = {"Q8_0": (2,), "Q2_K": (16, 80, 82)}

LOADING = """
import json, sys, threading
import jax
import ds4jax

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

live, over, done = 0, 0, threading.Event()

def watch():
    global over
    while not done.wait(0.002):
        held = live
        over = max(over, anonymous() - held)

def told(count, total):
    global live
    live = sum(array.nbytes for array in jax.live_arrays())

jax.block_until_ready(jax.numpy.zeros(8) + 1)
before = anonymous()
# A load that fails ends the process.
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
model = ds4jax.load(sys.argv[1], progress=told)
done.set()
watcher.join()
print(json.dumps({"before": before, "over": over, "live": live, "after": anonymous()}))
"""


@pytest.fixture(scope="module")
def q2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file of 0.4 GB."""
    path = tmp_path_factory.mktemp("q2") / "q2.gguf"
    write_q2(path, WIDE)
    yield path
    path.unlink()


def measured(path: Path) -> dict[str, int]:
    """Bytes of anonymous memory before loading, at most beyond live device arrays, and at the end, and those of the arrays."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", LOADING, path], capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from Linux's /proc")


@linux
def test_one_tensor_at_a_time(q2: Path) -> None:
    tensors = open_checkpoint(q2).tensors
    largest = max(tensor.device_nbytes for tensor in tensors)
    found = measured(q2)
    assert found["live"] >= sum(tensor.device_nbytes for tensor in tensors)
    assert found["after"] >= found["live"]
    assert found["over"] <= largest + ALLOWED
    assert found["over"] <= found["before"] + largest + USUAL


@linux
@pytest.mark.slow
def test_one_tensor_at_a_time_of_four_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "q2.gguf"
    largest = write_q2(path, WIDER)
    try:
        assert path.stat().st_size > 4e9
        found = measured(path)
    finally:
        path.unlink()
    assert found["live"] > 4e9
    assert found["over"] <= largest + ALLOWED


LOADING_ON_FOUR = """
import collections, contextlib, json, sys, threading
import jax
import ds4jax

most, done = collections.Counter(), threading.Event()

def held():
    # A shard is an array of its own over the same buffer.
    buffers = {}
    for array in jax.live_arrays():
        # Between the listing and this line an array may be donated.
        with contextlib.suppress(RuntimeError):
            for shard in array.addressable_shards:
                buffers[shard.device.id, shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    found = collections.Counter()
    for (device, _), count in buffers.items():
        found[device] += count
    return found

def watch():
    while not done.wait(0.005):
        for device, count in held().items():
            most[device] = max(most[device], count)

watcher = threading.Thread(target=watch)
watcher.start()
model = ds4jax.load(sys.argv[1], devices=4)
done.set()
watcher.join()
print(json.dumps([[count for _, count in sorted(found.items())] for found in (most, held())]))
"""


@pytest.mark.slow
def test_a_device_never_holds_more_than_its_share_of_four_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "q2.gguf"
    write_q2(path, WIDER)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    try:
        share = share_bytes(open_checkpoint(path), 4)
        words = [sys.executable, "-c", LOADING_ON_FOUR, path]
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    finally:
        path.unlink()
    most, end = json.loads(done.stdout)
    assert len(end) == 4
    assert all(share <= count <= 1.01 * share for count in end)
    assert max(most) <= 1.1 * share


def moved(path: Path) -> list[TensorInfo]:
    """Tensors that a loader only moves, in the order of the file. The signs of IQ2_XXS get other places, which is arithmetic."""
    return sorted((info for info in read_header(path).tensors.values() if info.type != "IQ2_XXS"), key=lambda info: info.offset)


def loaded(path: Path) -> list[object]:
    """These tensors as the loader reads them."""
    chosen = {info.name for info in moved(path)}
    names = {slot.name for slot in slots(WIDE) if slot.gguf_name in chosen}
    with read_ahead([tensor.start(None) for tensor in open_checkpoint(path).tensors if tensor.name in names]) as values:
        return list(values)


def copied(path: Path) -> list[list[np.ndarray]]:
    """The minimum work of a loader, in numpy: map the file, split blocks into parts, and copy these."""
    header, values = read_header(path), []
    for info in moved(path):
        raw = header.raw(info)
        if info.type in FORMATS:
            blocks = raw.reshape(-1, FORMATS[info.type].BLOCK_BYTES)
            parts = [np.ascontiguousarray(part) for part in np.split(blocks, PARTS[info.type], axis=1)]
        else:
            parts = [raw]
        values.append([part.copy() for part in parts])
    return values


def seconds(work: Callable[[Path], object], path: Path) -> float:
    """Seconds of one pass; its result is dropped before the next begins.

    A process loads a model once, into pages that the system clears first. So nothing of the pass before may be kept for this one.
    """
    ctypes.CDLL(None).malloc_trim(0)
    start = time.perf_counter()
    kept = work(path)
    taken = time.perf_counter() - start
    del kept
    return taken


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the reference runs on the host; GPUs have a benchmark of their own")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="freed memory is given back by glibc's call")
def test_rate(q2: Path) -> None:
    # From here on programs are compiled and the file is in memory.
    loaded(q2)
    rounds = [(seconds(loaded, q2), seconds(copied, q2)) for _ in range(ROUNDS)]
    # The other workers of a run can only add to a time, so the least of several is the loader's own.
    ours, reference = (min(column) for column in zip(*rounds, strict=True))
    size = sum(info.nbytes for info in moved(q2))
    print(f"{size / ours / 1e9:.2f} GB/s, reference {size / reference / 1e9:.2f} GB/s")
    assert reference / ours >= MIN_RATE


@pytest.mark.gpu
def test_the_gpu_holds_what_the_file_holds(q2: Path) -> None:
    """Blocks that were split into planes there, of tensors that come whole and in pieces."""
    header, names = read_header(q2), {slot.name: slot.gguf_name for slot in slots(WIDE)}
    whole: set[bool] = set()
    for tensor in open_checkpoint(q2).tensors:
        value, info = tensor.read(), header.tensors[names[tensor.name]]
        whole.add(len(tensor.start(None).pieces) == 1)
        found = value.to_bytes() if isinstance(value, Quantized) else np.asarray(value)
        np.testing.assert_array_equal(found.reshape(-1).view(np.uint8), header.raw(info).reshape(-1), err_msg=tensor.name)
    assert whole == {False, True}

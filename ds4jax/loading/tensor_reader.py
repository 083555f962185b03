"""Read tensors: threads check stored bytes and copy them to the device, ahead of the thread that makes values of them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import jax
import numpy as np

from pallas_kernels.formats import Quantized

# A thread reads, checks and copies a few GB/s; more threads than this are not faster.
THREADS = 8
# Maximum number of pieces fetched ahead: enough that no thread waits for the next tensor.
AHEAD = 12


@dataclasses.dataclass(frozen=True)
class Reading:
    """A tensor that can be read in pieces.

    Attributes:
        pieces: each checks a small part of the stored bytes and puts it onto the default device, in any thread.
        join: makes the value from the pieces' results, in order.
        device: takes the place of the default device; None keeps that.
    """

    pieces: tuple[Callable[[], jax.Array], ...]
    join: Callable[[Iterator[jax.Array]], jax.Array | Quantized]
    device: jax.Device | None = None

    @classmethod
    def at_once(cls, read: Callable[[], jax.Array | Quantized]) -> Reading:
        """A tensor that is read at once, and not ahead."""
        return cls((), lambda _: read())

    def value(self) -> jax.Array | Quantized:
        """Read the tensor now, in this thread."""
        return self.join(piece() for piece in self.pieces)


@contextlib.contextmanager
def read_ahead(readings: Sequence[Reading]) -> Iterator[Iterator[jax.Array | Quantized]]:
    """Yield the values in order, each when the device has finished it, while threads fetch pieces of later ones.

    Threads fetch at most `AHEAD` pieces ahead. Of several errors, the one of the earliest piece is raised. The threads have ended
    when the block is left.
    """
    # A thread does not inherit its parent's `jax.default_device`.
    device = jax.device_put(np.zeros(())).devices().pop()

    def fetched(piece: Callable[[], jax.Array], place: jax.Device) -> jax.Array:
        with jax.default_device(place):
            return jax.block_until_ready(piece())

    pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), thread_name_prefix="ds4jax-read")
    left = ((piece, reading.device or device) for reading in readings for piece in reading.pieces)
    waiting: deque[Future[jax.Array]] = deque()

    def fetch(count: int) -> None:
        waiting.extend(pool.submit(fetched, *piece) for piece in islice(left, count))

    def pieces(reading: Reading) -> Iterator[jax.Array]:
        for _ in reading.pieces:
            fetch(1)
            # No local name for the piece: it would keep the array alive until the next request.
            yield waiting.popleft().result()

    def value(reading: Reading) -> jax.Array | Quantized:
        with jax.default_device(reading.device or device):
            return jax.block_until_ready(reading.join(pieces(reading)))

    try:
        fetch(AHEAD)
        yield (value(reading) for reading in readings)
    finally:
        pool.shutdown(cancel_futures=True)

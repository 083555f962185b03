"""Reading tensors: several threads look at stored bytes and bring them onto the device, ahead of the one that makes values."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import jax
import jax.numpy as jnp

from pallas_kernels.formats import Quantized

# A thread pages a file in, looks at it and copies it for the device at a few GB/s; more threads than this gain nothing.
THREADS = 8
# Pieces that are on the device, or on their way, before anybody asks for them: enough that no thread waits for the next tensor.
AHEAD = 12


@dataclasses.dataclass(frozen=True)
class Reading:
    """A tensor that is about to be read.

    Attributes:
        pieces: each looks at a part of the stored bytes and puts it onto the default device, in any thread; none is large.
        join: makes the value of what the pieces return, which it takes in order.
    """

    pieces: tuple[Callable[[], jax.Array], ...]
    join: Callable[[Iterator[jax.Array]], jax.Array | Quantized]

    @classmethod
    def at_once(cls, read: Callable[[], jax.Array | Quantized]) -> Reading:
        """A tensor that is read in one go, and not ahead."""
        return cls((), lambda _: read())

    def value(self) -> jax.Array | Quantized:
        """Read it now, in this thread."""
        return self.join(piece() for piece in self.pieces)


@contextlib.contextmanager
def read_ahead(readings: Sequence[Reading]) -> Iterator[Iterator[jax.Array | Quantized]]:
    """The values in order, each when the device has done with it, while pieces of those to come are fetched in threads.

    Fetching begins at once and stays at most `AHEAD` pieces ahead. The first error in order is raised, whichever thread met its
    own first; the threads have ended when the block is left, however that happens.
    """
    # A thread does not inherit the device that its parent has chosen for a while.
    device = jnp.zeros(()).devices().pop()

    def fetched(piece: Callable[[], jax.Array]) -> jax.Array:
        with jax.default_device(device):
            return jax.block_until_ready(piece())

    pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), thread_name_prefix="ds4jax-read")
    left = (piece for reading in readings for piece in reading.pieces)
    waiting: deque[Future[jax.Array]] = deque()

    def fetch(count: int) -> None:
        waiting.extend(pool.submit(fetched, piece) for piece in islice(left, count))

    def pieces(reading: Reading) -> Iterator[jax.Array]:
        for _ in reading.pieces:
            fetch(1)
            # No name for the piece: it would live here until the next is asked for.
            yield waiting.popleft().result()

    try:
        fetch(AHEAD)
        yield (jax.block_until_ready(reading.join(pieces(reading))) for reading in readings)
    finally:
        pool.shutdown(cancel_futures=True)

"""A process that repeats the orders of process 0 has the same state to the last bit."""

from __future__ import annotations

import socket
import threading
from typing import Any

import jax
import numpy as np
import pytest
from engines import CHUNK, alone, assert_same, engine, prompt
from numerics import assert_bits_equal

from ds4jax.decode.masks import words
from ds4jax.decode.sampling import Sampling
from ds4jax.engine.loaded import Loaded
from ds4jax.engine.shape import Shape
from ds4jax.engine.slots import Slots
from ds4jax.processes.channel import Channel
from ds4jax.processes.job import Job
from ds4jax.processes.seat import Seat
from ds4jax.processes.slots import LedSlots, follow

# It compiles for half a minute.
pytestmark = pytest.mark.long
LONG, FIELDS = 3 * CHUNK + 5, (("max_new_tokens", 12), ("ignore_eos", True))


def bits(leaf: jax.Array) -> np.ndarray:
    """A copy on the host; of keys of random numbers their data."""
    return np.array(jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


class Kept:
    """Slots that keep their last state."""

    def release(self) -> None:
        self.last: Any = jax.tree.map(bits, (self.state, self._asked, self._mask))  # type: ignore[attr-defined]
        super().release()  # type: ignore[misc]


class Leading(Kept, LedSlots):
    """Slots of process 0."""


class Following(Kept, Slots):
    """Slots of another process."""


def jobs() -> tuple[Job, Job]:
    """Both ends of a job of two processes."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        far = socket.create_connection(listening.getsockname())
        near, _ = listening.accept()
    seats = [Seat("127.0.0.1", 1, index, 2, 1) for index in range(2)]
    return Job(seats[0], {1: Channel(near)}), Job(seats[1], {0: Channel(far)})


def test_another_process_repeats_all() -> None:
    """Prompts of several chunks, one of them known, drawn tokens, drafts, masks, and requests that end and are cancelled."""
    leading, following = jobs()
    made: dict[str, Any] = {}

    def slots_of(model: Loaded, shape: Shape) -> Slots:
        made["leading"], made["following"] = Leading(model, shape, leading), Following(model, shape)
        made["thread"] = threading.Thread(target=follow, args=(made["following"], following), daemon=True)
        made["thread"].start()
        leads: Slots = made["leading"]
        return leads

    with engine(slots_of=slots_of, prefix_bytes=1 << 30) as one:
        first = one.submit(prompt(None, 0, LONG), **dict(FIELDS))
        assert_same(first.result(), alone(None, 0, LONG, FIELDS))
        some = np.full(words(one.model.config.vocab_size), 0x5555_5555, np.uint32)
        requests = [
            one.submit(prompt(None, 0, LONG), sampling=Sampling(temperature=0.8, top_p=0.9, seed=3), **dict(FIELDS)),
            one.submit(prompt(None, 7, CHUNK + 1), constraint=lambda ids: some if len(ids) < 4 else None, **dict(FIELDS)),
            one.submit(prompt(None, 3, 5), draft=1, stop=[2], logprobs=3, **dict(FIELDS)),
        ]
        one.submit(prompt(None, 9, 40), max_new_tokens=100).cancel()
        assert requests[0].result().reused == 3 * CHUNK
        assert all(token % 2 == 0 for token in requests[1].result().ids[:4])
        requests[2].wait()
        # A request that runs while the engine is closed leaves a state that is not empty.
        one.submit(prompt(None, 4, 50), max_new_tokens=100, ignore_eos=True)
    made["thread"].join(60)
    expected, found = (jax.tree.leaves(made[name].last) for name in ("leading", "following"))
    assert len(expected) == len(found) > 20
    for one_leaf, other in zip(expected, found, strict=True):
        assert_bits_equal(one_leaf, other)
    assert any(np.any(leaf != 0) for leaf in expected)

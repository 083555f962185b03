"""Rows of several sequences in one call: each sequence gets the numbers that it gets alone."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numerics import arrays, short_model

from ds4jax.cache import state as caches
from ds4jax.cache.state import Cache, Rows
from ds4jax.model.compressor import closing_rows

CAPACITY = 256
# Rows of a sequence in a step, and rows of a prompt's chunk.
WIDTH, CHUNK = 2, 64
# Tolerance of a logit: for other shapes XLA sums in another order.
CLOSE = 3e-5
LENGTHS = {2: (127, 3), 3: (3, 128, 15), 5: (4, 16, 127, 15, 17)}


@functools.partial(jax.jit, static_argnames="width")
def closing(start_B: jax.Array, width: int, count_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    return closing_rows(Rows.step(start_B, width, count_B), 4)


def test_every_sequence_closes_its_block():
    index, closed = closing(np.array([3, 7, 11, 15], np.int32), 1, np.ones(4, np.int32))
    np.testing.assert_array_equal(index, [0, 1, 2, 3])
    assert closed.all()


def test_sequences_without_rows_close_no_block():
    """Three sequences of two rows: the second row of the first is a clone, and the third has none."""
    index, closed = closing(np.array([3, 6, 7], np.int32), 2, np.array([1, 2, 0], np.int32))
    assert index.shape == (3,)
    np.testing.assert_array_equal(np.asarray(index)[closed], [0, 3])


@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize(
    ("start", "width", "count"), [(0, 1, 1), (3, 1, 0), (5, 10, 7), (127, 64, 1), (126, 64, 64), (130, 300, 270)]
)
def test_rows_of_one_sequence_close_the_blocks_of_their_positions(ratio, start, width, count):
    rows = Rows.following(np.array([9, start], np.int32), width, count, slot=1)
    index, closed = jax.jit(closing_rows, static_argnums=1)(rows, ratio)
    assert index.shape == (-(-width // ratio),)
    wanted = [row for row in range(count) if (start + row + 1) % ratio == 0]
    np.testing.assert_array_equal(np.asarray(index)[closed], wanted)
    assert (np.asarray(index)[~np.asarray(closed)] == width - 1).all()


def prompt(sequence: int, length: int) -> np.ndarray:
    """Tokens of a sequence, different for each sequence."""
    return np.roll(arrays("golden")["ids"], 37 * sequence)[:length].astype(np.int32)


@functools.partial(jax.jit, static_argnames="graph")
def call(graph: nnx.GraphDef, weights: nnx.State, cache: Cache, ids_T: jax.Array, rows: Rows) -> tuple[jax.Array, Cache]:
    model = nnx.merge(graph, weights)
    h_TND, cache = model.streams(ids_T, rows, cache)
    return model.logits(h_TND, strict=rows.strict), cache


def take(cache: Cache, ids_T: np.ndarray, rows: Rows) -> tuple[np.ndarray, Cache]:
    """Logits of the call's rows, and the cache with them."""
    model = short_model()
    with jax.default_matmul_precision("highest"):
        logits, cache = call(model.graph, model.weights, cache, jnp.asarray(ids_T), rows)
    return np.asarray(logits), cache


def chunk(cache: Cache, slot: int, sequence: int, length: int, *, strict: bool) -> tuple[np.ndarray, Cache]:
    """The next rows of a prompt of `length` tokens, `CHUNK` at most, and their logits."""
    start = int(cache.length[slot])
    count = min(length - start, CHUNK)
    ids = np.resize(prompt(sequence, length)[start:], CHUNK)
    logits, cache = take(cache, ids, Rows.following(cache.length, CHUNK, count, slot=slot, strict=strict))
    return logits[:count], cache


@functools.cache
def prefilled(sequence: int, length: int, strict: bool) -> tuple[np.ndarray, Cache]:
    """Logits [length, V] of a prompt, and its own cache."""
    cache, logits = caches.empty(short_model().config, CAPACITY, slack=WIDTH), []
    while int(cache.length[0]) < length:
        found, cache = chunk(cache, 0, sequence, length, strict=strict)
        logits.append(found)
    return np.concatenate(logits), cache


def stepped(cache: Cache, sequences: list[int], counts: list[int], *, strict: bool) -> list[np.ndarray]:
    """Logits of each sequence's rows in two steps of `counts` rows each."""
    found = []
    for _ in range(2):
        length = np.asarray(cache.length)
        rows = Rows.step(cache.length, WIDTH, jnp.asarray(counts, jnp.int32), strict=strict)
        known = [prompt(sequence, CAPACITY) for sequence in sequences]
        ids = np.array([known[s][p] for s, p in zip(rows.sequence, rows.position, strict=True)], np.int32)
        logits, cache = take(cache, ids, rows)
        np.testing.assert_array_equal(cache.length, length + counts)
        found.append([logits[WIDTH * s : WIDTH * s + count] for s, count in enumerate(counts)])
    return [np.concatenate(both) for both in zip(*found, strict=True)]


def case(sequences: int, *marks: pytest.MarkDecorator, strict: bool = False) -> Any:
    return pytest.param(sequences, strict, marks=marks, id=f"{sequences}{' strict' if strict else ''}")


LONG = [case(3, pytest.mark.long, strict=strict) for strict in (False, True)]
LONG += [case(b, pytest.mark.slow, strict=strict) for b in (2, 5) for strict in (False, True)]


@pytest.mark.parametrize(("sequences", "strict"), LONG)
def test_each_sequence_has_the_logits_of_the_sequence_alone(sequences, strict):
    """Two rows of a sequence, one or none in a step; prompts one each side of blocks of 4 and 16, of the window and of 128."""
    lengths, counts = LENGTHS[sequences], [2, 1, 2, 0, 1][:sequences]
    own = [prefilled(s, length, strict)[1] for s, length in enumerate(lengths)]
    cache = jax.tree.map(lambda *parts: np.concatenate(parts), *own)
    together = stepped(cache, list(range(sequences)), counts, strict=strict)
    for s, count in enumerate(counts):
        if count:
            [alone] = stepped(own[s], [s], [count], strict=strict)
            np.testing.assert_allclose(together[s], alone, rtol=0, atol=CLOSE, err_msg=f"sequence {s} of {lengths}")


@pytest.mark.long
@pytest.mark.parametrize("strict", [False, True], ids=["default", "strict"])
def test_chunks_of_two_prompts_in_turn_are_each_prompt_alone(strict):
    lengths, logits = (130, 97), ([], [])
    cache = caches.empty(short_model().config, CAPACITY, sequences=2, slack=WIDTH)
    for slot in (0, 1, 1, 0, 0):
        found, cache = chunk(cache, slot, slot, lengths[slot], strict=strict)
        logits[slot].append(found)
    for slot, length in enumerate(lengths):
        alone, own = prefilled(slot, length, strict)
        np.testing.assert_allclose(np.concatenate(logits[slot]), alone, rtol=0, atol=CLOSE, err_msg=f"prompt {slot}")
        for (path, held), want in zip(jax.tree_util.tree_leaves_with_path(cache), jax.tree.leaves(own), strict=True):
            name = f"prompt {slot}, {jax.tree_util.keystr(path)}"
            np.testing.assert_allclose(held[slot], want[0], rtol=0, atol=CLOSE, err_msg=name)

"""Contract 7 and rules of the cache: prefill(n) then decode(m) equals prefill(n+m), and padding is not stored."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numerics import arrays, assert_bits_equal, assert_close, golden_model

from ds4jax.cache import state as caches
from ds4jax.cache.capacity import MIN_CAPACITY, PREFILL, capacity_for, chunks
from ds4jax.cache.state import Rows
from ds4jax.decode.scoring import extend

STEPS = 3
IDS = 320

# Lengths around: the first blocks, the window of 16, blocks of 4 and 16, a multiple of both, every prefill bucket.
BOUNDARIES = sorted({n + d for n in (1, 4, 8, 16, 32, 48, 64, 128, 192, 256, 304) for d in (-1, 0, 1)} - {0})
# What the narrower calls of a prefill hold: the widest is one more program.
QUICK = PREFILL[1]


def scored(length: int, decode_from: int | None = None) -> dict[str, np.ndarray]:
    """With the MTP block, as the golden numbers are asked for: by the same programs."""
    return golden_model().logits(arrays("golden")["ids"][:length], decode_from=decode_from, mtp=True)


whole = functools.cache(scored)


def check_split(n: int, m: int) -> None:
    split, expected = scored(n + m, n), whole(QUICK if n + m <= QUICK else IDS)
    assert_close(split["logits"], expected["logits"][: n + m])
    assert_close(split["mtp_logits"], expected["mtp_logits"][: n + m - 1])


@pytest.mark.parametrize("n", [pytest.param(n, marks=[] if n + STEPS <= QUICK else pytest.mark.long) for n in BOUNDARIES])
def test_prefill_then_decode_at_boundaries(n):
    check_split(n, STEPS)


@given(st.integers(0, QUICK - 12), st.integers(1, 12))
def test_prefill_then_decode_anywhere(n, m):
    check_split(n, m)


@pytest.mark.long
@given(st.integers(QUICK - 12, IDS - 12), st.integers(1, 12))
def test_prefill_then_decode_further_on(n, m):
    check_split(n, m)


def extended(cache: caches.Cache, ids: np.ndarray, width: int, capacity: int = MIN_CAPACITY) -> caches.Cache:
    """Append ids to the cache in one call of `width` rows, padded with other tokens; the program of `LanguageModel.logits`."""
    model = golden_model()
    mtp = caches.empty_mtp(model.config, capacity)
    padded = jnp.asarray(np.concatenate([ids, 7 + np.arange(width - len(ids))]).astype(np.int32))
    count = jnp.int32(len(ids))
    return extend(model.graph, model.arrays, cache, mtp, padded, padded, count, count, strict=False, want_logits=True)[0]


@pytest.mark.parametrize("width", [PREFILL[0], pytest.param(PREFILL[1], marks=pytest.mark.long)])
@pytest.mark.parametrize("known", [0, 5, 16, 31])
def test_padding_is_never_written(width, known):
    ids, config = arrays("golden")["ids"], golden_model().config
    before = caches.empty(config, MIN_CAPACITY)
    if known:
        before = extended(before, ids[:known], width)
    count, copy = 9, jax.tree.map(jnp.copy, before)
    after = extended(before, ids[known : known + count], width)
    assert int(after.length[0]) == known + count
    for old, new, ratio in zip(copy.layers, after.layers, config.layer_ratios, strict=True):
        untouched = np.setdiff1d(np.arange(old.window.shape[1]), np.arange(known, known + count) % old.window.shape[1])
        assert_bits_equal(np.asarray(new.window)[0, untouched], np.asarray(old.window)[0, untouched])
        if ratio:
            closed = np.arange(known // ratio, (known + count) // ratio)
            untouched = np.setdiff1d(np.arange(old.compressor.rows.shape[1]), closed)
            seen, wanted = (np.asarray(layer.compressor.rows) for layer in (new, old))
            assert_bits_equal(seen[0, untouched], wanted[0, untouched])


@pytest.mark.slow
def test_a_full_context_drops_what_does_not_fit():
    """Past the capacity only the spare row may change: a clamped write would overwrite the last valid row."""
    ids, capacity = arrays("golden")["ids"], 64
    cache = caches.empty(golden_model().config, capacity)
    cache = extended(cache, ids[:capacity], 128, capacity)
    rows = [jnp.copy(layer.compressor.rows) for layer in cache.layers if layer.compressor]
    assert any(np.abs(row[0, -2]).max() > 0 for row in rows)
    after = extended(cache, ids[capacity : capacity + 32], 32, capacity)
    for old, layer in zip(rows, (layer for layer in after.layers if layer.compressor), strict=True):
        assert_bits_equal(layer.compressor.rows[0, :-1], old[0, :-1])


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def positions(start: jax.Array, width: int, count: int, size: int) -> jax.Array:
    ring, new = jnp.zeros((1, size, 2)), jnp.zeros((width, 2))
    return caches.ring_and_rows(ring, new, Rows.following(start, width, count))[1]


@given(st.integers(0, 600), st.integers(1, 40), st.integers(1, 40))
def test_ring_positions(start, width, size):
    """The ring holds the latest position of each slot, and the call's live rows follow."""
    count = max(width - 2, 1)
    [position] = np.asarray(positions(jnp.int32(start), width, count, size))
    expected = [max((q for q in range(start) if q % size == slot), default=-1) for slot in range(size)]
    np.testing.assert_array_equal(position[:size], expected)
    np.testing.assert_array_equal(position[size : size + count], np.arange(start, start + count))
    np.testing.assert_array_equal(position[size + count :], -1)


@given(st.integers(1, 3000), st.integers(0, 3000))
def test_chunks_cover_everything_once(total, decode_from):
    decode_from = min(decode_from, total)
    position = 0
    for start, width, count in chunks(total, decode_from):
        assert start == position
        assert 1 <= count <= width
        assert width in (PREFILL if start < decode_from else (1,))
        assert start >= decode_from or start + count <= decode_from
        position += count
    assert position == total


@given(st.integers(1, 5000))
def test_capacity_is_a_power_of_two_within_the_context(rows):
    capacity = capacity_for(rows, 4096)
    assert capacity >= rows
    assert capacity in (512, 1024, 2048, 4096) or rows > 4096


@pytest.mark.slow
def test_a_known_step_updates_the_caches_in_place():
    """Every cache array of a compiled call is donated: its output has the same memory."""
    model = golden_model()
    held = caches.empty(model.config, 512), caches.empty_mtp(model.config, 512)
    ids, one = jnp.zeros(1, jnp.int32), jnp.int32(1)
    with jax.default_matmul_precision("highest"):
        lowered = extend.__wrapped__.lower(model.graph, model.weights, *held, ids, ids, one, one, strict=False, want_logits=True)
    memory = lowered.compile().memory_analysis()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(held))
    assert memory.alias_size_in_bytes >= size

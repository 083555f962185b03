"""Contract 7 and the cache's own promises: prefill(n) then decode(m) equals prefill(n+m), and padding leaves no trace."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numerics import arrays, assert_bits_equal, assert_close, golden_config, golden_model

from ds4jax import cache as caches
from ds4jax.buckets import PREFILL, capacity_for, chunks
from ds4jax.cache import Rows
from ds4jax.scoring import extend

STEPS = 3
IDS = 320

# One each side of: the first blocks, the window of 16, blocks of 4 and 16, a multiple of both, every prefill bucket.
BOUNDARIES = sorted({n + d for n in (1, 4, 8, 16, 32, 48, 64, 128, 192, 256, 304) for d in (-1, 0, 1)} - {0})


@functools.cache
def whole() -> np.ndarray:
    return golden_model().logits(arrays("golden")["ids"])["logits"]


def check_split(n: int, m: int) -> None:
    ids = arrays("golden")["ids"][: n + m]
    assert_close(golden_model().logits(ids, decode_from=n)["logits"], whole()[: n + m])


@pytest.mark.parametrize("n", BOUNDARIES)
def test_prefill_then_decode_at_boundaries(n):
    check_split(n, STEPS)


@given(st.integers(0, IDS - 12), st.integers(1, 12))
def test_prefill_then_decode_anywhere(n, m):
    check_split(n, m)


def extended(cache: caches.Cache, ids: np.ndarray, width: int) -> caches.Cache:
    """Take ids into the cache in one call of `width` rows, the padding filled with other tokens."""
    model = golden_model()
    padded = jnp.asarray(np.concatenate([ids, 7 + np.arange(width - len(ids))]).astype(np.int32))
    count = jnp.int32(len(ids))
    return extend(model.graph, model.weights, cache, None, padded, padded, count, count, strict=False, want_logits=False)[0]


@pytest.mark.parametrize("width", [PREFILL[0], pytest.param(PREFILL[1], marks=pytest.mark.long)])
@pytest.mark.parametrize("known", [0, 5, 16, 31])
def test_padding_is_never_written(width, known):
    ids, config = arrays("golden")["ids"], golden_config()
    before = caches.empty(config, 256)
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


@pytest.mark.long
def test_a_full_context_drops_what_does_not_fit():
    """Past the capacity only the spare row may change: a clamped write would overwrite the last good one."""
    ids, capacity = arrays("golden")["ids"], 64
    cache = caches.empty(golden_config(), capacity)
    cache = extended(cache, ids[:capacity], 128)
    rows = [jnp.copy(layer.compressor.rows) for layer in cache.layers if layer.compressor]
    assert any(np.abs(row[0, -2]).max() > 0 for row in rows)
    after = extended(cache, ids[capacity : capacity + 32], 32)
    for old, layer in zip(rows, (layer for layer in after.layers if layer.compressor), strict=True):
        assert_bits_equal(layer.compressor.rows[0, :-1], old[0, :-1])


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def positions(start: jax.Array, width: int, count: int, size: int) -> tuple[jax.Array, jax.Array]:
    return caches.held_positions(size, Rows.following(start, width, count))


@given(st.integers(0, 600), st.integers(1, 40), st.integers(1, 40))
def test_ring_positions(start, width, size):
    """The ring holds the latest position of each slot, and the call's live rows follow."""
    count = max(width - 2, 1)
    position, sequence = map(np.asarray, positions(jnp.int32(start), width, count, size))
    expected = [max((q for q in range(start) if q % size == slot), default=-1) for slot in range(size)]
    np.testing.assert_array_equal(position[:size], expected)
    np.testing.assert_array_equal(position[size : size + count], np.arange(start, start + count))
    np.testing.assert_array_equal(position[size + count :], -1)
    np.testing.assert_array_equal(sequence, 0)


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


def test_a_known_step_updates_the_caches_in_place():
    """Every cache array that goes into a compiled call comes out in the same memory."""
    model = golden_model()
    held = caches.empty(model.config, 512), caches.empty_mtp(model.config, 512)
    ids, one = jnp.zeros(1, jnp.int32), jnp.int32(1)
    with jax.default_matmul_precision("highest"):
        lowered = extend.__wrapped__.lower(model.graph, model.weights, *held, ids, ids, one, one, strict=False, want_logits=True)
    memory = lowered.compile().memory_analysis()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(held))
    assert memory.alias_size_in_bytes >= size

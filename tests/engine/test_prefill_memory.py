"""Memory of a prefill call on a CPU: the plan bounds it, scores are sliced, and the chunk follows the free memory."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numerics import assert_bits_equal

from ds4jax.bounds import WORKING_BYTES
from ds4jax.cache import state as caches
from ds4jax.cache.capacity import PREFILL
from ds4jax.cache.state import LayerCache, Rows
from ds4jax.config import Config
from ds4jax.device import DeviceMemory
from ds4jax.engine import prefill
from ds4jax.model import row_slices
from ds4jax.model.attention import Attention

CONFIG = Config(
    vocab_size=1024, dim=256, n_layers=1, n_heads=8, head_dim=64, rope_dim=32, q_lora_rank=128, o_groups=4, o_lora_rank=64,
    n_experts=8, n_active=2, moe_dim=96, n_hash_layers=0, compress_ratios=(4,), n_mtp=0, index_heads=4, index_dim=32,
    index_topk=32, qat=False,
)  # fmt: skip
ROWS = PREFILL[-1]


def attend(
    graph: nnx.GraphDef, weights: nnx.State, x_TD: jax.Array, start_B: jax.Array, cache: LayerCache
) -> tuple[jax.Array, LayerCache]:
    """Attention of a call's rows, all real, after `start` rows of the cache."""
    out: tuple[jax.Array, LayerCache] = nnx.merge(graph, weights)(x_TD, Rows.following(start_B, len(x_TD), len(x_TD)), cache)
    return out


@functools.cache
def attention_bytes(capacity: int) -> int:
    """Temporary bytes of the attention of `ROWS` rows, as XLA counts them."""
    graph, weights = nnx.split(nnx.eval_shape(lambda: Attention(CONFIG, 4, rngs=nnx.Rngs(0))))
    cache = jax.eval_shape(lambda: caches.empty(CONFIG, capacity).layers[0])
    x_TD, start_B = jax.ShapeDtypeStruct((ROWS, CONFIG.dim), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    lowered = jax.jit(attend, static_argnums=0, donate_argnums=4).lower(graph, weights, x_TD, start_B, cache)
    return int(lowered.compile().memory_analysis().temp_size_in_bytes)


def attention_planned(capacity: int) -> int:
    """The part of the plan that depends on the cache's capacity, and the queries."""
    bytes_at = functools.partial(prefill.call_bytes, CONFIG, ROWS, kernels=False)
    return bytes_at(capacity) - bytes_at(0) + ROWS * CONFIG.n_heads * CONFIG.head_dim * 10


@pytest.mark.parametrize("capacity", [pytest.param(1 << 14, marks=pytest.mark.long), 1 << 17])
def test_the_plan_bounds_the_memory_of_attention(capacity: int) -> None:
    assert attention_bytes(capacity) <= attention_planned(capacity)


def test_scores_of_a_long_cache_are_sliced() -> None:
    assert row_slices.slice_rows(CONFIG, ROWS, 1 << 12) == ROWS
    assert attention_bytes(1 << 17) < row_slices.score_bytes(CONFIG, ROWS, (1 << 17) // 4)
    working = prefill.call_bytes(CONFIG, ROWS, 1 << 20, kernels=False)
    assert working < WORKING_BYTES


@pytest.mark.long
def test_slices_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)

    def values(shapes: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.asarray(0.1 * random.standard_normal(leaf.shape), leaf.dtype), shapes)

    graph, weights = nnx.split(nnx.eval_shape(lambda: Attention(CONFIG, 4, rngs=nnx.Rngs(0))))
    shapes = weights, jnp.zeros((64, CONFIG.dim)), caches.empty(CONFIG, 256).layers[0]
    weights, x_TD, cache = values(shapes)

    def output() -> np.ndarray:
        # A new function: jit keeps the program of an old one, whatever the bound is now.
        call = jax.jit(functools.partial(attend, graph))
        return np.asarray(call(weights, x_TD, jnp.full(1, 100, jnp.int32), cache)[0])

    expected, sliced = output(), []
    monkeypatch.setattr(row_slices, "MAX_SCORE_BYTES", row_slices.score_bytes(CONFIG, 16, 400))
    monkeypatch.setattr(jax.lax, "map", lambda *arguments, map=jax.lax.map: sliced.append(1) or map(*arguments))
    assert_bits_equal(output(), expected)
    assert sliced


def test_the_chunk_of_a_cpu_follows_memory_and_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    config, short, long = Config(), 1 << 12, 1 << 20
    free = prefill.call_bytes(config, ROWS, short, kernels=False)
    assert prefill.chunk_for(config, short, free, kernels=False) == ROWS
    assert prefill.chunk_for(config, long, free, kernels=False) < ROWS
    assert prefill.chunk_for(config, short, 1 << 40, kernels=False) == ROWS
    assert prefill.chunk_for(config, short, 0, kernels=False) == PREFILL[0]
    monkeypatch.setattr(prefill, "host_memory", lambda: DeviceMemory(4 * free, 3 * free, None))
    assert prefill.chunk_here(config, short, free) == ROWS
    monkeypatch.setattr(prefill, "host_memory", lambda: DeviceMemory(4 * free, 3 * free + 1, None))
    assert prefill.chunk_here(config, short, free) < ROWS
    monkeypatch.setattr(prefill, "host_memory", lambda: DeviceMemory(4 * free, 0, None))
    assert prefill.chunk_here(config, short, 3 * free + 1) < ROWS

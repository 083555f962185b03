"""Decode steps of many rows by the decode kernels: each sequence has the bits that it has alone."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import executed_calls, lowered_for_cuda
from flax import nnx
from numerics import assert_bits_equal

from ds4jax.bench.programs import Program, arguments, randomised
from ds4jax.cache import state as caches
from ds4jax.cache.state import Rows
from ds4jax.config import Config
from ds4jax.decode import loop as decode
from ds4jax.model import decode_kernels, paths
from ds4jax.model.parameters import build
from ds4jax.model.transformer import Transformer
from ds4jax.random_models import checkpoint as synthetic
from ds4jax.random_models import layouts
from pallas_kernels.core.limits import STEP_ROWS
from pallas_kernels.experts import decode as experts
from pallas_kernels.experts import many_rows
from pallas_kernels.linear.q8_matmul import NAME as SHARE_WARP

CAPACITY = 512


def sequence(config: Config, s: int, width: int, last: int) -> tuple[Any, ...]:
    """Streams, tokens, rows before the call, live rows and cache of sequence s, whatever runs beside it."""
    h_TND = synthetic.spread_numbers((width, config.hc_mult, config.dim), jnp.dtype("float32"), 1.0, jnp.uint32(s))
    ids = np.arange(width, dtype=np.int32) + 3 * s
    # Some close a block, and some have a clone.
    start, count = np.array([last - 17 * s % 224], np.int32), np.array([width - s % 2 * (width > 1)], np.int32)
    return h_TND, ids, start, count, randomised(caches.empty(config, 2 * (last + 1), slack=width).layers, f"sequence {s}")


def check_each_alone(
    layout: str, config: Config, size: int, width: int, alone: range, *, last: int = 255, interpret: bool
) -> None:
    """A step of `size` sequences of `width` rows, from position `last` at most, against the steps of the sequences `alone`."""
    graph, weights = nnx.split(list(synthetic.synthetic(synthetic.checkpoint(config, layout)).layers))
    each = [sequence(config, s, width, last) for s in range(size)]
    together = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *each)

    @jax.jit
    def step(weights: Any, h_TND: jax.Array, ids: jax.Array, start: jax.Array, count: jax.Array, held: Any) -> Any:
        rows, blocks = Rows.step(start, width, count), nnx.merge(graph, weights)
        assert paths.why_not_step(config, map(decode_kernels.weights_of, blocks), rows, held) is None
        with jax.default_matmul_precision("highest"):
            return decode_kernels.layers(config, blocks, h_TND, ids, rows, held, interpret=interpret)[:2]

    streams, made = step(weights, *together)
    assert np.isfinite(streams).all()
    for s in alone:
        own, own_made = step(weights, *each[s])
        live = int(each[s][3][0])
        assert_bits_equal(streams[s * width : s * width + live], own[:live])
        for array, one in zip(jax.tree.leaves(made), jax.tree.leaves(own_made), strict=True):
            assert_bits_equal(array[s : s + 1], one)


def abstract(layout: str, config: Config) -> Transformer:
    """The model with shapes and types for values."""
    tensors = synthetic.checkpoint(config, layout).tensors
    return build(config, ((tensor.name, jax.eval_shape(tensor.read)) for tensor in tensors))


def small(ratio: int, **fields: Any) -> Config:
    fields = {"n_layers": 1, "n_hash_layers": 0, "compress_ratios": (ratio, 0), **fields}
    return dataclasses.replace(layouts.SMALL_Q2, **fields)


@pytest.mark.parametrize(
    ("ratio", "size", "width"),
    [
        pytest.param(4, 9, 1, marks=pytest.mark.long),
        pytest.param(128, 5, 3, marks=pytest.mark.slow),
        pytest.param(4, 16, 1, marks=pytest.mark.slow),
        pytest.param(0, 16, 1, marks=pytest.mark.long),
        pytest.param(0, 16, 2, marks=pytest.mark.slow),
        pytest.param(4, 32, 1, marks=pytest.mark.slow),
    ],
)
def test_each_sequence_has_the_bits_it_has_alone(ratio: int, size: int, width: int) -> None:
    check_each_alone("small-q2", small(ratio), size, width, range(0, size, 4), interpret=True)


@pytest.mark.long
def test_a_loop_of_sixteen_sequences_runs_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product of the lowered step, the head's too, is a launch of sixteen rows."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    config, program = dataclasses.replace(layouts.SMALL_Q2, n_layers=3), Program(0, sequences=16)
    graph, weights = nnx.split(abstract("small-q2", config))
    state = jax.eval_shape(lambda: decode.start(config, CAPACITY, [0] * 16, drafter=None, max_draft=0))

    def fresh(*arguments: Any, **options: Any) -> Any:
        return decode.run.__wrapped__.__wrapped__(*arguments, **options)  # type: ignore[attr-defined]

    jitted = jax.jit(fresh, static_argnums=0, static_argnames=("strict", "drafter", "max_draft"))
    options = {"strict": False, "drafter": None, "max_draft": 0}
    text = lowered_for_cuda(jitted, graph, weights, state, *arguments(program, 1, 0), **options)
    expected = {SHARE_WARP: 6 * 3 + 1, many_rows.GATE_UP: 3}
    assert {name: executed_calls(text, name) for name in expected} == expected
    assert set(re.findall(rf"{SHARE_WARP}\w*?_m(\d+)", text)) == {"16"}


@pytest.mark.gpu
@pytest.mark.parametrize(("size", "width"), [(3, 3), (16, 1), (32, 1), (21, 3), (STEP_ROWS, 1)])
def test_v4_flash_on_the_gpu(size: int, width: int) -> None:
    """A layer of each kind at the published widths. The indexer chooses 512 of up to 768 blocks, the router the experts."""
    config = dataclasses.replace(layouts.LAYOUTS["flash-q2"].config, n_layers=3, n_hash_layers=0, compress_ratios=(0, 4, 128, 0))
    check_each_alone("flash-q2", config, size, width, range(0, size, 5), last=3071, interpret=False)


@pytest.mark.long
@pytest.mark.parametrize("rows", [16, 32])
def test_a_layer_of_v4_flash_lowers(rows: int) -> None:
    """As many launches as for one row. Programs hold eight rows."""
    config = dataclasses.replace(layouts.LAYOUTS["flash-q2"].config, n_layers=1, n_hash_layers=0, compress_ratios=(4, 0))
    graph, weights = nnx.split(abstract("flash-q2", config))
    held = jax.eval_shape(lambda: caches.empty(config, 2048, sequences=rows).layers)
    h_TND = jax.ShapeDtypeStruct((rows, config.hc_mult, config.dim), jnp.float32)
    numbers = jax.ShapeDtypeStruct((rows,), jnp.int32)

    def layers(weights: nnx.State, h_TND: jax.Array, start: jax.Array, held: Any) -> Any:
        blocks = list(nnx.merge(graph, weights).layers)
        return decode_kernels.layers(config, blocks, h_TND, start, Rows.step(start, 1, jnp.ones_like(start)), held)

    text = lowered_for_cuda(jax.jit(layers), weights, h_TND, numbers, held)
    expected = {SHARE_WARP: 6, many_rows.GATE_UP: 1, experts.DOWN: 1}
    assert {name: executed_calls(text, name) for name in expected} == expected

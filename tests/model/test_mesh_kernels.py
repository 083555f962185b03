"""Kernels inside `shard_map`: a decode step and a prefill of V4-Flash's shapes, cut over two GPUs, lowered without any."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cuda import exchanging, executed_calls, gpus, lowered_for_cuda

from ds4jax.config import Config
from ds4jax.decode import loop as decode
from ds4jax.decode import slots
from ds4jax.decode.depth import Policy
from ds4jax.decode.groups import GROUPS, placed_shapes
from ds4jax.decode.loop import Limits
from ds4jax.decode.masks import Mask
from ds4jax.decode.module import Graph, flat
from ds4jax.decode.sampling import Filters, Sampling
from ds4jax.decode.width import ROOM
from ds4jax.loading.cuts import cut_names, gathers
from ds4jax.loading.placement import Placement
from ds4jax.model.parameters import build
from ds4jax.random_models import checkpoint as synthetic
from pallas_kernels.attention import decode as attention
from pallas_kernels.experts import decode as experts
from pallas_kernels.experts import prefill as grouped
from pallas_kernels.linear.cut import AXIS

# A layer of each kind, so that each jitted layer stands once in the text.
FLASH = dataclasses.replace(Config(), n_layers=3, n_hash_layers=1, compress_ratios=(0, 4, 128), n_mtp=0)
# After o_a, o_b, the hidden values and the outputs of the experts.
A_LAYER = 4
# Of the embedding and of the logits.
ENDS = 2
# Two groups of two devices, each by itself, as `exchanging` says it.
WITHIN = {"[[0, 1], [2, 3]]"}, {AXIS}
REDUCTIONS = ("all_reduce", "reduce_scatter", "all_to_all", "collective_permute", "collective_broadcast")


def cut_model(devices: int, in_groups: int = 1) -> tuple[Graph, tuple[Any, ...]]:
    """The model over a mesh that needs no devices: so many of them, in each of so many groups."""
    axes = {GROUPS: in_groups, AXIS: devices} if in_groups > 1 else {AXIS: devices}
    placement = Placement(gpus(**axes), cut_names(FLASH, devices))
    tensors = synthetic.checkpoint(FLASH, "flash-q2").tensors
    model = build(FLASH, ((tensor.name, placement.abstract(tensor.name, tensor.abstract)) for tensor in tensors))
    graph, weights = Graph.split(model)
    return graph, flat(weights)


def exchanges(text: str) -> int:
    assert not any(f"stablehlo.{name}" in text for name in REDUCTIONS)
    return text.count("stablehlo.all_gather")


@pytest.mark.parametrize("devices", [2, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.long
def test_a_step_of_two_gpus(devices: int) -> None:
    graph, weights = cut_model(devices)
    state = jax.eval_shape(lambda: decode.start(FLASH, 512, [0], drafter=None, max_draft=0))
    policy = Policy(jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.float32))
    arguments = (graph, weights, state, Limits.of([1], [1], [[0]]), Filters.of([Sampling()]), policy)
    text = lowered_for_cuda(decode.run.__wrapped__, *arguments, drafter=None, max_draft=0, strict=False)
    expected = {experts.GATE_UP: 3, experts.DOWN: 3, attention.SPLIT_NAME: 3}
    assert {name: executed_calls(text, name) for name in expected} == expected
    assert exchanges(text) == gathers(FLASH, devices) == A_LAYER * FLASH.n_layers + ENDS


@pytest.mark.parametrize("devices", [2, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.long
def test_a_call_of_slots_on_two_groups(devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each group makes the launches of its own two slots, and gathers among its own devices alone."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    graph, weights = cut_model(devices, in_groups=2)
    empty = jax.eval_shape(lambda: decode.start(FLASH, 512, [0] * 4, drafter=None, max_draft=0))
    state = placed_shapes(empty, graph.mesh)
    arguments = (graph, weights, state, slots.Asked.none(4, (1.0,)), Mask.none(4, FLASH.vocab_size), jnp.int32(1))
    text = lowered_for_cuda(slots.call.__wrapped__, *arguments, drafter=None, max_draft=0, strict=False)
    expected = {experts.GATE_UP: 3, experts.DOWN: 3, attention.SPLIT_NAME: 3}
    assert {name: executed_calls(text, name) for name in expected} == expected
    assert exchanges(text) == (gathers(FLASH, devices) if devices > 1 else 0)
    assert exchanging(text) in (WITHIN if devices > 1 else (set(),))
    # The window's ring of two slots, in a program of four.
    ring = rf"tensor<(\d)x{FLASH.window + ROOM}x{FLASH.head_dim}xf32>"
    launches = [line for line in text.splitlines() if "@__gpu$xla.gpu.triton" in line]
    assert {count for line in launches for count in re.findall(ring, line)} == {"2"}


@pytest.mark.long
def test_a_prefill_of_slots_on_two_groups() -> None:
    """All groups compute the rows and gather as one group alone would; nothing crosses."""
    graph, weights = cut_model(2, in_groups=2)
    state = placed_shapes(jax.eval_shape(lambda: decode.start(FLASH, 1024, [0] * 2, drafter=None, max_draft=0)), graph.mesh)
    ids = jax.ShapeDtypeStruct((512,), jnp.int32)
    arguments = (graph, weights, state.cache, None, ids, ids, jnp.int32(512), jnp.int32(1))
    text = lowered_for_cuda(slots.prefill.__wrapped__, *arguments, drafter=None, strict=False)
    assert {name: executed_calls(text, name) for name in (grouped.GATE_UP, grouped.DOWN)} == {grouped.GATE_UP: 2, grouped.DOWN: 2}
    assert exchanges(text) == (A_LAYER + 1) * 2 + 1
    assert exchanging(text) in WITHIN


@pytest.mark.long
def test_a_prefill_of_two_gpus() -> None:
    graph, weights = cut_model(2)
    state = jax.eval_shape(lambda: decode.start(FLASH, 1024, [0], drafter=None, max_draft=0))
    ids = jax.ShapeDtypeStruct((512,), jnp.int32)
    arguments = (graph, weights, state.cache, None, ids, ids, jnp.int32(512))
    text = lowered_for_cuda(decode.prefill.__wrapped__, *arguments, drafter=None, strict=False)
    # The last layer's outputs are not used.
    expected = {grouped.GATE_UP: 2, grouped.DOWN: 2}
    assert {name: executed_calls(text, name) for name in expected} == expected
    # The shared expert's hidden values are gathered apart from the routed ones.
    assert exchanges(text) == (A_LAYER + 1) * 2 + 1


def test_a_cut_model_has_programs_of_its_own() -> None:
    """The graph is part of the key of every program that holds weights, in a process and on disk."""
    abstract = ((tensor.name, tensor.abstract) for tensor in synthetic.checkpoint(FLASH, "flash-q2").tensors)
    graphs = [Graph.split(build(FLASH, abstract))[0], cut_model(2)[0], cut_model(4)[0], cut_model(4)[0]]
    assert graphs[0].mesh is None
    assert len(set(graphs)) == len({graph.text for graph in graphs}) == 3

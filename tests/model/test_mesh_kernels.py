"""Kernels inside `shard_map`: a decode step and a prefill of V4-Flash's shapes, cut over two GPUs, lowered without any."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cuda import exchanging, executed_calls, gpus, kernel_calls, lowered_for_cuda
from jax.sharding import NamedSharding
from mesh_steps import FLASH, cut_model, lowered_step

from ds4jax.bench.exchanges import CUT, chain_of, of_step
from ds4jax.decode import loop as decode
from ds4jax.decode import slots
from ds4jax.decode.drafters.mtp import MTPDrafter
from ds4jax.decode.drafters.ngram import NgramDrafter
from ds4jax.decode.groups import placed_shapes
from ds4jax.decode.masks import Mask
from ds4jax.decode.module import MAIL_SPECS, Graph
from ds4jax.decode.width import ROOM
from ds4jax.loading.cuts import gathers
from ds4jax.model.parameters import build
from ds4jax.random_models import checkpoint as synthetic
from pallas_kernels.attention import decode as attention
from pallas_kernels.core.limits import STEP_ROWS
from pallas_kernels.experts import decode as experts
from pallas_kernels.experts import many_rows
from pallas_kernels.experts import prefill as grouped
from pallas_kernels.linear import mailbox_gather
from pallas_kernels.linear.cut import AXIS

# After o_a, o_b, the hidden values and the outputs of the experts.
A_LAYER = 4
# Of the embedding and of the logits.
ENDS = 2


@dataclasses.dataclass(frozen=True)
class Foreign(NgramDrafter):
    """A drafter that the gate does not know."""


# Two groups of two devices, each by itself, as `exchanging` says it.
WITHIN = {"[[0, 1], [2, 3]]"}, {AXIS}
REDUCTIONS = ("all_reduce", "reduce_scatter", "all_to_all", "collective_permute", "collective_broadcast")


# Of the MTP block: the next token's embedding, the block's input, its layer, and the logits of its drafts.
A_COMMIT, A_DRAFT = 2 + A_LAYER, 1


def exchanges(text: str) -> int:
    assert not any(f"stablehlo.{name}" in text for name in REDUCTIONS)
    return text.count("stablehlo.all_gather")


def by_mail(text: str) -> int:
    return executed_calls(text, mailbox_gather.NAME)


def gathered_values(text: str) -> list[int]:
    """How many values each gather brings together, sorted."""
    shapes = re.findall(r'"stablehlo\.all_gather".*-> tensor<([\dx]+)xf32>', text)
    return sorted(math.prod(map(int, shape.split("x"))) for shape in shapes)


@pytest.mark.parametrize("devices", [2, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.long
def test_a_step_of_two_gpus(devices: int) -> None:
    text = lowered_step(devices, mail=False)
    expected = {many_rows.GATE_UP: 3, experts.DOWN: 3, attention.SPLIT_NAME: 3}
    assert {name: executed_calls(text, name) for name in expected} == expected
    assert exchanges(text) == gathers(FLASH, devices) == A_LAYER * FLASH.n_layers + ENDS
    assert by_mail(text) == executed_calls(text, mailbox_gather.LOST_NAME) == 0
    # The benchmark times gathers of these sizes.
    sizes = [one.floats for one in of_step(FLASH, devices) for _ in range(FLASH.n_layers if one.layers else 1)]
    assert gathered_values(text) == sorted(sizes)


@pytest.mark.parametrize("devices", [2, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.long
def test_a_step_by_mailboxes(devices: int) -> None:
    """Each gather is a kernel, none is a collective, and the step ends with a look at what is missing."""
    text = lowered_step(devices, mail=True)
    assert exchanges(text) == 0
    assert by_mail(text) == gathers(FLASH, devices)
    assert executed_calls(text, mailbox_gather.LOST_NAME) == 1


@pytest.mark.long
def test_a_step_of_the_mtp_block_by_mailboxes() -> None:
    """One draft, and the committed rows through the block."""
    config = dataclasses.replace(FLASH, n_mtp=1, compress_ratios=(0, 4, 128, 0))
    text = lowered_step(2, config, mail=True, drafter=MTPDrafter(), drafts=1)
    assert exchanges(text) == 0
    assert by_mail(text) == gathers(config, 2) + A_COMMIT + A_DRAFT


@pytest.mark.parametrize(
    "how",
    [
        {"strict": True},
        {"sequences": STEP_ROWS + 1},
        {"drafter": Foreign(), "drafts": 1},
    ],
)
@pytest.mark.long
def test_steps_that_go_by_collectives_all_the_same(how: dict[str, Any]) -> None:
    text = lowered_step(2, mail=True, **how)
    assert exchanges(text) > ENDS
    assert by_mail(text) == executed_calls(text, mailbox_gather.LOST_NAME) == 0


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
    expected = {many_rows.GATE_UP: 3, experts.DOWN: 3, attention.SPLIT_NAME: 3}
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
    graph, weights = cut_model(2, mail=True)
    state = jax.eval_shape(lambda: decode.start(FLASH, 1024, [0], drafter=None, max_draft=0))
    ids = jax.ShapeDtypeStruct((512,), jnp.int32)
    arguments = (graph, weights, state.cache, None, ids, ids, jnp.int32(512))
    text = lowered_for_cuda(decode.prefill.__wrapped__, *arguments, drafter=None, strict=False)
    # The last layer's outputs are not used.
    expected = {grouped.GATE_UP: 2, grouped.DOWN: 2}
    assert {name: executed_calls(text, name) for name in expected} == expected
    assert by_mail(text) == 0
    # The shared expert's hidden values are gathered apart from the routed ones.
    assert exchanges(text) == (A_LAYER + 1) * 2 + 1


def test_a_cut_model_has_programs_of_its_own() -> None:
    """The graph is part of the key of every program that holds weights, in a process and on disk."""
    abstract = ((tensor.name, tensor.abstract) for tensor in synthetic.checkpoint(FLASH, "flash-q2").tensors)
    graphs = [Graph.split(build(FLASH, abstract))[0], *(cut_model(count)[0] for count in (2, 4, 4)), cut_model(4, mail=True)[0]]
    assert graphs[0].mesh is None
    assert len(set(graphs)) == len({graph.text for graph in graphs}) == 4


@pytest.mark.parametrize("words", [0, 4096])
def test_a_chain_of_gathers_of_two_gpus(words: int) -> None:
    """What the benchmark times: as many gathers as it says, in one way alone."""
    mesh, links, number = gpus(**{AXIS: 2}), 3, jnp.int32
    placed = jax.ShapeDtypeStruct((1, 4096), jnp.float32, sharding=NamedSharding(mesh, CUT))
    boxes = [
        jax.ShapeDtypeStruct(shape, number, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(((2, 2), (2,)), MAIL_SPECS, strict=True)
    ]
    text = lowered_for_cuda(chain_of(mesh, 4096, links, words), placed, *(boxes if words else ()))
    assert (exchanges(text), kernel_calls(text, mailbox_gather.NAME)) == ((0, links) if words else (links, 0))

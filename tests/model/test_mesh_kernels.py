"""Kernels inside `shard_map`: a decode step and a prefill of V4-Flash's shapes, cut over two GPUs, lowered without any."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cuda import executed_calls, lowered_for_cuda
from mesh_steps import FLASH, cut_model, lowered_step

from ds4jax.decode import loop as decode
from ds4jax.decode.drafters.mtp import MTPDrafter
from ds4jax.decode.drafters.ngram import NgramDrafter
from ds4jax.decode.module import Graph
from ds4jax.loading.cuts import gathers
from ds4jax.model.parameters import build
from ds4jax.random_models import checkpoint as synthetic
from pallas_kernels.attention import decode as attention
from pallas_kernels.core.limits import STEP_ROWS
from pallas_kernels.experts import decode as experts
from pallas_kernels.experts import prefill as grouped
from pallas_kernels.linear import mailbox_gather

# After o_a, o_b, the hidden values and the outputs of the experts.
A_LAYER = 4
# Of the embedding and of the logits.
ENDS = 2


@dataclasses.dataclass(frozen=True)
class Foreign(NgramDrafter):
    """A drafter that the gate does not know."""


REDUCTIONS = ("all_reduce", "reduce_scatter", "all_to_all", "collective_permute", "collective_broadcast")


# Of the MTP block: the next token's embedding, the block's input, its layer, and the logits of its drafts.
A_COMMIT, A_DRAFT = 2 + A_LAYER, 1


def exchanges(text: str) -> int:
    assert not any(f"stablehlo.{name}" in text for name in REDUCTIONS)
    return text.count("stablehlo.all_gather")


def by_mail(text: str) -> int:
    return executed_calls(text, mailbox_gather.NAME)


@pytest.mark.parametrize("devices", [2, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.long
def test_a_step_of_two_gpus(devices: int) -> None:
    text = lowered_step(devices, mail=False)
    expected = {experts.GATE_UP: 3, experts.DOWN: 3, attention.SPLIT_NAME: 3}
    assert {name: executed_calls(text, name) for name in expected} == expected
    assert exchanges(text) == gathers(FLASH, devices) == A_LAYER * FLASH.n_layers + ENDS
    assert by_mail(text) == executed_calls(text, mailbox_gather.LOST_NAME) == 0


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

"""Two sequences in one step by the decode kernels of a GPU: each says what it says alone, bit for bit."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numerics import assert_bits_equal

from ds4jax.bounds import NO_STOP
from ds4jax.cache.capacity import padded
from ds4jax.cache.state import Rows
from ds4jax.decode import loop as decode
from ds4jax.decode.depth import Policy
from ds4jax.decode.drafters.mtp import MTPDrafter
from ds4jax.decode.loop import DecodeState, Limits
from ds4jax.decode.sampling import Filters, Sampling
from ds4jax.decode.width import step_rows
from ds4jax.language_model import LanguageModel
from ds4jax.model import paths
from ds4jax.model.decode_kernels import weights_of
from ds4jax.random_models import checkpoint as random_models
from ds4jax.random_models import layouts

pytestmark = pytest.mark.gpu

TOKENS, CAPACITY, WIDTH = 48, 512, 128
LENGTHS, DEPTHS = (127, 31), (0, 2)


@functools.cache
def model() -> LanguageModel:
    whole = random_models.checkpoint(layouts.SMALL_Q2, "small-q2")
    return LanguageModel(random_models.synthetic(whole), None, max_draft=2)


def said(chosen: tuple[int, ...]) -> DecodeState:
    """The state after these of the two sequences have said their tokens; the others are free."""
    mine, drafter = model(), MTPDrafter()
    prompts = [np.random.default_rng(i).integers(0, 640, length).astype(np.int32) for i, length in enumerate(LENGTHS)]
    state = decode.start(mine.config, CAPACITY, [int(ids[-1]) for ids in prompts], drafter=drafter, max_draft=2)
    cache, drafting = state.cache, state.drafting
    for slot in chosen:
        ids, count = prompts[slot], jnp.int32(LENGTHS[slot] - 1)
        chunk, following = padded(ids, 0, WIDTH), padded(ids, 1, WIDTH)
        cache, drafting = decode.prefill(
            mine.graph, mine.weights, cache, drafting, chunk, following, count, jnp.int32(slot), drafter=drafter, strict=False
        )
    state = jax.tree.map(jnp.copy, DecodeState(**{**vars(state), "cache": cache, "drafting": drafting}))
    goals = [TOKENS * (i in chosen) for i in range(2)]
    limits, filters = Limits.of(goals, goals, [[NO_STOP]] * 2), Filters.of([Sampling(), Sampling(0.8, seed=7)])
    policy = Policy(jnp.array(DEPTHS, jnp.int32), jnp.ones(3, jnp.float32))
    options = {"drafter": drafter, "max_draft": 2, "strict": False}
    state, _ = decode.run(mine.graph, mine.weights, state, limits, filters, policy, **options)
    return state


def test_each_says_what_it_says_alone() -> None:
    together = said((0, 1))
    width = step_rows(2, 2)
    rows = Rows.step(jnp.zeros(2, jnp.int32), width, jnp.ones(2, jnp.int32))
    blocks = map(weights_of, nnx.merge(model().graph, model().weights).layers)
    assert paths.why_not_step(model().config, blocks, rows, together.cache.layers) is None
    assert together.count.tolist() == [TOKENS, TOKENS]
    for sequence in (0, 1):
        alone = said((sequence,))
        for left, right in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            assert_bits_equal(left[sequence : sequence + 1], right[sequence : sequence + 1])

"""DSpark's drafts at temperatures above 0: committed tokens follow the joint law of plain sampling, filters and all."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import LEAST_P, overlaid, p_value
from flax import nnx

from ds4jax.bounds import NO_STOP
from ds4jax.cache.capacity import PREFILL, padded
from ds4jax.config import Config
from ds4jax.decode import loop as decode
from ds4jax.decode.depth import AUTO, Policy
from ds4jax.decode.drafters import dspark
from ds4jax.decode.drafters.dspark import DSparkDrafter, Slot
from ds4jax.decode.loop import DecodeState, Limits
from ds4jax.decode.sampling import Sampling, filtered
from ds4jax.language_model import LanguageModel
from ds4jax.model.transformer import Transformer

V, BLOCK, LENGTH = 8, 3, 3
DRAWS, AT_ONCE, CAPACITY = 20_000, 500, 64
PROMPT = (0, 5, 2, 7, 3, 3, 6)
# Two layers, one with compressed rows and an indexer, and two stages.
TINY = Config(
    vocab_size=V, dim=32, n_layers=2, n_heads=4, head_dim=16, rope_dim=8, q_lora_rank=16, o_groups=2, o_lora_rank=16, window=8,
    n_experts=4, n_active=2, moe_dim=16, n_hash_layers=0, compress_ratios=(0, 4), n_mtp=0, n_dspark=2, dspark_block=BLOCK,
    dspark_layers=(0, 1), dspark_noise_id=4, dspark_rank=8, index_heads=2, index_dim=8, index_topk=4, max_context=CAPACITY,
    qat=False,
)  # fmt: skip
# Logits are spread so that both a low and an ordinary temperature leave several continuations.
SPREAD = 0.15
SAMPLINGS = {
    "top-p with min-p": Sampling(0.2, top_p=0.9, min_p=0.1),
    "T = 0.05": Sampling(0.05),
    "top-k with top-p with min-p at T = 0.05": Sampling(0.05, top_k=6, top_p=0.95, min_p=0.02),
}


@functools.cache
def model() -> LanguageModel:
    """Random weights; the drafts are about as good as chance, and the token before changes them."""
    made = Transformer(TINY, rngs=nnx.Rngs(3))
    before_VR = made.dspark.markov_w1.weight
    before_VR.set_value(before_VR.get_value() / jnp.std(before_VR.get_value()))
    for linear in (made.head, made.dspark.markov_w2):
        linear.weight.set_value(SPREAD * linear.weight.get_value())
    return LanguageModel(made, None)


@functools.cache
def logits() -> dict[tuple[int, ...], np.ndarray]:
    """The model's logits [V] after the prompt and each possible continuation of up to two tokens, by plain forward passes."""
    ends = [end for count in range(LENGTH) for end in itertools.product(range(V), repeat=count)]
    return {end: model().logits((*PROMPT, *end), strict=True)["logits"][-1] for end in ends}


def joint(sampling: Sampling) -> np.ndarray:
    """Probabilities [V, V, V] of three tokens after the prompt."""
    ends = logits()
    plain = jax.vmap(filtered, in_axes=(0, None))(jnp.stack(list(ends.values())), sampling.arrays())
    p = {end: np.asarray(row, np.float64) for end, row in zip(ends, plain, strict=True)}
    made = np.zeros((V,) * LENGTH)
    for a, b in itertools.product(range(V), repeat=2):
        made[a, b] = p[()][a] * p[a,][b] * p[a, b]
    return made / made.sum()


@functools.cache
def prompted() -> DecodeState:
    """Many sequences after the prompt, which is taken into the cache once."""
    one, drafter, known = model(), DSparkDrafter(), len(PROMPT) - 1
    shape = {"drafter": drafter, "max_draft": BLOCK}
    alone = decode.start(TINY, CAPACITY, PROMPT[-1:], **shape)
    ids = (padded(np.array(PROMPT, np.int32), start, PREFILL[0]) for start in (0, 1))
    held = decode.prefill(
        one.graph, one.arrays, alone.cache, alone.drafting, *ids, jnp.int32(known), drafter=drafter, strict=True
    )
    many = decode.start(TINY, CAPACITY, [PROMPT[-1]] * AT_ONCE, **shape)

    def repeated(full: jax.Array, x: jax.Array) -> jax.Array:
        # More sequences may have smaller rings.
        return jnp.broadcast_to(x[:, : full.shape[1]] if x.ndim > 1 else x, full.shape)

    cache, drafting = jax.tree.map(repeated, (many.cache, many.drafting), held)
    return dataclasses.replace(many, cache=cache, drafting=drafting)


def drawn(sampling: Sampling, depth: int, run: Callable = decode.run) -> Iterator[DecodeState]:
    """Final states of all draws, some sequences at a time, each with a key of its own."""
    one = model()
    limits = Limits.of([LENGTH] * AT_ONCE, [CAPACITY] * AT_ONCE, [[NO_STOP]] * AT_ONCE)
    policy = Policy(jnp.full(AT_ONCE, depth, jnp.int32), jnp.array([1.0, 1.2, 1.4, 1.6], jnp.float32))
    filters = jax.tree.map(lambda x: jnp.broadcast_to(x, (AT_ONCE, *x.shape)), sampling.arrays())
    for keys in jax.random.split(jax.random.key(7), (DRAWS // AT_ONCE, AT_ONCE)):
        state = jax.tree.map(jnp.copy, prompted())
        asked = limits, dataclasses.replace(filters, key=keys), policy
        yield run(one.graph, one.arrays, state, *asked, drafter=DSparkDrafter(), max_draft=BLOCK, strict=True)[0]


def counted(ends: list[DecodeState]) -> np.ndarray:
    tokens = np.concatenate([np.asarray(end.tokens[:, :LENGTH]) for end in ends])
    return np.bincount(tokens @ [V * V, V, 1], minlength=V**LENGTH).reshape((V,) * LENGTH)


@pytest.mark.long
@pytest.mark.parametrize("depth", [BLOCK, AUTO], ids=["whole blocks", "auto"])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_three_tokens_follow_the_law_of_plain_sampling(name: str, depth: int) -> None:
    ends = list(drawn(SAMPLINGS[name], depth))
    tried, stood = (sum(np.asarray(getattr(end.acceptance, part)).sum(axis=0) for end in ends) for part in ("tried", "stood"))
    assert (0 < stood).all()
    assert (stood < 0.95 * tried).all(), "some drafts must fail"
    expected = joint(SAMPLINGS[name])
    assert (expected > 1e-3).sum() >= 20, "several continuations"
    assert p_value(counted(ends), expected) > LEAST_P


@pytest.mark.long
@pytest.mark.parametrize("name", ["top-p with min-p"])
def test_the_statistic_tells_drafts_whose_distribution_lacks_the_correction(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if q were the distribution of the block's logits before the token before corrects them."""
    right, sampling = dspark.slots, SAMPLINGS[name]

    def uncorrected(*asked: Any, **static: Any) -> Iterator[Slot]:
        for slot in right(*asked, **static):
            yield slot._replace(q=jax.vmap(filtered, in_axes=(0, None))(slot.base, sampling.arrays()))

    monkeypatch.setattr(dspark, "slots", uncorrected)
    # Not through `decode.run`, which keeps what it has compiled.
    run = jax.jit(inspect.unwrap(decode.run), static_argnames=("graph", "drafter", "max_draft", "strict"))
    observed = counted(list(drawn(sampling, BLOCK, run)))
    assert p_value(observed, overlaid(joint(sampling), observed)) < LEAST_P

"""Drafters that lie: whatever they propose, tokens and fingerprints are those of plain decode, and no foreign id is committed."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import arrays, assert_bits_equal, golden_transformer

from ds4jax.cache.state import Rows
from ds4jax.config import Config
from ds4jax.decode.drafter import Drafts
from ds4jax.decode.sampling import Filters, Sampling
from ds4jax.engine.options import Result
from ds4jax.language_model import LanguageModel
from ds4jax.model.transformer import Transformer

KINDS = ("right", "random", "nan row", "nan entry", "minus one", "vocabulary", "huge", "huge one-hot", "end in the middle")
DRAFTS, TOKENS = 7, 48


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LiarState:
    """The kind of lie, int32 [], and the true tokens by position, int32 [capacity]."""

    kind: jax.Array
    truth: jax.Array


@dataclasses.dataclass(frozen=True)
class Liar:
    """Proposes what `KINDS` says; the kind is traced, so that one program tells all lies."""

    def init(self, config: Config, capacity: int, rows: int, sequences: int) -> LiarState:
        return LiarState(jnp.int32(0), jnp.zeros(capacity + rows, jnp.int32))

    def draft(
        self, model: Transformer, state: LiarState, last_S: jax.Array, rows: Rows, depth_S: jax.Array, maximum: int,
        filters: Filters,
    ) -> tuple[Drafts, LiarState]:  # fmt: skip
        size = model.config.vocab_size
        place = jnp.arange(maximum, dtype=jnp.int32)
        truth_K = state.truth[rows.start[0] + 1 + place]
        random_K = (truth_K * 31 + rows.start[0] * 7 + place) % size
        # Right in front of the lie, so that it is read.
        lies = [truth_K, random_K, random_K, random_K] + [
            jnp.where(place == rows.start[0] % maximum, lie, truth_K) for lie in (-1, size, 2**30, 2**30, model.config.eos_id)
        ]
        tokens_K = jnp.stack(lies)[state.kind]
        uniform_KV = jnp.full((maximum, size), 1 / size, jnp.float32)
        one_hot_KV = jax.nn.one_hot(tokens_K % size, size, dtype=jnp.float32)
        nan_KV = jnp.full((maximum, size), jnp.nan, jnp.float32)
        entry_KV = uniform_KV.at[place, tokens_K % size].set(jnp.nan)
        q = [one_hot_KV, uniform_KV, nan_KV, entry_KV, uniform_KV, one_hot_KV, uniform_KV, one_hot_KV, uniform_KV]
        confidence_SK = jnp.full((1, maximum), jnp.nan, jnp.float32)
        return Drafts(tokens_K[None], jnp.stack(q)[state.kind][None], confidence_SK), state

    def commit(self, model: Transformer, state: LiarState, h_TND: jax.Array, next_ids_T: jax.Array, rows: Rows) -> LiarState:
        return state


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(golden_transformer(), None, max_draft=DRAFTS, drafter="none")


def told(model: LanguageModel, kind: str, truth: np.ndarray, **options: object) -> Result:
    """A continuation of the golden prompt with drafts of this kind."""
    prompt = arrays("golden")["ids"][:40]
    generation = model.stream(prompt, max_new_tokens=TOKENS, drafter=Liar(), ignore_eos=True, **options)
    state, known = generation.state, generation.state.drafting
    held = np.zeros(known.truth.shape, np.int32)
    held[40 : 40 + len(truth)] = truth
    lie = LiarState(jnp.int32(KINDS.index(kind)), jnp.asarray(held))
    generation._state = dataclasses.replace(state, drafting=lie)
    generation.advance(TOKENS)
    result = generation.result()
    assert all(0 <= token < model.config.vocab_size for token in result.ids)
    return result


@pytest.mark.long
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_lies_change_no_bit_of_greedy_text(model, strict):
    plain = told(model, "right", np.zeros(0, np.int32), draft=0, strict=strict)
    truth = np.array(plain.ids)
    for kind in KINDS:
        for draft in (1, 4, DRAFTS, "auto"):
            found = told(model, kind, truth, draft=draft, strict=strict)
            assert found.ids == plain.ids, (kind, draft)
            assert_bits_equal(found.fingerprints, plain.fingerprints)
            if kind == "right" and draft != "auto":
                assert found.steps == -(-TOKENS // (1 + draft))


@pytest.mark.long
def test_no_lie_commits_a_foreign_token(model):
    """Sampled: a draft that q calls impossible or that is no token is replaced by a draw from the model."""
    sampling = Sampling(0.05, top_p=0.9, min_p=0.02, seed=4)
    for kind in KINDS:
        found = told(model, kind, np.arange(TOKENS), draft=DRAFTS, sampling=sampling)
        assert len(found.ids) == TOKENS, kind

"""A drafter that makes the model's own drafts and can say what it was told instead, so that every acceptance can be forced.

One executable thus serves the times and the lossless check: the MTP block runs in both.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ds4jax.cache import Rows
from ds4jax.config import Config
from ds4jax.drafter import Drafter, Drafts, MTPDrafter
from ds4jax.model.transformer import Transformer
from ds4jax.sampling import Filters


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OracleState:
    """What the oracle carries.

    Attributes:
        inner: state of the drafter inside.
        truth: int32 [capacity + rows], the true tokens by position.
        told: bool, whether these are said.
        step: int32, steps so far; step s says s mod (K + 1) true tokens and a wrong one after them.
    """

    inner: Any
    truth: jax.Array
    told: jax.Array
    step: jax.Array


@dataclasses.dataclass(frozen=True)
class OracleDrafter:
    """Drafts with the MTP block, and where its state is told the truth says that, right for 0, 1, .. K drafts in turn."""

    inner: Drafter = dataclasses.field(default_factory=MTPDrafter)

    def init(self, config: Config, capacity: int, rows: int) -> OracleState:
        """A state that was told nothing."""
        inner = self.inner.init(config, capacity, rows)
        return OracleState(inner, jnp.zeros(capacity + rows, jnp.int32), jnp.array(False), jnp.int32(0))

    def draft(
        self, model: Transformer, state: OracleState, last: jax.Array, rows: Rows, depth: jax.Array, most: int, filters: Filters
    ) -> tuple[Drafts, OracleState]:
        """The inner drafter's tokens, replaced where the truth was told."""
        drafts, inner = self.inner.draft(model, state.inner, last, rows, depth, most, filters)
        index = jnp.arange(most, dtype=jnp.int32)
        truth = state.truth[rows.start[0] + 1 + index]
        said = jnp.where(index < state.step % (most + 1), truth, (truth + 1) % model.config.vocab_size)
        tokens = jnp.where(state.told, said, drafts.tokens)
        return Drafts(tokens, drafts.q), dataclasses.replace(state, inner=inner, step=state.step + 1)

    def commit(self, model: Transformer, state: OracleState, h_TND: jax.Array, next_ids_T: jax.Array, rows: Rows) -> OracleState:
        """The inner drafter learns as ever."""
        return dataclasses.replace(state, inner=self.inner.commit(model, state.inner, h_TND, next_ids_T, rows))

"""A drafter that runs another one and can replace its drafts with known tokens, so a caller can force every acceptance.

One executable serves both the timing and the lossless check: the inner drafter runs in both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ds4jax.cache.state import Rows
from ds4jax.config import Config
from ds4jax.decode.drafter import Drafter, Drafts, committed, taps_of
from ds4jax.decode.drafters.mtp import MTPDrafter
from ds4jax.decode.sampling import Filters
from ds4jax.model.transformer import Transformer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OracleState:
    """State of the oracle.

    Attributes:
        inner: state of the inner drafter.
        truth: int32 [S, capacity + rows], the true tokens by position.
        forced: bool [S], whether the drafts of a sequence come from `truth`.
        step: int32 [S], steps so far. Step s drafts s mod (K + 1) true tokens, then wrong tokens.
    """

    inner: Any
    truth: jax.Array
    forced: jax.Array
    step: jax.Array


@dataclasses.dataclass(frozen=True)
class OracleDrafter:
    """Runs the inner drafter. A forced state replaces its drafts: they are right for 0, 1, .. K drafts in successive steps."""

    inner: Drafter = dataclasses.field(default_factory=MTPDrafter)

    def taps(self, config: Config) -> tuple[int, ...]:
        """The inner drafter's."""
        return taps_of(self.inner, config)

    def init(self, config: Config, capacity: int, rows: int, sequences: int) -> OracleState:
        """A state that uses the inner drafter's tokens."""
        inner, truth = self.inner.init(config, capacity, rows, sequences), jnp.zeros((sequences, capacity + rows), jnp.int32)
        return OracleState(inner, truth, jnp.zeros(sequences, bool), jnp.zeros(sequences, jnp.int32))

    def draft(
        self, model: Transformer, state: OracleState, last_S: jax.Array, rows: Rows, depth_S: jax.Array, maximum: int,
        filters: Filters,
    ) -> tuple[Drafts, OracleState]:  # fmt: skip
        """The inner drafter's tokens, or the forced tokens."""
        drafts, inner = self.inner.draft(model, state.inner, last_S, rows, depth_S, maximum, filters)
        index = jnp.arange(maximum, dtype=jnp.int32)
        truth_SK = jnp.take_along_axis(state.truth, rows.start[:, None] + 1 + index, axis=1)
        right_SK = index < (state.step % (maximum + 1))[:, None]
        forced_SK = jnp.where(right_SK, truth_SK, (truth_SK + 1) % model.config.vocab_size)
        tokens = jnp.where(state.forced[:, None], forced_SK, drafts.tokens)
        return Drafts(tokens, drafts.q), dataclasses.replace(state, inner=inner, step=state.step + rows.end - rows.start)

    def commit(
        self, model: Transformer, state: OracleState, h_TND: jax.Array, next_ids_T: jax.Array, rows: Rows,
        means: Sequence[jax.Array] = (),
    ) -> OracleState:  # fmt: skip
        """Update the inner drafter's state with the accepted rows."""
        return dataclasses.replace(state, inner=committed(self.inner, model, state.inner, h_TND, means, next_ids_T, rows))

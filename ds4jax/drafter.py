"""Drafters: whoever proposes the next tokens. The verifier takes any of them and knows none.

A drafter is a static argument of the compiled loop, so it is hashable and holds no arrays; its state is a pytree that the loop
carries. What it proposes decides how fast the loop is and never what it says.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ds4jax import cache as caches
from ds4jax.cache import LayerCache, Rows
from ds4jax.config import Config
from ds4jax.model.transformer import Transformer
from ds4jax.sampling import Filters, propose

State = Any
Carry = tuple["Drafts", jax.Array, LayerCache]


class Drafts(NamedTuple):
    """What a drafter proposes.

    Attributes:
        tokens: int32 [K] for the K positions after the last committed token; what lies at the live depth or beyond is not read.
        q: float32 [K, V], the distribution that each token was drawn from; not read at temperature 0.
    """

    tokens: jax.Array
    q: jax.Array


class Drafter(Protocol):
    """Three functions around a state; hashable, since the loop is compiled for it."""

    def init(self, config: Config, capacity: int, rows: int) -> State:
        """The state before any token, for sequences of at most `capacity` rows and steps of at most `rows`."""

    def draft(
        self, model: Transformer, state: State, last: jax.Array, rows: Rows, depth: jax.Array, most: int, filters: Filters
    ) -> tuple[Drafts, State]:
        """Propose what follows the last committed token.

        Args:
            last: int32, the last committed token, whose position `rows.start` is; it is not in the cache yet.
            rows: one row at that position.
            depth: int32, how many tokens will be read; `most` is its static bound K.
        """

    def commit(self, model: Transformer, state: State, h_TND: jax.Array, next_ids_T: jax.Array, rows: Rows) -> State:
        """Learn what was committed, in prefill and after every step.

        Args:
            h_TND: float32 [T, N, D], the model's streams at the call's rows.
            next_ids_T: int32 [T], the token after each row.
            rows: where they stand; only the live ones, which are the first, are committed.
        """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MTPState:
    """What the MTP drafter carries.

    Attributes:
        cache: the block's own cache; it holds every committed row but the last token's.
        h_ND: float32 [N, D], the block's streams at its last row, which predict the token after the last committed one.
    """

    cache: LayerCache
    h_ND: jax.Array


@dataclasses.dataclass(frozen=True)
class MTPDrafter:
    """The model's own multi-token-prediction block, applied to its own streams for the second draft and those after it.

    Every committed row goes through the block with the main model's streams, so its cache has no holes and nothing stale: rows
    that drafting wrote are written again when their tokens are committed, or lie beyond the length.
    """

    def init(self, config: Config, capacity: int, rows: int) -> MTPState:
        """An empty cache and streams of zeros."""
        return MTPState(caches.empty_mtp(config, capacity, slack=rows), jnp.zeros((config.hc_mult, config.dim), jnp.float32))

    def draft(
        self, model: Transformer, state: MTPState, last: jax.Array, rows: Rows, depth: jax.Array, most: int, filters: Filters
    ) -> tuple[Drafts, MTPState]:
        """Chain `depth` drafts; one that is not wanted is not computed."""
        vocabulary, position = model.config.vocab_size, rows.start[0]
        drafts = Drafts(jnp.zeros(most, jnp.int32), jnp.zeros((most, vocabulary), jnp.float32))

        def add(i: jax.Array, drafts: Drafts, h_ND: jax.Array) -> Drafts:
            logits_V = model.mtp_logits(h_ND[None], strict=rows.strict)[0]
            token, q_V = propose(logits_V, filters, position + i)
            return Drafts(drafts.tokens.at[i].set(token), drafts.q.at[i].set(q_V))

        def deeper(i: jax.Array, carry: Carry) -> Carry:
            drafts, h_ND, cache = carry
            row = Rows.following(position + i - 1, 1, 1, strict=rows.strict)
            h_1ND, cache = model.mtp_streams(h_ND[None], drafts.tokens[i - 1][None], row, cache)
            return add(i, drafts, h_1ND[0]), h_1ND[0], cache

        with jax.named_scope("draft"):
            first = jnp.int32(0)
            drafts = jax.lax.cond(depth > 0, add, lambda i, drafts, h_ND: drafts, first, drafts, state.h_ND)
            if most < 2:
                return drafts, state
            carry = (drafts, state.h_ND, state.cache)
            drafts, _, cache = jax.lax.fori_loop(1, depth, deeper, carry)
        return drafts, dataclasses.replace(state, cache=cache)

    def commit(self, model: Transformer, state: MTPState, h_TND: jax.Array, next_ids_T: jax.Array, rows: Rows) -> MTPState:
        """Run the block over the committed rows with the model's own streams."""
        h_TND, cache = model.mtp_streams(h_TND, next_ids_T, rows, state.cache)
        return MTPState(cache, h_TND[jnp.maximum(rows.end[0] - rows.start[0] - 1, 0)])

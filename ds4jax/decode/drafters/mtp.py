"""Drafts of the multi-token-prediction (MTP) block, one after the other."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from ds4jax.cache import state as caches
from ds4jax.cache.state import LayerCache, Rows
from ds4jax.config import Config
from ds4jax.decode.drafter import Drafts
from ds4jax.decode.sampling import Filters, propose
from ds4jax.model.transformer import Transformer

Carry = tuple[Drafts, jax.Array, LayerCache]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MTPState:
    """State of the MTP drafter.

    Attributes:
        cache: the block's cache of S sequences, with every committed row except that of the last token.
        h_SND: float32 [S, N, D], the block's streams at its last row, which predict the token after the last committed one.
    """

    cache: LayerCache
    h_SND: jax.Array


@dataclasses.dataclass(frozen=True)
class MTPDrafter:
    """The model's multi-token-prediction (MTP) block. From the second draft on its input are its own streams.

    Every committed row goes through the block with the main model's streams, so its cache is complete. Rows that drafting wrote
    are overwritten when their tokens are committed, or are past the cache's length.
    """

    by_position: ClassVar[bool] = True

    def init(self, config: Config, capacity: int, rows: int, sequences: int) -> MTPState:
        """An empty cache and streams of zeros."""
        cache = caches.empty_mtp(config, capacity, sequences=sequences, slack=rows)
        return MTPState(cache, jnp.zeros((sequences, config.hc_mult, config.dim), jnp.float32))

    def draft(
        self, model: Transformer, state: MTPState, last_S: jax.Array, rows: Rows, depth_S: jax.Array, maximum: int,
        filters: Filters,
    ) -> tuple[Drafts, MTPState]:  # fmt: skip
        """Chain the drafts of every sequence. Stops at the maximum of the depths."""
        position_S, strict = rows.start, rows.strict

        def add(i: jax.Array, drafts: Drafts, h_SND: jax.Array) -> Drafts:
            token_S, q_SV = propose(model.mtp_logits(h_SND, strict=strict), filters, position_S + i, strict=strict)
            return Drafts(drafts.tokens.at[:, i].set(token_S), drafts.q.at[:, i].set(q_SV))

        def deeper(i: jax.Array, carry: Carry) -> Carry:
            drafts, h_SND, cache = carry
            # A sequence with a smaller depth clones the row of a deeper one, so it reads no additional experts.
            row = Rows.step(position_S + i - 1, 1, (depth_S > i).astype(jnp.int32), strict=strict)
            source = slice(None) if row.single else row.sequence
            h_SND, cache = model.mtp_streams(h_SND[source], drafts.tokens[:, i - 1][source], row, cache)
            return add(i, drafts, h_SND), h_SND, cache

        with jax.named_scope("draft"):
            drafts, deepest = Drafts.none(last_S.shape[0], maximum, model.config.vocab_size), jnp.max(depth_S)
            first = jnp.int32(0)
            drafts = jax.lax.cond(deepest > 0, add, lambda i, drafts, h_SND: drafts, first, drafts, state.h_SND)
            if maximum < 2:
                return drafts, state
            drafts, _, cache = jax.lax.fori_loop(1, deepest, deeper, (drafts, state.h_SND, state.cache))
        return drafts, dataclasses.replace(state, cache=cache)

    def commit(self, model: Transformer, state: MTPState, h_TND: jax.Array, next_ids_T: jax.Array, rows: Rows) -> MTPState:
        """Run the block over the committed rows with the main model's streams."""
        h_TND, cache = model.mtp_streams(h_TND, next_ids_T, rows, state.cache)
        some_S = (rows.end > rows.start)[:, None, None]
        return MTPState(cache, jnp.where(some_S, h_TND[rows.last], state.h_SND))

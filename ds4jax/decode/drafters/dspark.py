"""Drafts of the DSpark block: all of them in one pass, each corrected by the token before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from ds4jax.cache import state as caches
from ds4jax.cache.state import LayerCache, Rows
from ds4jax.config import Config
from ds4jax.decode.drafter import Drafts
from ds4jax.decode.sampling import Filters, propose
from ds4jax.model.dspark import DSpark
from ds4jax.model.transformer import Transformer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DSparkState:
    """State of the DSpark drafter: the ring [S, ring, Q] of each stage, filled from every committed row."""

    rings: tuple[LayerCache, ...]


class Slot(NamedTuple):
    """One slot of a block, for S sequences.

    Attributes:
        base: float32 [S, V], logits of the pass.
        logits: float32 [S, V], corrected by the token before.
        token: int32 [S], the draft.
        q: float32 [S, V], as in `Drafts`.
        confidence: float32 [S], as in `Drafts`.
    """

    base: jax.Array
    logits: jax.Array
    token: jax.Array
    q: jax.Array
    confidence: jax.Array


# Function of a slot's index and logits [S, V]: the drafts [S], and their distributions [S, V].
Choice = Callable[[int, jax.Array], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class DSparkDrafter:
    """The model's DSpark block.

    The rows of a block see each other in both directions, and the rings. They are not kept: rings hold rows of committed
    positions only, which are made of the main model's streams.

    Source: `DSparkBlock` of the published 0731 inference code.
    """

    by_position: ClassVar[bool] = True

    def taps(self, config: Config) -> tuple[int, ...]:
        """The config's `dspark_layers`."""
        return config.dspark_layers

    def init(self, config: Config, capacity: int, rows: int, sequences: int) -> DSparkState:
        """Empty rings, with room for a block."""
        return empty(config, max(rows, config.dspark_block), sequences)

    def draft(
        self, model: Transformer, state: DSparkState, last_S: jax.Array, rows: Rows, depth_S: jax.Array, maximum: int,
        filters: Filters,
    ) -> tuple[Drafts, DSparkState]:  # fmt: skip
        """Draft with one pass if any sequence has a depth above 0; `maximum` is at most the config's `dspark_block`."""

        def choose(i: int, logits_SV: jax.Array) -> tuple[jax.Array, jax.Array]:
            return propose(logits_SV, filters, rows.start + i)

        def some() -> Drafts:
            made = list(slots(model, state, last_S, rows.start, depth_S > 0, maximum, choose, strict=rows.strict))
            return Drafts(*(jnp.stack([getattr(slot, name) for slot in made], axis=1) for name in ("token", "q", "confidence")))

        def none() -> Drafts:
            drafts = Drafts.none(last_S.shape[0], maximum, model.config.vocab_size)
            return drafts._replace(confidence=jnp.zeros(drafts.tokens.shape, jnp.float32))

        with jax.named_scope("draft"):
            return jax.lax.cond(jnp.any(depth_S > 0), some, none), state

    def commit(
        self, model: Transformer, state: DSparkState, h_TND: jax.Array, next_ids_T: jax.Array, rows: Rows,
        means: Sequence[jax.Array] = (),
    ) -> DSparkState:  # fmt: skip
        """Fill the rings from the committed rows."""
        block, window = block_of(model), model.config.window
        if rows.single and len(rows.position) > window:
            rows, means = _latest(rows, means, window)
        x_TD = block.main_rows(means, strict=rows.strict, decoding=rows.decoding)
        rings = [
            LayerCache(stage.attn.keep(x_TD, rows, ring.window)) for stage, ring in zip(block.stages, state.rings, strict=True)
        ]
        return DSparkState(tuple(rings))


def empty(config: Config, slack: int, sequences: int) -> DSparkState:
    """Empty rings with `slack` rows more than the window; a block needs as many as it has slots."""
    return DSparkState(caches.empty_rings(config, config.n_dspark, sequences=sequences, slack=slack))


def slots(
    model: Transformer, state: DSparkState, last_S: jax.Array, position_S: jax.Array, active_S: jax.Array, count: int,
    choose: Choice, *, strict: bool,
) -> Iterator[Slot]:  # fmt: skip
    """The first `count` slots of a block for S sequences.

    Args:
        last_S: int32 [S], the last committed tokens, which have not been through the model; `position_S` int32 [S] are theirs.
        active_S: bool [S]; the slots of the others are undefined, and at least one is active.
        choose: takes the drafts from the corrected logits.
    """
    size = model.config.dspark_block
    rows = Rows.step(position_S, size, jnp.where(active_S, size, 0), strict=strict)
    rows = dataclasses.replace(rows, both_ways=True)
    ids_T = rows.spread(block_of(model).block_ids(last_S))
    return slots_of(model, state, ids_T, rows, last_S, count, choose)


def slots_of(
    model: Transformer, state: DSparkState, ids_T: jax.Array, rows: Rows, last_S: jax.Array, count: int, choose: Choice
) -> Iterator[Slot]:
    """`slots` of given rows int32 [T], K for each sequence in order."""
    block, config, strict = block_of(model), model.config, rows.strict
    h_TND = jnp.broadcast_to(model.embed(ids_T)[:, None, :], (len(ids_T), config.hc_mult, config.dim))
    h_TND, _, _ = model.through(list(block.stages), h_TND, ids_T, rows, state.rings, "dspark")
    x_SKD = block.collapsed(h_TND).reshape(len(last_S), config.dspark_block, -1)
    with jax.named_scope("dspark_head"):
        base_SKV = model.scored(block, h_TND, strict).reshape(*x_SKD.shape[:2], -1)
    token_S = last_S
    for i in range(count):
        before_SR = block.before(token_S, base_SKV)
        logits_SV = base_SKV[:, i] + block.correction(before_SR, strict=strict)
        token_S, q_SV = choose(i, logits_SV)
        # What the score learns in training leaves the drafts alone.
        score_S = block.score(*jax.lax.stop_gradient((x_SKD[:, i], before_SR)))
        yield Slot(base_SKV[:, i], logits_SV, token_S, q_SV, score_S)


def block_of(model: Transformer) -> DSpark:
    """The model's DSpark block. Raises ValueError without one."""
    if model.dspark is None:
        raise ValueError("the model has no DSpark block")
    return model.dspark


def _latest(rows: Rows, means: Sequence[jax.Array], count: int) -> tuple[Rows, list[jax.Array]]:
    """The last `count` live rows of a call with rows of one sequence; earlier ones would leave the rings again."""
    first = jnp.clip(jnp.sum(rows.live) - count, 0, len(rows.position) - count)

    def cut(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, first, count)

    position, sequence, live = cut(rows.position), cut(rows.sequence), cut(rows.live)
    kept = dataclasses.replace(rows, position=position, sequence=sequence, live=live, per_sequence=count)
    return kept, [cut(mean) for mean in means]

"""Draft, verify and accept as one compiled loop; plain decode is the same loop at depth 0.

One executable serves every depth up to `max_draft`, whoever calls it and for how many tokens: on a GPU, two compiled programs may
differ in the last bit of equal rows, and one bit can change a token. Each step has W = 1 + max_draft rows; rows beyond the live
depth are clones of the last live one. A fingerprint of the logits that every token was chosen from is always computed, so that
comparing two runs bit by bit never changes the program.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ds4jax import cache as caches
from ds4jax.accept import accept
from ds4jax.cache import Cache, Rows
from ds4jax.config import Config
from ds4jax.depth import Acceptance, Policy, choose_depth
from ds4jax.drafter import Drafter, Drafts
from ds4jax.model.transformer import Transformer
from ds4jax.precision import precise
from ds4jax.sampling import Filters

# Functions that programs share are traced once, by whichever needs one first; two at a time may each trace it and then use one
# of both, now this and now that, and the same program is another in every process.
_LOWERING = threading.Lock()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What the loop carries; donated from call to call.

    Attributes:
        cache: every committed token but the last is in it.
        drafting: the drafter's own state; None at max_draft 0.
        last: int32, the last committed token; its position is the cache's length.
        tokens: int32 [capacity], tokens generated so far.
        fingerprints: uint32 [capacity, 2], of the logits that each was chosen from: sum and exclusive or over their bits.
        count: int32, how many they are.
        stopped: bool, a stop token was generated.
        acceptance: what became of the drafts.
    """

    cache: Cache
    drafting: Any
    last: jax.Array
    tokens: jax.Array
    fingerprints: jax.Array
    count: jax.Array
    stopped: jax.Array
    acceptance: Acceptance


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Limits:
    """Where the loop ends; all traced.

    Attributes:
        goal: int32, tokens after which a call returns; it may have committed up to `max_draft` more.
        most: int32, tokens that are never exceeded.
        stop_ids: int32 [n], tokens that end the generation; a stop token is committed and counted.
    """

    goal: jax.Array
    most: jax.Array
    stop_ids: jax.Array


def step_rows(max_draft: int) -> int:
    """Rows of a step: the last token, the drafts, and for four drafts three clones more.

    A CPU's products take rows by fours and the rest in another way: a fifth row would have other bits than the first.
    """
    return 1 + max_draft if max_draft < 4 else 8


def start(config: Config, capacity: int, last: int, *, drafter: Drafter | None, max_draft: int) -> DecodeState:
    """The state before anything is in the cache; `last` is the prompt's last token."""
    rows = step_rows(max_draft)
    return DecodeState(
        cache=caches.empty(config, capacity, slack=rows),
        drafting=drafter.init(config, capacity, rows) if drafter else None,
        last=jnp.int32(last),
        tokens=jnp.zeros(capacity, jnp.int32),
        fingerprints=jnp.zeros((capacity, 2), jnp.uint32),
        count=jnp.int32(0),
        stopped=jnp.array(False),
        acceptance=Acceptance.none(max_draft),
    )


@precise
@functools.partial(jax.jit, static_argnames=("graph", "drafter", "strict"), donate_argnames=("cache", "drafting"))
def prefill(
    graph: nnx.GraphDef,
    weights: nnx.State,
    cache: Cache,
    drafting: Any,
    ids_T: jax.Array,
    next_ids_T: jax.Array,
    count: jax.Array,
    *,
    drafter: Drafter | None,
    strict: bool,
) -> tuple[Cache, Any]:
    """Take one bucket of a prompt into the cache and tell the drafter.

    Args:
        ids_T: int32 [T], of which the first `count` are real; the rest is padding of any value.
        next_ids_T: int32 [T], the token after each.
        drafter, strict: static.
    """
    model = nnx.merge(graph, weights)
    rows = Rows.following(cache.length[0], ids_T.shape[0], count, strict=strict)
    h_TND, cache = model.streams(ids_T, rows, cache)
    if drafter:
        drafting = drafter.commit(model, drafting, h_TND, next_ids_T, rows)
    return cache, drafting


def fingerprint(logits_WV: jax.Array) -> jax.Array:
    """Sum and exclusive or over the bits of each row, uint32 [W, 2]; integers, so in any order the same."""
    bits = jax.lax.bitcast_convert_type(logits_WV, jnp.uint32)
    zero = jnp.uint32(0)
    return jnp.stack([jnp.sum(bits, axis=1, dtype=jnp.uint32), jax.lax.reduce(bits, zero, jax.lax.bitwise_xor, (1,))], axis=1)


def _step(
    model: Transformer,
    state: DecodeState,
    limits: Limits,
    filters: Filters,
    policy: Policy,
    drafter: Drafter | None,
    max_draft: int,
    strict: bool,
) -> DecodeState:
    """Draft, run the model over the last token and the drafts, commit what stands and the token after it."""
    position, width, most = state.cache.length[0], step_rows(max_draft), 1 + max_draft
    # No row may lie beyond the context. That fewer tokens may be wanted does not change the depth: what is drawn is the same
    # however many are asked for.
    depth = jnp.minimum(choose_depth(policy, state.acceptance), model.config.max_context - 1 - position)
    drafting, drafts = state.drafting, Drafts(jnp.zeros(0, jnp.int32), jnp.zeros((0, model.config.vocab_size), jnp.float32))
    if drafter and max_draft:
        row = Rows.following(position, 1, 1, strict=strict)
        drafts, drafting = drafter.draft(model, drafting, state.last, row, depth, max_draft, filters)

    rows = Rows.following(position, width, 1 + depth, strict=strict)
    live = jnp.minimum(jnp.arange(width, dtype=jnp.int32), depth)
    ids_W = jnp.concatenate([state.last[None], drafts.tokens])[live]
    h_WND, cache = model.streams(ids_W, rows, state.cache)
    logits_WV = model.logits(h_WND, strict=strict)[:most]

    stand, follower = accept(logits_WV, drafts, depth, filters, position)
    offset = jnp.arange(most, dtype=jnp.int32)
    new_W = jnp.where(offset < stand, jnp.append(drafts.tokens, jnp.int32(0)), follower)
    stops_W = jnp.any(new_W[:, None] == limits.stop_ids[None, :], axis=1) & (offset <= stand)
    count = jnp.where(jnp.any(stops_W), jnp.argmax(stops_W).astype(jnp.int32), stand) + 1
    count = jnp.minimum(count, limits.most - state.count)

    committed = Rows.following(position, width, count, strict=strict)
    if drafter:
        kept = jnp.minimum(jnp.arange(width, dtype=jnp.int32), count - 1)
        drafting = drafter.commit(model, drafting, h_WND[kept], new_W[kept], committed)
    place = jnp.where(offset < count, state.count + offset, state.tokens.shape[0])
    return DecodeState(
        cache=dataclasses.replace(cache, length=committed.end),
        drafting=drafting,
        last=new_W[count - 1],
        tokens=state.tokens.at[place].set(new_W, mode="drop"),
        fingerprints=state.fingerprints.at[place].set(fingerprint(logits_WV), mode="drop"),
        count=state.count + count,
        stopped=stops_W[count - 1],
        acceptance=state.acceptance.after(depth, stand),
    )


@precise
@functools.partial(jax.jit, static_argnames=("graph", "drafter", "max_draft", "strict"), donate_argnames="state")
def run(
    graph: nnx.GraphDef,
    weights: nnx.State,
    state: DecodeState,
    limits: Limits,
    filters: Filters,
    policy: Policy,
    *,
    drafter: Drafter | None,
    max_draft: int,
    strict: bool,
) -> DecodeState:
    """Generate until the goal, a stop token or the end.

    Args:
        drafter: static; None at max_draft 0.
        max_draft: static; the deepest draft that this program can make.
        strict: static; float32 products without Pallas kernels.
    """
    model = nnx.merge(graph, weights)
    goal = jnp.minimum(limits.goal, jnp.minimum(limits.most, state.tokens.shape[0]))

    def unfinished(state: DecodeState) -> jax.Array:
        return (state.count < goal) & ~state.stopped

    def step(state: DecodeState) -> DecodeState:
        return _step(model, state, limits, filters, policy, drafter, max_draft, strict)

    return jax.lax.while_loop(unfinished, step, state)


@precise
def lower_prefill(
    graph: nnx.GraphDef,
    weights: nnx.State,
    state: DecodeState,
    width: int,
    *,
    drafter: Drafter | None,
    strict: bool,
) -> jax.stages.Lowered:
    """`prefill` for calls of `width` rows into such a state, lowered; of weights and state the shapes are enough."""
    ids_T = jax.ShapeDtypeStruct((width,), jnp.int32)
    arguments = (graph, weights, state.cache, state.drafting, ids_T, ids_T, jnp.int32(0))
    with _LOWERING:
        lowered: jax.stages.Lowered = prefill.__wrapped__.lower(  # type: ignore[attr-defined]
            *arguments, drafter=drafter, strict=strict
        )
    return lowered


@precise
def lower_run(
    graph: nnx.GraphDef,
    weights: nnx.State,
    state: DecodeState,
    limits: Limits,
    filters: Filters,
    policy: Policy,
    *,
    drafter: Drafter | None,
    max_draft: int,
    strict: bool,
) -> jax.stages.Lowered:
    """`run` for such arguments, of which the shapes are enough, lowered; once it is compiled the next call finds it."""
    options = {"drafter": drafter, "max_draft": max_draft, "strict": strict}
    with _LOWERING:
        lowered: jax.stages.Lowered = run.__wrapped__.lower(  # type: ignore[attr-defined]
            graph, weights, state, limits, filters, policy, **options
        )
    return lowered

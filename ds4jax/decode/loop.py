"""Draft, verify and accept as one compiled loop over S sequences. Plain decode is the same loop at depth 0.

One executable serves every depth up to `max_draft` and any number of tokens. On a GPU two compiled programs may differ in the
last bit of equal rows, and one bit can change a token. Each step has W rows per sequence, see `decode.verify`. On a GPU rows past
a sequence's depth are clones of its last live row. The rows of a finished sequence are clones of another sequence's. A
fingerprint of the logits is computed for every token, so comparing two runs bit by bit does not change the program.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ds4jax.cache import state as caches
from ds4jax.cache.state import Cache, Rows
from ds4jax.config import Config
from ds4jax.decode import exchange, groups
from ds4jax.decode.accept import accept
from ds4jax.decode.depth import Acceptance, Policy, choose_depth, shortened
from ds4jax.decode.drafter import Drafter, Drafts, committed, taps_of
from ds4jax.decode.masks import Mask
from ds4jax.decode.module import Weights, merged, on_devices
from ds4jax.decode.sampling import Filters
from ds4jax.decode.verify import verify
from ds4jax.decode.width import ROOM, rows_needed
from ds4jax.model.transformer import Transformer
from ds4jax.precision import precise

# Lower under a lock. Two threads tracing one function give programs that differ between processes, and the compile cache misses.
LOWERING = threading.Lock()
# Number of latest tokens in a call's report: enough for the largest piece of a stream and its drafts.
REPORTED = 72


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """State of the loop for S sequences. Each call donates it.

    Attributes:
        cache: rows of every committed token except the last one of each sequence.
        drafting: the drafter's state; None at max_draft 0.
        last: int32 [S], the last committed tokens; their positions are the cache's lengths.
        tokens: int32 [S, capacity], tokens generated so far.
        fingerprints: uint32 [S, capacity, 2], for each token the sum and exclusive or over the bits of its logits.
        count: int32 [S], number of tokens generated so far.
        stopped: bool [S], whether a stop token was generated.
        acceptance: counts of accepted drafts.
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
    """Where each sequence ends; all traced.

    Attributes:
        budget: int32 [S], tokens of this call, after which the sequence waits for the others; it may commit up to `max_draft`
            more. A sequence with budget 0 takes no part. A host that keeps one array for each budget passes the same device
            buffer call after call, and CUDA graphs need no update.
        maximum: int32 [S], tokens that are never exceeded.
        stop_ids: int32 [S, n], tokens that end the generation; a stop token is committed and counted. -1 is no token.
    """

    budget: jax.Array
    maximum: jax.Array
    stop_ids: jax.Array

    @classmethod
    def of(cls, budgets: Sequence[int], maxima: Sequence[int], stop_ids: Sequence[Sequence[int]]) -> Limits:
        """Limits of S sequences from numbers; every stop list has the same length."""
        return cls(*(jnp.asarray(numbers, jnp.int32) for numbers in (budgets, maxima, stop_ids)))


def start(
    config: Config, capacity: int, last_S: Sequence[int] | jax.Array, *, drafter: Drafter | None, max_draft: int
) -> DecodeState:
    """The state of S sequences with an empty cache.

    Args:
        capacity: maximum rows of a sequence in the cache, and maximum tokens that it can generate.
        last_S: int32 [S], the last token of each prompt; any token for a sequence without a prompt.
        drafter: the drafter; None at max_draft 0.
        max_draft: K, the maximum number of drafts per step.

    Returns:
        A state with lengths and counts of 0. Every array has its own buffer.
    """
    sequences = len(last_S)
    return DecodeState(
        cache=caches.empty(config, capacity, sequences=sequences, slack=ROOM),
        drafting=drafter.init(config, capacity, ROOM, sequences) if drafter else None,
        last=jnp.array(last_S, jnp.int32),
        tokens=jnp.zeros((sequences, capacity), jnp.int32),
        fingerprints=jnp.zeros((sequences, capacity, 2), jnp.uint32),
        count=jnp.zeros(sequences, jnp.int32),
        stopped=jnp.zeros(sequences, bool),
        acceptance=Acceptance.none(max_draft, sequences),
    )


def lower_start(
    config: Config,
    capacity: int,
    sequences: int,
    *,
    drafter: Drafter | None,
    max_draft: int,
    mesh: groups.AnyMesh = None,
) -> jax.stages.Lowered:
    """Lower `start` as one program, a function of int32 [S] alone, for S = `sequences`; slots on the groups of `mesh`."""
    make, last_S = functools.partial(start, config, capacity, drafter=drafter, max_draft=max_draft), _integers(sequences)
    shardings = jax.tree.map(lambda shape: shape.sharding, groups.placed_shapes(jax.eval_shape(make, last_S), mesh))
    with LOWERING:
        return jax.jit(make, out_shardings=shardings if mesh else None).lower(last_S)


def append(
    graph: nnx.GraphDef,
    weights: Weights,
    cache: Cache,
    drafting: Any,
    ids_T: jax.Array,
    next_ids_T: jax.Array,
    count: jax.Array,
    slot: jax.Array | int = 0,
    *,
    drafter: Drafter | None,
    strict: bool,
) -> tuple[Cache, Any]:
    """Append one chunk of a prompt to the cache of one sequence, and update the drafter's state.

    The state of the other sequences does not change by a bit. The cache must have exactly the rows before the chunk.

    Args:
        graph: static; the model's graph, see `ds4jax.decode.module`.
        weights: the model's arrays.
        cache, drafting: fields of a `DecodeState`. `prefill` donates them, so the caller cannot read them again.
        ids_T: int32 [T]; the first `count` are tokens of the prompt, the others padding of any value.
        next_ids_T: int32 [T], the token after each.
        count: int32, at least 1.
        slot: int32, the sequence; omitted if there is only one.
        drafter: static; the drafter, None at max_draft 0.
        strict: static; float32 products without Pallas kernels.

    Returns:
        The cache with the chunk's rows and its length increased by `count`, and the drafter's state.
    """
    model = merged(graph, weights)
    rows = Rows.following(cache.length, ids_T.shape[0], count, slot=slot, strict=strict)
    h_TND, cache, means = model.tapped(ids_T, rows, cache, taps_of(drafter, model.config))
    if drafter:
        drafting = committed(drafter, model, drafting, h_TND, means, next_ids_T, rows)
    return cache, drafting


def as_prefill(program: Callable[..., tuple[Cache, Any]]) -> Callable[..., tuple[Cache, Any]]:
    """A function with the arguments of `append` as a compiled program."""
    # JAX names the program by it.
    program.__name__ = "prefill"
    return precise(jax.jit(program, static_argnames=("graph", "drafter", "strict"), donate_argnames=("cache", "drafting")))


prefill = as_prefill(on_devices(append))


def fingerprint(logits_WV: jax.Array) -> jax.Array:
    """Sum and exclusive or over the bits of each row, uint32 [W, 2]. Integers give the same result in any order."""
    bits = jax.lax.bitcast_convert_type(logits_WV, jnp.uint32)
    zero = jnp.uint32(0)
    return jnp.stack([jnp.sum(bits, axis=1, dtype=jnp.uint32), jax.lax.reduce(bits, zero, jax.lax.bitwise_xor, (1,))], axis=1)


def active(state: DecodeState, goal_S: jax.Array) -> jax.Array:
    """Which sequences go on, bool [S]: int32 [S] goals are counts of tokens."""
    return (state.count < goal_S) & ~state.stopped


def _depths(model: Transformer, state: DecodeState, policy: Policy, active_S: jax.Array, mask: Mask | None) -> jax.Array:
    """Drafts of each sequence in the next step, int32 [S]; none for one that is not active or is masked."""
    # No row may be past the context. The depth does not depend on the number of requested tokens, so the drawn tokens do not
    # depend on it, either.
    depth_S = jnp.minimum(choose_depth(policy, state.acceptance), model.config.max_context - 1 - state.cache.length)
    return jnp.where(active_S if mask is None else active_S & ~mask.masked, depth_S, 0)


class Looked(NamedTuple):
    """What a step looked at and chose.

    Attributes:
        logits_SWV: float32 [S, W, V], the model's logits, before a mask.
        tokens_SW: int32 [S, W], the tokens that follow, of which the first `count_S` were committed.
        count_S: int32 [S].
    """

    logits_SWV: jax.Array
    tokens_SW: jax.Array
    count_S: jax.Array


def step(
    model: Transformer,
    state: DecodeState,
    goal_S: jax.Array,
    limits: Limits,
    filters: Filters,
    policy: Policy,
    drafter: Drafter | None,
    max_draft: int,
    strict: bool,
    mask: Mask | None = None,
) -> tuple[DecodeState, Looked]:
    """Draft, run the model over the last tokens and the drafts, and commit the accepted drafts and the token after them.

    Rows of an inactive sequence are clones of another sequence's rows and are not live, so its state does not change. A masked
    sequence does not draft. Fingerprints are those of the logits before the mask.
    """
    sequences, vocabulary = state.last.shape[0], model.config.vocab_size
    position_S, width, verified = state.cache.length, rows_needed(model, state.cache, max_draft, strict), 1 + max_draft
    # The loop runs while any sequence is active, so a single sequence is active.
    active_S = active(state, goal_S) if sequences > 1 else jnp.ones(1, bool)
    depth_S = _depths(model, state, policy, active_S, mask)
    drafting, drafts = state.drafting, Drafts.none(sequences, max_draft, vocabulary)
    if drafter and max_draft:
        row = Rows.step(position_S, 1, active_S.astype(jnp.int32), strict=strict)
        drafts, drafting = drafter.draft(model, drafting, state.last, row, depth_S, max_draft, filters)
        depth_S = shortened(policy, depth_S, drafts.confidence)

    # A draft outside the vocabulary is rejected. Its row gets a valid token, because the embedding needs one.
    usable_SK = jnp.where(drafts.known(vocabulary), drafts.tokens, state.last[:, None])
    ids_SW, live_S = jnp.concatenate([state.last[:, None], usable_SK], axis=1), jnp.where(active_S, 1 + depth_S, 0)
    seen, cache = verify(model, state.cache, ids_SW, live_S, taps_of(drafter, model.config), strict=strict)
    logits_SWV = seen.logits_SWV

    allowed_SWV = mask.applied(logits_SWV) if mask else logits_SWV
    stand_S, follower_S = accept(allowed_SWV, drafts, depth_S, filters, position_S, strict=strict)
    offset = jnp.arange(verified, dtype=jnp.int32)
    new_SW = jnp.where(offset < stand_S[:, None], jnp.pad(usable_SK, ((0, 0), (0, 1))), follower_S[:, None])
    stops_SW = jnp.any(new_SW[:, :, None] == limits.stop_ids[:, None, :], axis=2) & (offset <= stand_S[:, None])
    count_S = jnp.where(jnp.any(stops_SW, axis=1), jnp.argmax(stops_SW, axis=1).astype(jnp.int32), stand_S) + 1
    count_S = jnp.where(active_S, jnp.minimum(count_S, limits.maximum - state.count), 0)

    kept = Rows.step(position_S, width, count_S, strict=strict)
    if drafter:
        h_TND, *means = map(kept.spread, (seen.h_SWND, *seen.means))
        drafting = committed(drafter, model, drafting, h_TND, means, kept.spread(new_SW), kept)
    place_SW = jnp.where(offset < count_S[:, None], state.count[:, None] + offset, state.tokens.shape[1])
    index_S = jnp.arange(sequences, dtype=jnp.int32)
    marks_SW2 = fingerprint(logits_SWV.reshape(-1, vocabulary)).reshape(sequences, verified, 2)
    after = DecodeState(
        cache=dataclasses.replace(cache, length=kept.end),
        drafting=drafting,
        last=jnp.where(active_S, new_SW[index_S, count_S - 1], state.last),
        tokens=state.tokens.at[index_S[:, None], place_SW].set(new_SW, mode="drop"),
        fingerprints=state.fingerprints.at[index_S[:, None], place_SW].set(marks_SW2, mode="drop"),
        count=state.count + count_S,
        stopped=jnp.where(active_S, stops_SW[index_S, count_S - 1], state.stopped),
        acceptance=state.acceptance.after(depth_S, stand_S, active_S),
    )
    return after, Looked(logits_SWV, new_SW, count_S)


@precise
@functools.partial(jax.jit, static_argnames=("graph", "drafter", "max_draft", "strict"), donate_argnames="state")
@on_devices
def run(
    graph: nnx.GraphDef,
    weights: Weights,
    state: DecodeState,
    limits: Limits,
    filters: Filters,
    policy: Policy,
    *,
    drafter: Drafter | None,
    max_draft: int,
    strict: bool,
) -> tuple[DecodeState, jax.Array]:
    """Generate until every one of S sequences has used its budget, or reached its maximum, a stop token or its capacity.

    Each goes at its own depth, with its own filters, seed, stop list and end. One that has ended, or has nothing to do from the
    beginning, keeps every field of its state to the last bit while the others go on, and its rows read no experts of their own.

    Args:
        graph: static; the model's, see `ds4jax.decode.module`.
        weights: its arrays.
        state: after prefill; donated, so that the caller's buffers are gone.
        limits: where each sequence ends; filters: how its tokens are chosen; policy: how deep it drafts. All of them are traced:
            other values compile nothing.
        drafter: static; who drafts, None at max_draft 0.
        max_draft: static; K, the deepest draft that this program can make. `policy.depth` may not be greater.
        strict: static; float32 products without Pallas kernels.

    Returns:
        The state with the new tokens and their fingerprints appended, and its `report`, which the host reads in one transfer;
        see `exchange.checked`.
    """
    mail = exchange.mail_for(graph, weights, state.cache, drafter, max_draft, strict=strict)
    model = merged(graph, weights, mail)
    goal_S = jnp.minimum(state.count + limits.budget, jnp.minimum(limits.maximum, state.tokens.shape[1]))

    def unfinished(state: DecodeState) -> jax.Array:
        return jnp.any(active(state, goal_S))

    def one(state: DecodeState) -> DecodeState:
        return step(model, state, goal_S, limits, filters, policy, drafter, max_draft, strict)[0]

    state, missing = exchange.repeated(mail, unfinished, one, state, lambda state: state.count)
    return state, exchange.marked(report(state), missing)


def report(state: DecodeState, size: int = REPORTED) -> jax.Array:
    """Counts and the latest tokens of each sequence in one array.

    Args:
        state: of S sequences.
        size: static, R, the number of latest tokens; at most the capacity.

    Returns:
        int32 [S, 3 + 2 K + 3 R]: count, stopped, steps, tried and stood of each draft, then R tokens with the two words of their
        fingerprints. The last of the R tokens is the latest one; if there are fewer than R tokens, it is at index count - 1.
    """
    size = min(size, state.tokens.shape[1])
    first_S = jnp.maximum(state.count - size, 0)
    take = jax.vmap(lambda array, first: jax.lax.dynamic_slice_in_dim(array, first, size))
    bits_SR2 = jax.lax.bitcast_convert_type(take(state.fingerprints, first_S), jnp.int32)
    rows_SR3 = jnp.concatenate([take(state.tokens, first_S)[..., None], bits_SR2], axis=2)
    numbers = jnp.stack([state.count, state.stopped.astype(jnp.int32), state.acceptance.steps], axis=1)
    drafts = (state.acceptance.tried, state.acceptance.stood)
    return jnp.concatenate([numbers, *drafts, rows_SR3.reshape(len(rows_SR3), -1)], axis=1)


def _integers(count: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count,), jnp.int32)


@precise
def lower_prefill(
    graph: nnx.GraphDef,
    weights: Weights,
    state: DecodeState,
    width: int,
    *,
    drafter: Drafter | None,
    strict: bool,
    program: Callable[..., tuple[Cache, Any]] = prefill,
) -> jax.stages.Lowered:
    """Lower `prefill`, or another program of its arguments, for chunks of `width` rows.

    Weights and state may be `jax.ShapeDtypeStruct`.
    """
    ids_T = _integers(width)
    slot = (jnp.int32(0),) if state.count.shape[0] > 1 else ()
    arguments = (graph, weights, state.cache, state.drafting, ids_T, ids_T, jnp.int32(0), *slot)
    with LOWERING:
        lowered: jax.stages.Lowered = program.__wrapped__.lower(  # type: ignore[attr-defined]
            *arguments, drafter=drafter, strict=strict
        )
    return lowered


@precise
def lower_run(
    graph: nnx.GraphDef,
    weights: Weights,
    state: DecodeState,
    limits: Limits,
    filters: Filters,
    policy: Policy,
    *,
    drafter: Drafter | None,
    max_draft: int,
    strict: bool,
) -> jax.stages.Lowered:
    """Lower `run` for arguments of these shapes. Once it is compiled, the next call finds it."""
    options = {"drafter": drafter, "max_draft": max_draft, "strict": strict}
    with LOWERING:
        lowered: jax.stages.Lowered = run.__wrapped__.lower(  # type: ignore[attr-defined]
            graph, weights, state, limits, filters, policy, **options
        )
    return lowered

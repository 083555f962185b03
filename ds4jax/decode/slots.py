"""Programs over slots: requests come and go, while the others go on in the same loop.

A slot is one of the S sequences of a `DecodeState`. A free slot has the state of a new one to the last bit, so a request's tokens
do not depend on what was in its slot before. The step is that of `ds4jax.decode.loop`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ds4jax.bounds import NO_STOP
from ds4jax.cache.state import Cache
from ds4jax.config import Config
from ds4jax.decode import exchange, groups, loop
from ds4jax.decode.depth import Policy
from ds4jax.decode.drafter import Drafter
from ds4jax.decode.groups import SLOTS, WHOLE, AnyMesh
from ds4jax.decode.loop import DecodeState, Limits
from ds4jax.decode.masks import Mask
from ds4jax.decode.module import Graph, Weights, merged, on_devices
from ds4jax.decode.sampling import Filters, Sampling
from ds4jax.decode.scores import Scores
from ds4jax.model.transformer import Transformer
from ds4jax.precision import precise
from pallas_kernels.linear.mailbox_gather import Mail

Carry = tuple[jax.Array, DecodeState, Scores]

# Maximum tokens of a slot in one call. The report of a call holds all of them.
CALL_TOKENS = 128
# Stop tokens of a request.
STOP_IDS = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Asked:
    """What the requests in the slots ask for; every array has the axis S, except the policy's costs. All of it is traced.

    Attributes:
        limits: where each request ends. The maximum of a free or waiting slot is 0. The budget is not read.
        filters: how its tokens are chosen.
        policy: how deep it drafts.
        scored: bool [S], whether it wants log probabilities.
    """

    limits: Limits
    filters: Filters
    policy: Policy
    scored: jax.Array

    @classmethod
    def none(cls, slots: int, costs: tuple[float, ...]) -> Asked:
        """No requests: nothing to do in any of S = `slots` slots.

        Args:
            costs: the time of a step of each depth 0..K, in any unit, for automatic depths.
        """
        limits = Limits.of([0] * slots, [0] * slots, [[NO_STOP] * STOP_IDS] * slots)
        depth = jnp.zeros(slots, jnp.int32)
        return cls(limits, Filters.of([Sampling()] * slots), Policy(depth, jnp.array(costs, jnp.float32)), jnp.zeros(slots, bool))


# How the requests of slots lie on groups.
ASKED: Any = Asked(SLOTS, SLOTS, Policy(SLOTS, WHOLE), SLOTS)  # type: ignore[arg-type]


def _with_row(array_S: jax.Array, slot: jax.Array, value: jax.Array) -> jax.Array:
    return array_S.at[slot].set(value, mode="drop")


@functools.partial(jax.jit, static_argnames="mesh", donate_argnames=("asked", "last_S"))
def insert(
    asked: Asked,
    last_S: jax.Array,
    slot: jax.Array,
    last: jax.Array,
    maximum: jax.Array,
    stop_ids_n: jax.Array,
    filters: Filters,
    depth: jax.Array,
    scored: jax.Array,
    *,
    mesh: AnyMesh = None,
) -> tuple[Asked, jax.Array]:
    """Let a slot take part, after its prompt is in the cache.

    Args:
        asked: of S slots; donated.
        last_S: int32 [S], the field of the `DecodeState`; donated.
        slot: int32 [].
        last: int32 [], the last token of the prompt.
        maximum: int32 [], maximum number of new tokens.
        stop_ids_n: int32 [n], its stop tokens; n as in `asked`.
        filters: of one sequence.
        depth: int32 [], drafts per step, or `AUTO`.
        scored: bool [], whether it wants log probabilities.
        mesh: static; the model's, if it has groups.

    Returns:
        Both with the request in its slot.
    """
    new = Limits(jnp.int32(0), maximum, stop_ids_n), filters, depth, scored, last

    def on_each(asked: Asked, last_S: jax.Array, slot: jax.Array, new: Any) -> tuple[Asked, jax.Array]:
        put = functools.partial(_with_row, slot=groups.local(slot, last_S.shape[0], mesh))
        held = asked.limits, asked.filters, asked.policy.depth, asked.scored, last_S
        limits, filters, depth, scored, last_S = jax.tree.map(lambda array_S, value: put(array_S, value=value), held, new)
        return Asked(limits, filters, Policy(depth, asked.policy.costs), scored), last_S

    run = groups.over_groups(on_each, mesh, (ASKED, SLOTS, WHOLE, WHOLE), (ASKED, SLOTS))
    made: tuple[Asked, jax.Array] = run(asked, last_S, slot, new)
    return made


@functools.partial(
    jax.jit, static_argnames=("config", "capacity", "drafter", "max_draft", "mesh"), donate_argnames=("state", "asked")
)
def clear(
    state: DecodeState,
    asked: Asked,
    slot: jax.Array,
    *,
    config: Config,
    capacity: int,
    drafter: Drafter | None,
    max_draft: int,
    mesh: AnyMesh = None,
) -> tuple[DecodeState, Asked]:
    """Free a slot: give it the state of a new one, and nothing to do. The other slots do not change by a bit.

    Args:
        state, asked: of S slots; donated.
        slot: int32 [].
        config, capacity, drafter, max_draft: static; as for `ds4jax.decode.loop.start`.
        mesh: static; the model's, if it has groups.
    """

    def on_each(state: DecodeState, asked: Asked, slot: jax.Array) -> tuple[DecodeState, Asked]:
        slots = state.count.shape[0]
        own = groups.local(slot, slots, mesh)
        fresh = loop.start(config, capacity, [0] * slots, drafter=drafter, max_draft=max_draft)
        nothing, costs = Asked.none(slots, (0.0,)), asked.policy.costs

        def emptied(array_S: jax.Array, new_S: jax.Array) -> jax.Array:
            return _with_row(array_S, own, new_S[own])

        held, new = ((x.limits, x.filters, x.policy.depth, x.scored) for x in (asked, nothing))
        limits, filters, depth, scored = jax.tree.map(emptied, held, new)
        return jax.tree.map(emptied, state, fresh), Asked(limits, filters, Policy(depth, costs), scored)

    made: tuple[DecodeState, Asked] = groups.over_groups(on_each, mesh, (SLOTS, ASKED, WHOLE), (SLOTS, ASKED))(state, asked, slot)
    return made


@loop.as_prefill
@functools.partial(on_devices, ins=(SLOTS, SLOTS, WHOLE, WHOLE, WHOLE, WHOLE), outs=SLOTS)
def prefill(
    graph: Graph,
    weights: Weights,
    cache: Cache,
    drafting: Any,
    ids_T: jax.Array,
    next_ids_T: jax.Array,
    count: jax.Array,
    slot: jax.Array,
    *,
    drafter: Drafter | None,
    strict: bool,
) -> tuple[Cache, Any]:
    """`ds4jax.decode.loop.prefill` for slots on groups of devices: all compute the rows, and the group of the slot keeps them."""
    size = cache.length.shape[0]
    own = groups.local(slot, size, graph.mesh)
    kept, place = jnp.where(own < size, count, 0), jnp.minimum(own, size - 1)
    return loop.append(graph, weights, cache, drafting, ids_T, next_ids_T, kept, place, drafter=drafter, strict=strict)


@precise
@functools.partial(jax.jit, static_argnames=("graph", "drafter", "max_draft", "strict"), donate_argnames="state")
@functools.partial(on_devices, ins=(SLOTS, ASKED, SLOTS, WHOLE), outs=SLOTS)
def call(
    graph: nnx.GraphDef,
    weights: Weights,
    state: DecodeState,
    asked: Asked,
    mask: Mask,
    steps: jax.Array,
    *,
    drafter: Drafter | None,
    max_draft: int,
    strict: bool,
) -> tuple[DecodeState, jax.Array, Scores]:
    """Run some steps of all requests. Ends early when a request ends, so that its slot can be filled.

    How the steps are divided among calls changes no bit of any request.

    Args:
        graph, weights, drafter, max_draft, strict: as for `ds4jax.decode.loop.run`.
        state: of S slots; donated.
        asked: what the requests ask for.
        mask: the tokens that masked requests may take next. With any, one step is made.
        steps: int32 [], maximum number of steps; at most `max_steps(max_draft)` are made.

    Returns:
        The state, its report with the latest `CALL_TOKENS` tokens of each slot, see `ds4jax.decode.loop.report` and
        `exchange.checked`, and the scores of the call's tokens.

    With groups, each makes its own steps: a group ends early when one of its own requests ends, or has none.
    """
    mail = exchange.mail_for(graph, weights, state.cache, drafter, max_draft, strict=strict)
    mesh, own = getattr(graph, "mesh", None), state.count.shape[0]
    # A CPU computes steps of other numbers of slots with other code, which ends in other last bits.
    in_whole_shape = groups.count(mesh) > 1 and jax.default_backend() == "cpu"
    if in_whole_shape:
        state, asked, mask = _repeated(state, asked, mask, mesh)
    made = _stepped(merged(graph, weights, mail), mail, state, asked, mask, steps, drafter, max_draft, strict)
    return jax.tree.map(lambda array_S: array_S[:own], made) if in_whole_shape else made


def _repeated(state: DecodeState, asked: Asked, mask: Mask, mesh: AnyMesh) -> tuple[DecodeState, Asked, Mask]:
    """The slots of a group in the shape of those of all groups; the others are copies with nothing to do."""
    policy = Policy(groups.repeated(asked.policy.depth, mesh), asked.policy.costs)
    limits, filters, scored = groups.repeated((asked.limits, asked.filters, asked.scored), mesh)
    idle = jnp.arange(len(limits.maximum), dtype=jnp.int32) >= len(asked.limits.maximum)
    limits = dataclasses.replace(limits, maximum=jnp.where(idle, 0, limits.maximum))
    return groups.repeated(state, mesh), Asked(limits, filters, policy, scored), groups.repeated(mask, mesh)


def _stepped(
    model: Transformer,
    mail: Mail | None,
    state: DecodeState,
    asked: Asked,
    mask: Mask,
    steps: jax.Array,
    drafter: Drafter | None,
    max_draft: int,
    strict: bool,
) -> tuple[DecodeState, jax.Array, Scores]:
    goal_S = jnp.minimum(asked.limits.maximum, state.tokens.shape[1])
    steps = jnp.where(jnp.any(mask.masked), jnp.minimum(steps, 1), jnp.minimum(steps, max_steps(max_draft)))
    begun_S, first_S = loop.active(state, goal_S), state.count

    def more(carry: Carry) -> jax.Array:
        made, state, _ = carry
        active_S = loop.active(state, goal_S)
        return (made < steps) & jnp.any(active_S) & jnp.all(active_S == begun_S)

    def one(carry: Carry) -> Carry:
        made, state, scores = carry
        before_S = state.count - first_S
        state, looked = loop.step(
            model, state, goal_S, asked.limits, asked.filters, asked.policy, drafter, max_draft, strict, mask
        )  # fmt: skip
        scores = scores.after(asked.scored & begun_S, looked.logits_SWV, looked.tokens_SW, before_S, looked.count_S)
        return made + 1, state, scores

    scores = Scores.none(len(first_S), CALL_TOKENS, model.config.vocab_size)
    begun = jnp.int32(0), state, scores
    (_, state, scores), missing = exchange.repeated(mail, more, one, begun, lambda carry: carry[1].count)
    return state, exchange.marked(loop.report(state, CALL_TOKENS), missing), scores


def max_steps(max_draft: int) -> int:
    """Maximum steps of a call: no slot can commit more than `CALL_TOKENS` tokens in them."""
    return CALL_TOKENS // (1 + max_draft)


@precise
def lower_call(
    graph: nnx.GraphDef,
    weights: Weights,
    state: DecodeState,
    asked: Asked,
    mask: Mask,
    *,
    drafter: Drafter | None,
    max_draft: int,
    strict: bool,
) -> jax.stages.Lowered:
    """Lower `call` for arguments of these shapes, which may be `jax.ShapeDtypeStruct`."""
    options = {"drafter": drafter, "max_draft": max_draft, "strict": strict}
    with loop.LOWERING:
        lowered: jax.stages.Lowered = call.__wrapped__.lower(  # type: ignore[attr-defined]
            graph, weights, state, asked, mask, jnp.int32(0), **options
        )
    return lowered

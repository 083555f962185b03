"""The number of drafts per step: fixed, or the depth with the most expected tokens per second.

Expected tokens come from the acceptance so far, and the time of a step of each depth is measured.

Source: the break-even rule of the reference engine's adaptive cascade, generalised to any depth. There a third row is worth its
time if p1 > (1 + p0)·Δ / (p0·C), which is the same comparison for two depths.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

AUTO = -1
# One step in this many uses the maximum depth, so that the acceptance of every depth stays up to date.
PROBE_EVERY = 16
MEMORY = 1 / 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Policy:
    """The requested depths. Traced, so other values need no compilation.

    Attributes:
        depth: int32 [S], drafts per step of each sequence, or AUTO.
        costs: float32 [K+1], the time of a step of each depth 0..K, in any unit; only read if a depth is AUTO.
    """

    depth: jax.Array
    costs: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Acceptance:
    """Counts of accepted drafts of each sequence.

    Attributes:
        steps: int32 [S], steps in which the sequence was active.
        tried: int32 [S, K], steps with a draft at this depth in which all earlier drafts were accepted.
        stood: int32 [S, K], the number of these steps in which the draft was accepted.
        recent: float32 [S, K], exponential moving average of the acceptance; 1 at the start.
    """

    steps: jax.Array
    tried: jax.Array
    stood: jax.Array
    recent: jax.Array

    @classmethod
    def none(cls, max_draft: int, sequences: int = 1) -> Acceptance:
        """Counts before the first step, for S = `sequences` and K = `max_draft`."""
        shape = (sequences, max_draft)
        # Two arrays: the loop's state is donated, and a buffer cannot be donated twice.
        tried, stood = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.int32)
        return cls(jnp.zeros(sequences, jnp.int32), tried, stood, jnp.ones(shape, jnp.float32))

    def after(self, depth_S: jax.Array, count_S: jax.Array, active_S: jax.Array) -> Acceptance:
        """The counts after one more step.

        Args:
            depth_S: int32 [S], number of drafts.
            count_S: int32 [S], number of accepted drafts.
            active_S: bool [S], the active sequences; the counts of the others do not change.
        """
        index = jnp.arange(self.tried.shape[1], dtype=jnp.int32)
        stood = index < count_S[:, None]
        tried = (index < depth_S[:, None]) & (index <= count_S[:, None]) & active_S[:, None]
        recent = self.recent + MEMORY * (stood.astype(jnp.float32) - self.recent)
        return Acceptance(
            self.steps + active_S.astype(jnp.int32),
            self.tried + tried.astype(jnp.int32),
            self.stood + (stood & tried).astype(jnp.int32),
            jnp.where(tried, recent, self.recent),
        )


def expected_tokens(recent_K: jax.Array) -> jax.Array:
    """Expected tokens of a step at each depth 0..K, float32 [K+1], for the acceptance rate of each depth, float32 [K]."""
    return 1.0 + jnp.concatenate([jnp.zeros(1, jnp.float32), jnp.cumsum(jnp.cumprod(recent_K))])


def choose_depth(policy: Policy, acceptance: Acceptance) -> jax.Array:
    """Number of drafts of each sequence in the next step, int32 [S]."""
    max_draft = acceptance.tried.shape[1]
    tokens = jax.vmap(expected_tokens)(acceptance.recent)
    best = jnp.argmax(tokens / policy.costs, axis=1).astype(jnp.int32)
    probe = acceptance.steps % PROBE_EVERY == PROBE_EVERY - 1
    return jnp.where(policy.depth >= 0, policy.depth, jnp.where(probe, max_draft, best)).astype(jnp.int32)


def shortened(policy: Policy, depth_S: jax.Array, confidence_SK: jax.Array | None) -> jax.Array:
    """Number of drafts that are verified, int32 [S]: fewer than were made where the depth is automatic and the rest is doubtful.

    Drafts end before the first one that is not worth its cost. A draft's confidence may depend on the drafts before it, never on
    itself, so whether it is offered does not depend on its value. Otherwise committed tokens would have another distribution.

    Args:
        depth_S: int32 [S], number of drafts that were made.
        confidence_SK: float32 [S, K], as in `Drafts`; None keeps them all.
    """
    if confidence_SK is None:
        return depth_S
    usable_SK = jnp.clip(jnp.where(jnp.isnan(confidence_SK), 0.0, confidence_SK), 0.0, 1.0)
    gain = jax.vmap(expected_tokens)(usable_SK) / policy.costs
    worth_SK = gain[:, 1:] >= gain[:, :-1]
    prefix_S = jnp.sum(jnp.cumprod(worth_SK.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)
    return jnp.where(policy.depth == AUTO, jnp.minimum(prefix_S, depth_S), depth_S)

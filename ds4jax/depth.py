"""How deep to draft: a fixed depth, or the one that pays best by what has been accepted and what a step costs.

Source: the break-even of the reference engine's adaptive cascade, generalised to any depth: a third row pays when
p1 > (1 + p0)·Δ / (p0·C), which is what comparing expected tokens per second of the two depths says.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

AUTO = -1
# One step in this many goes as deep as it can, so that a depth that did not pay is judged again.
PROBE_EVERY = 16
MEMORY = 1 / 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Policy:
    """What is asked for; traced, so that changing it compiles nothing.

    Attributes:
        depth: int32, drafts a step, or AUTO.
        costs: float32 [K+1], what a step of each depth takes, in any one unit; read when the depth is AUTO.
    """

    depth: jax.Array
    costs: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Acceptance:
    """What became of the drafts so far.

    Attributes:
        steps: int32.
        tried: int32 [K], steps in which a draft of this depth was made and those before it stood.
        stood: int32 [K], how often it stood then.
        recent: float32 [K], stood/tried with an exponential memory, 1 at the start.
    """

    steps: jax.Array
    tried: jax.Array
    stood: jax.Array
    recent: jax.Array

    @classmethod
    def none(cls, most: int) -> Acceptance:
        """Before the first step."""
        # Two arrays: the loop's state is donated, and one buffer cannot be given away twice.
        return cls(jnp.int32(0), jnp.zeros(most, jnp.int32), jnp.zeros(most, jnp.int32), jnp.ones(most, jnp.float32))

    def after(self, depth: jax.Array, count: jax.Array) -> Acceptance:
        """With one more step, of which `count` drafts stood out of `depth`."""
        index = jnp.arange(self.tried.shape[0], dtype=jnp.int32)
        tried, stood = (index < depth) & (index <= count), index < count
        recent = self.recent + MEMORY * (stood.astype(jnp.float32) - self.recent)
        return Acceptance(
            self.steps + 1,
            self.tried + tried.astype(jnp.int32),
            self.stood + (stood & tried).astype(jnp.int32),
            jnp.where(tried, recent, self.recent),
        )


def expected_tokens(recent_K: jax.Array) -> jax.Array:
    """Tokens that a step of each depth 0..K commits on average, float32 [K+1], from the share of each depth that stands."""
    return 1.0 + jnp.concatenate([jnp.zeros(1, jnp.float32), jnp.cumsum(jnp.cumprod(recent_K))])


def choose_depth(policy: Policy, acceptance: Acceptance) -> jax.Array:
    """Drafts of the next step, int32."""
    most = acceptance.tried.shape[0]
    best = jnp.argmax(expected_tokens(acceptance.recent) / policy.costs).astype(jnp.int32)
    probe = acceptance.steps % PROBE_EVERY == PROBE_EVERY - 1
    return jnp.where(policy.depth >= 0, policy.depth, jnp.where(probe, most, best)).astype(jnp.int32)

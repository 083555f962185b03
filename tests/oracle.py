"""A drafter that is told the truth and how much of it to say, so that every acceptance can be forced."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.bounds import NO_STOP
from ds4jax.cache.capacity import chunks, padded
from ds4jax.cache.state import Cache, LayerCache, Rows
from ds4jax.config import Config
from ds4jax.decode import loop as decode
from ds4jax.decode.depth import Policy
from ds4jax.decode.drafter import Drafts
from ds4jax.decode.loop import DecodeState, Limits
from ds4jax.decode.sampling import Filters, Sampling
from ds4jax.language_model import LanguageModel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """State of the oracle.

    Attributes:
        truth: int32 [S, capacity], the true tokens by position.
        right: int32 [S, n], how many drafts are right in each step, again from the first after the last.
        step: int32 [S], steps so far.
    """

    truth: jax.Array
    right: jax.Array
    step: jax.Array


@dataclasses.dataclass(frozen=True)
class Oracle:
    """Drafts the true tokens up to a number that its plan gives for each step, and a wrong one after them."""

    def init(self, config: Config, capacity: int, rows: int, sequences: int) -> Plan:
        zeros = [jnp.zeros((sequences, count), jnp.int32) for count in (capacity + rows, 1)]
        return Plan(*zeros, jnp.zeros(sequences, jnp.int32))

    def draft(
        self, model: Any, state: Plan, last_S: jax.Array, rows: Rows, depth_S: jax.Array, maximum: int, filters: Filters
    ) -> tuple[Drafts, Plan]:
        vocabulary = model.config.vocab_size
        index = jnp.arange(maximum, dtype=jnp.int32)
        truth_SK = jnp.take_along_axis(state.truth, rows.start[:, None] + 1 + index, axis=1)
        right_S1 = jnp.take_along_axis(state.right, (state.step % state.right.shape[1])[:, None], axis=1)
        tokens = jnp.where(index < right_S1, truth_SK, (truth_SK + 1) % vocabulary)
        q = jax.nn.one_hot(tokens, vocabulary, dtype=jnp.float32)
        return Drafts(tokens, q), dataclasses.replace(state, step=state.step + rows.end - rows.start)

    def commit(self, model: Any, state: Plan, h_TND: jax.Array, next_ids_T: jax.Array, rows: Rows) -> Plan:
        return state


def prefilled(model: LanguageModel, prompt: np.ndarray, capacity: int, drafter: Any, *, strict: bool = False) -> DecodeState:
    """The state after a prompt, int32 [T], for `continued`."""
    known = len(prompt) - 1
    state = decode.start(model.config, capacity, [int(prompt[-1])], drafter=drafter, max_draft=model.max_draft)
    cache, drafting = state.cache, state.drafting
    for start, width, count in chunks(known, known):
        ids, following = padded(prompt, start, width), padded(prompt, start + 1, width)
        rows = jnp.int32(count)
        cache, drafting = decode.prefill(
            model.graph, model.arrays, cache, drafting, ids, following, rows, drafter=drafter, strict=strict
        )
    return dataclasses.replace(state, cache=cache, drafting=drafting)


def continued(
    model: LanguageModel,
    state: DecodeState,
    tokens: int,
    depth: int,
    drafter: Any,
    *,
    strict: bool = False,
    stop: int = NO_STOP,
    sampling: Sampling | None = None,
) -> DecodeState:
    """`tokens` more at a depth, from a copy of the state; the same executable for every depth."""
    state, _ = decode.run(
        model.graph,
        model.arrays,
        jax.tree.map(jnp.copy, state),
        Limits.of([tokens], [int(state.count[0]) + tokens], [[stop]]),
        Filters.of([sampling or Sampling()]),
        Policy(jnp.full(1, depth, jnp.int32), jnp.ones(1 + model.max_draft, jnp.float32)),
        drafter=drafter,
        max_draft=model.max_draft,
        strict=strict,
    )
    return state


def told(state: DecodeState, truth: np.ndarray, right: list[int]) -> DecodeState:
    """The state with a plan for its oracle: the true tokens by position, and how many drafts are right in each step.

    `right` always has the same length in a test file, since another one would be another program.
    """
    known = jnp.zeros_like(state.drafting.truth).at[:, : len(truth)].set(jnp.asarray(truth, jnp.int32))
    return dataclasses.replace(state, drafting=Plan(known, jnp.asarray([right], jnp.int32), jnp.zeros(1, jnp.int32)))


def visible(config: Config, cache: Cache, mtp: LayerCache | None = None) -> dict[str, np.ndarray]:
    """Everything that a later row can see or be pooled from, by name, in order of position."""
    length = int(cache.length[0])
    found = {"length": np.asarray(cache.length)}
    layers = list(zip(cache.layers, config.layer_ratios, strict=True)) + ([(mtp, config.mtp_ratio)] if mtp else [])
    for i, (layer, ratio) in enumerate(layers):
        found[f"{i}.window"] = _latest(layer.window, length, config.window)
        for name in ("compressor", "indexer"):
            part = getattr(layer, name)
            if part is not None:
                # The unfinished block, and the one before it where blocks overlap.
                pending = length % ratio + (ratio if ratio == 4 else 0)
                found[f"{i}.{name}.values"] = _latest(part.values, length, pending)
                found[f"{i}.{name}.gates"] = _latest(part.gates, length, pending)
                found[f"{i}.{name}.rows"] = np.asarray(part.rows)[0, : length // ratio]
    return found


def _latest(ring: jax.Array, length: int, count: int) -> np.ndarray:
    positions = np.arange(max(length - count, 0), length)
    return np.asarray(ring)[0, positions % max(ring.shape[1], 1)]

"""The compiled decode loops of a benchmark, and their start states."""

from __future__ import annotations

import dataclasses
import functools
import time
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ds4jax.bounds import NO_STOP
from ds4jax.config import Config
from ds4jax.decode import loop as decode
from ds4jax.decode.depth import Policy
from ds4jax.decode.drafters.named import named
from ds4jax.decode.loop import DecodeState, Limits
from ds4jax.decode.module import Graph
from ds4jax.decode.sampling import Filters, Sampling
from ds4jax.engine import compile
from ds4jax.loading.placement import everywhere
from ds4jax.random_models.checkpoint import spread_numbers
from ds4jax.random_models.oracle import OracleDrafter
from pallas_kernels.attention.stored_rows import NarrowKeys, NarrowRows, Stored, narrow_keys, narrow_rows
from pallas_kernels.core import rounding

FIRST_TOKEN = 1
RUNS = 3
GREEDY = Sampling()
# How the benchmarks sample: over the whole vocabulary, of which top-p keeps a part.
SAMPLED = Sampling(temperature=1.0, top_p=0.95)
# The same work with the greedy tokens. What it takes longer than greedy is the sampling; other tokens read other experts.
SAMPLED_FIRST = dataclasses.replace(SAMPLED, top_k=1)


@dataclasses.dataclass(frozen=True)
class Program:
    """One executable: a decode loop for at most `max_draft` drafts per step, strict or not.

    Attributes:
        inner: the name of the drafter whose drafts may be replaced.
        sequences: S, number of sequences.
    """

    max_draft: int
    strict: bool = False
    inner: str = "mtp"
    sequences: int = 1

    @property
    def name(self) -> str:
        """Name in the results."""
        many = f", {self.sequences} sequences" if self.sequences > 1 else ""
        return f"max_draft {self.max_draft}{' strict' if self.strict else ''}{many}"

    @property
    def drafter(self) -> OracleDrafter | None:
        """The program's drafter, a static argument; None without drafts."""
        inner = named(self.inner)
        return OracleDrafter(inner) if self.max_draft and inner else None


def randomised(tree: Any, name: str) -> Any:
    """Replace each float32 array of a tree by random numbers of standard deviation 1, each in its own buffer.

    Narrow rows and keys are replaced by the codes of such numbers. Other arrays stay.
    """

    def one(path: tuple, leaf: Stored) -> Stored:
        seed = jnp.uint32(zlib.crc32((name + jax.tree_util.keystr(path)).encode()))
        if isinstance(leaf, NarrowRows):
            return _random_rows(leaf.shape, leaf.turning.shape[-1], seed)
        if isinstance(leaf, NarrowKeys):
            return _random_keys(leaf.shape, seed)
        return leaf if leaf.dtype != jnp.float32 else spread_numbers(leaf.shape, leaf.dtype, 1.0, seed)

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=lambda node: isinstance(node, NarrowRows | NarrowKeys))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _random_rows(shape: tuple[int, ...], rope: int, seed: jax.Array) -> NarrowRows:
    plain, rotary = jnp.split(spread_numbers(shape, jnp.dtype("float32"), 1.0, seed), [shape[-1] - rope], axis=-1)
    return narrow_rows(jnp.concatenate([rounding.fp8_rows(plain), rotary], axis=-1), rope)


@functools.partial(jax.jit, static_argnums=0)
def _random_keys(shape: tuple[int, ...], seed: jax.Array) -> NarrowKeys:
    return narrow_keys(rounding.fp4_rows(spread_numbers(shape, jnp.dtype("float32"), 1.0, seed)))


def filled(config: Config, program: Program, context: int, capacity: int) -> DecodeState:
    """A state whose caches, including the MTP block's, hold `context` rows of random values.

    Sequence s starts with the same token and the same rows in programs of any number of sequences.
    """
    alone = [_alone(config, program, context, capacity, s) for s in range(program.sequences)]
    if len(alone) == 1:
        return alone[0]
    together: DecodeState = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *alone)
    return together


def _alone(config: Config, program: Program, context: int, capacity: int, number: int) -> DecodeState:
    """The state of sequence `number`, with S = 1."""
    last, own = (FIRST_TOKEN + number) % config.vocab_size, f" {number}" if number else ""
    state = decode.start(config, capacity, [last], drafter=program.drafter, max_draft=program.max_draft)
    cache = dataclasses.replace(randomised(state.cache, f"cache{own}"), length=jnp.full(1, context, jnp.int32))
    return dataclasses.replace(state, cache=cache, drafting=randomised(state.drafting, f"drafting{own}"))


def with_truth(state: DecodeState, tokens: np.ndarray) -> DecodeState:
    """The state with an oracle that knows the tokens int32 [n] to come."""
    first = int(state.cache.length[0]) + 1
    truth = np.zeros(state.drafting.truth.shape, np.int32)
    part = tokens[: truth.shape[1] - first]
    truth[:, first : first + len(part)] = part
    drafting = dataclasses.replace(state.drafting, truth=jnp.asarray(truth), forced=jnp.ones(1, bool))
    return dataclasses.replace(state, drafting=drafting)


@dataclasses.dataclass(frozen=True)
class Loop:
    """A compiled program with its weights and the start state of every run.

    Attributes:
        lower_seconds, compile_seconds: times of tracing and of compiling, in parallel with other programs.
    """

    program: Program
    config: Config
    executable: Any
    weights: tuple[jax.Array, ...]
    start: DecodeState
    lower_seconds: float
    compile_seconds: float

    def fresh(self, state: DecodeState | None = None) -> DecodeState:
        """A copy of a state, by default of the start state. Runs donate their state, so each needs a copy."""
        return jax.block_until_ready(jax.tree.map(jnp.copy, self.start if state is None else state))

    def run(self, state: DecodeState, tokens: int, depth: int) -> DecodeState:
        """Generate a number of tokens of each sequence at a depth, without a stop token. The host does not wait."""
        return self._called(state, arguments(self.program, tokens, depth))

    def _called(self, state: DecodeState, chosen: tuple[Any, ...]) -> DecodeState:
        made: DecodeState
        made, _ = self.executable(self.weights, state, *chosen)
        return made

    def timed(self, tokens: int, depth: int, sampling: Sampling = GREEDY) -> tuple[list[float], DecodeState]:
        """Milliseconds per step of several runs after a warm-up run, and the last run's state."""
        # Made once, as the engine keeps them: a random key alone takes several small programs.
        chosen = jax.block_until_ready(arguments(self.program, tokens, depth, sampling))
        samples, state = [], jax.block_until_ready(self._called(self.fresh(), chosen))
        for _ in range(RUNS):
            state = self.fresh()
            began = time.perf_counter()
            state = jax.block_until_ready(self._called(state, chosen))
            samples.append(1e3 * (time.perf_counter() - began) / int(state.acceptance.steps[0]))
        return samples, state


def arguments(program: Program, tokens: int, depth: int, sampling: Sampling = GREEDY) -> tuple[Any, ...]:
    """Limits, filters and policy of a run of a number of tokens at a depth, without a stop token.

    Args:
        tokens: of each sequence.
        sampling: of each sequence; sequence s adds s to the seed.
    """
    count = program.sequences
    policy = Policy(jnp.full(count, depth, jnp.int32), jnp.ones(1 + program.max_draft, jnp.float32))
    samplings = [dataclasses.replace(sampling, seed=int(sampling.seed or 0) + s) for s in range(count)]
    return Limits.of([tokens] * count, [tokens] * count, [[NO_STOP]] * count), Filters.of(samplings), policy


def lower(program: Program, graph: Graph, weights: tuple[jax.Array, ...], start: DecodeState) -> jax.stages.Lowered:
    """Lower the loop for a state; its shapes are enough."""
    lowered: jax.stages.Lowered = decode.lower_run(
        graph, weights, start, *arguments(program, 1, 0),
        drafter=program.drafter, max_draft=program.max_draft, strict=program.strict,
    )  # fmt: skip
    return lowered


def compiled(
    programs: Sequence[Program], config: Config, graph: Graph, weights: tuple[jax.Array, ...], context: int, capacity: int
) -> dict[Program, Loop]:
    """Compile all programs, each in its own thread while the next is traced. Their states are on each of the model's devices."""
    starts = [filled(config, program, context, capacity) for program in programs]
    starts = everywhere(starts, graph.mesh) if isinstance(graph.mesh, Mesh) else starts
    lowers = [functools.partial(lower, program, graph, weights, start) for program, start in zip(programs, starts, strict=True)]
    made = compile.compile_all(map(compile.Program, lowers), len(programs))
    return {
        program: Loop(program, config, one.executable, weights, start, one.lower_seconds, one.compile_seconds)
        for program, start, one in zip(programs, starts, made, strict=True)
    }

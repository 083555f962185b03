"""The compiled decode loops of a benchmark, and the states that they start from."""

from __future__ import annotations

import dataclasses
import functools
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ds4jax import decode
from ds4jax.bench.oracle import OracleDrafter
from ds4jax.bench.synthetic import spread_numbers
from ds4jax.config import Config
from ds4jax.decode import DecodeState, Limits
from ds4jax.depth import Policy
from ds4jax.model import fake_quant
from ds4jax.sampling import Sampling
from pallas_kernels.narrow import NarrowKeys, NarrowRows, Stored, narrow_keys, narrow_rows

NO_STOP = -1
FIRST_TOKEN = 1
RUNS = 3


@dataclasses.dataclass(frozen=True)
class Program:
    """One executable: a loop that can draft so many tokens, strict or not."""

    max_draft: int
    strict: bool = False

    @property
    def name(self) -> str:
        """As results name it."""
        return f"max_draft {self.max_draft}{' strict' if self.strict else ''}"

    @property
    def drafter(self) -> OracleDrafter | None:
        """Who drafts in it; static."""
        return OracleDrafter() if self.max_draft else None


def timed_compile(lowered: jax.stages.Lowered) -> tuple[Any, float]:
    """The compiled program and the seconds that it took, for threads that compile while others trace."""
    began = time.perf_counter()
    return lowered.compile(), time.perf_counter() - began


def randomised(tree: Any, name: str) -> Any:
    """Every float32 array of a tree replaced by random numbers of spread 1, each in a buffer of its own; the rest as it is.

    Narrow rows and keys are replaced by the codes of such numbers.
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
    still, turning = jnp.split(spread_numbers(shape, jnp.dtype("float32"), 1.0, seed), [shape[-1] - rope], axis=-1)
    return narrow_rows(jnp.concatenate([fake_quant.fp8(still), turning], axis=-1), rope)


@functools.partial(jax.jit, static_argnums=0)
def _random_keys(shape: tuple[int, ...], seed: jax.Array) -> NarrowKeys:
    return narrow_keys(fake_quant.fp4(spread_numbers(shape, jnp.dtype("float32"), 1.0, seed)))


def filled(config: Config, program: Program, context: int, capacity: int) -> DecodeState:
    """A state whose caches hold `context` rows of random values, the MTP block's likewise."""
    last = FIRST_TOKEN % config.vocab_size
    state = decode.start(config, capacity, last, drafter=program.drafter, max_draft=program.max_draft)
    cache = dataclasses.replace(randomised(state.cache, "cache"), length=jnp.full(1, context, jnp.int32))
    return dataclasses.replace(state, cache=cache, drafting=randomised(state.drafting, "drafting"))


def told(state: DecodeState, tokens: np.ndarray) -> DecodeState:
    """The state with an oracle that knows what follows: int32 [n] tokens."""
    first = int(state.cache.length[0]) + 1
    truth = np.zeros(state.drafting.truth.shape, np.int32)
    part = tokens[: len(truth) - first]
    truth[first : first + len(part)] = part
    drafting = dataclasses.replace(state.drafting, truth=jnp.asarray(truth), told=jnp.array(True))
    return dataclasses.replace(state, drafting=drafting)


@dataclasses.dataclass(frozen=True)
class Loop:
    """A compiled program with its weights and the state that every run starts from.

    Attributes:
        lower_seconds, compile_seconds: to trace it, and to compile it while others were traced or compiled.
    """

    program: Program
    config: Config
    executable: Any
    weights: nnx.State
    start: DecodeState
    lower_seconds: float
    compile_seconds: float

    def fresh(self, state: DecodeState | None = None) -> DecodeState:
        """A copy of a state, by default of the start; a run gives away what it gets."""
        return jax.block_until_ready(jax.tree.map(jnp.copy, self.start if state is None else state))

    def run(self, state: DecodeState, tokens: int, depth: int) -> DecodeState:
        """Generate so many tokens at a depth, whatever they are; the host does not wait."""
        made: DecodeState = self.executable(self.weights, state, *arguments(self.program, tokens, depth))
        return made

    def timed(self, tokens: int, depth: int) -> tuple[list[float], DecodeState]:
        """Milliseconds a step of each of several runs after one that warms up, and the last run's state."""
        samples, state = [], jax.block_until_ready(self.run(self.fresh(), tokens, depth))
        for _ in range(RUNS):
            state = self.fresh()
            began = time.perf_counter()
            state = jax.block_until_ready(self.run(state, tokens, depth))
            samples.append(1e3 * (time.perf_counter() - began) / int(state.acceptance.steps))
        return samples, state


def arguments(program: Program, tokens: int, depth: int) -> tuple[Any, ...]:
    """Limits, filters and policy of a run of so many tokens at a depth, whatever the tokens are."""
    most = jnp.int32(tokens)
    policy = Policy(jnp.int32(depth), jnp.ones(1 + program.max_draft, jnp.float32))
    return Limits(most, most, jnp.array([NO_STOP], jnp.int32)), Sampling().arrays(), policy


def lower(program: Program, graph: nnx.GraphDef, weights: nnx.State, start: DecodeState) -> jax.stages.Lowered:
    """The loop lowered for a state, of which the shapes are enough."""
    lowered: jax.stages.Lowered = decode.lower_run(
        graph, weights, start, *arguments(program, 1, 0),
        drafter=program.drafter, max_draft=program.max_draft, strict=program.strict,
    )  # fmt: skip
    return lowered


def compiled(
    programs: Sequence[Program], config: Config, graph: nnx.GraphDef, weights: nnx.State, context: int, capacity: int
) -> dict[Program, Loop]:
    """Compile all programs, each in a thread of its own while the next is traced."""

    pending = []
    with ThreadPoolExecutor(len(programs)) as pool:
        for program in programs:
            start = filled(config, program, context, capacity)
            began = time.perf_counter()
            lowered = lower(program, graph, weights, start)
            seconds = time.perf_counter() - began
            pending.append((program, start, seconds, pool.submit(timed_compile, lowered)))
        return {
            program: Loop(program, config, executable, weights, start, lower_seconds, compile_seconds)
            for program, start, lower_seconds, future in pending
            for executable, compile_seconds in [future.result()]
        }

"""Measures long contexts: time of a plain step and memory, with caches of 2 thousand to a million rows.

Weights and rows are random. Speeds are relative to the shortest context of the same run.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ds4jax.bench.programs import Program, arguments, filled, lower
from ds4jax.bench.whole_model import Note, Row, WholeModel, finite, good, longest, peak_bytes
from ds4jax.cache.capacity import capacity_for
from ds4jax.config import Config
from ds4jax.decode import loop as decode
from ds4jax.decode.depth import Acceptance
from ds4jax.decode.loop import DecodeState
from ds4jax.decode.module import Graph
from ds4jax.engine import compile
from ds4jax.engine.prefill import nbytes
from ds4jax.errors import InputError
from ds4jax.model.parameters import build
from ds4jax.random_models import checkpoint as synthetic
from pallas_kernels.core.timing import device_events

SCHEMA = 1
RUNS = 3
PROFILED = 8
TOP = 12
PLAIN = Program(0)

Weights = tuple[jax.Array, ...]

__all__ = ["Options", "bench", "good", "show"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        layout, layers: as in `ds4jax.bench.decode.Options`.
        caches: storage of compressed rows, "float32" or "narrow" each.
        contexts: rows in the caches before the first step, ascending.
        steps: tokens of each run.

    Raises:
        InputError: a context does not fit in the model's.
    """

    layout: str = "flash-q2"
    layers: int | None = None
    caches: tuple[str, ...] = ("float32",)
    contexts: tuple[int, ...] = (2048, 32768, 131072, 1_000_000)
    steps: int = 64

    def __post_init__(self) -> None:
        config, maximum = synthetic.config_of(self.layout, self.layers), max(self.contexts)
        if maximum + self.all_steps > config.max_context:
            raise InputError(f"context is {maximum} and steps {self.all_steps}; {self.layout} ends at {config.max_context}")

    @property
    def all_steps(self) -> int:
        """Steps of all runs; they follow each other in one cache."""
        return self.steps * (1 + RUNS) + PROFILED


def bench(options: Options, note: Note) -> Row:
    """Build, compile and time. Returns the content of a result file."""
    model = WholeModel.make(options.layout, options.layers, note)
    problems: list[str] = []
    rows: list[Row] = []
    for kind in options.caches:
        # Both caches use the same weights; only the graph differs.
        config, weights = dataclasses.replace(model.config, cache=kind), model.weights
        graph, _ = Graph.split(build(config, ((tensor.name, tensor.abstract) for tensor in model.checkpoint.tensors)))
        for context, executable in _compiled(options, config, graph, weights):
            row = {"cache": kind, **_measured(options, config, weights, context, executable, problems)}
            base = rows[0]["tokens_per_second"] if rows else row["tokens_per_second"]
            rows.append({**row, "relative": round(row["tokens_per_second"] / base, 4)})
            note(f"{kind} cache, context {context}: {row['ms_per_step']:.3f} ms a step, {rows[-1]['relative']:.3f} of the speed")
    return {
        "schema": SCHEMA,
        **model.fields(),
        "steps": options.steps,
        "weight_bytes": model.nbytes,
        "rows": rows,
        "problems": problems,
    }


def _compiled(options: Options, config: Config, graph: Graph, weights: Weights) -> list[tuple[int, Any]]:
    """A program for each context, each compiled in its own thread while others are traced."""
    starts = []
    for context in options.contexts:
        capacity = _capacity(options, config, context)
        starts.append(jax.eval_shape(lambda capacity=capacity: decode.start(config, capacity, [0], drafter=None, max_draft=0)))
    lowers = [functools.partial(lower, PLAIN, graph, weights, start) for start in starts]
    made = compile.compile_all(map(compile.Program, lowers), len(lowers))
    return [(context, one.executable) for context, one in zip(options.contexts, made, strict=True)]


def _capacity(options: Options, config: Config, context: int) -> int:
    return capacity_for(context + options.all_steps, config.max_context)


def _restarted(state: DecodeState) -> DecodeState:
    """The state without its generated tokens, with the same cache. A copy of the cache would not fit at a million rows."""
    return dataclasses.replace(state, count=jnp.zeros(1, jnp.int32), stopped=jnp.zeros(1, bool), acceptance=Acceptance.none(0))


def _measured(options: Options, config: Config, weights: Weights, context: int, executable: Any, problems: list[str]) -> Row:
    capacity = _capacity(options, config, context)
    state = jax.block_until_ready(filled(config, PLAIN, context, capacity))
    cache_bytes = nbytes(state.cache)
    samples = []
    for _ in range(1 + RUNS):
        state = jax.block_until_ready(_restarted(state))
        began = time.perf_counter()
        state, _ = jax.block_until_ready(executable(weights, state, *arguments(PLAIN, options.steps, 0)))
        samples.append(1e3 * (time.perf_counter() - began) / int(state.acceptance.steps[0]))
    if not finite(state.cache):
        problems.append(f"context {context}: values that are not finite")
    ms = statistics.median(samples[1:])
    return {
        "context": context,
        "capacity": capacity,
        "ms_per_step": round(ms, 4),
        "samples": [round(sample, 4) for sample in samples[1:]],
        "tokens_per_second": round(1e3 / ms, 2),
        "cache_bytes": cache_bytes,
        "temporary_bytes": getattr(executable.memory_analysis(), "temp_size_in_bytes", None),
        "peak_bytes": peak_bytes(),
        "kernels": _profiled(weights, state, executable),
    }


def _profiled(weights: Weights, state: DecodeState, executable: Any) -> list[Row]:
    """The longest kernels of a few more steps; none without a GPU."""
    if jax.default_backend() != "gpu":
        return []
    found = device_events(lambda: executable(weights, _restarted(state), *arguments(PLAIN, PROFILED, 0)))
    return longest(found, PROFILED, TOP)


def show(content: Mapping[str, Any]) -> None:
    """Print a table on stdout with a line for each context."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from ds4jax.bench.decode_report import title

    console = Console(width=max(150, Console().width), highlight=False, markup=False)
    made = Table(title=title({**content, "context": "below"}), box=box.SIMPLE)
    made.add_column("cache", no_wrap=True)
    for heading in ("context", "ms a step", "tokens/s", "of the first", "cache GB", "temporaries GB", "peak GB"):
        made.add_column(heading, justify="right", no_wrap=True)
    for row in content["rows"]:
        sizes = (row["cache_bytes"], row["temporary_bytes"], row["peak_bytes"])
        cells = ("" if size is None else f"{size / 1e9:.2f}" for size in sizes)
        speed = (f"{row['ms_per_step']:.3f}", f"{row['tokens_per_second']:.1f}", f"{row['relative']:.3f}")
        made.add_row(row["cache"], f"{row['context']:,}", *speed, *cells)
    console.print(made)
    for problem in content["problems"]:
        console.print(f"problem: {problem}")

"""Decode at length: the time of a plain step with caches of 2 thousand to a million rows, and what they take.

Weights and rows are random. The figure to compare with is that of the shortest context in the same run.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ds4jax import decode
from ds4jax.bench import synthetic
from ds4jax.bench.programs import Program, arguments, filled, lower
from ds4jax.bench.whole import Note, Row, Whole, finite, good, longest, peak_bytes
from ds4jax.buckets import capacity_for
from ds4jax.config import Config
from ds4jax.decode import DecodeState
from ds4jax.depth import Acceptance
from ds4jax.errors import InputError
from ds4jax.generation import nbytes
from ds4jax.model.parameters import build
from pallas_kernels.timing import device_events

SCHEMA = 1
RUNS = 3
PROFILED = 8
TOP = 12
PLAIN = Program(0)

__all__ = ["Options", "bench", "good", "show"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        layout, layers: as for `ds4jax.bench.decode.Options`.
        caches: of "float32" and "narrow", how compressed rows are stored.
        contexts: rows in the caches before the first step, ascending.
        steps: tokens of each run.

    Raises:
        InputError: a context that the model does not have.
    """

    layout: str = "flash-q2"
    layers: int | None = None
    caches: tuple[str, ...] = ("float32",)
    contexts: tuple[int, ...] = (2048, 32768, 131072, 1_000_000)
    steps: int = 64

    def __post_init__(self) -> None:
        config, most = synthetic.config_of(self.layout, self.layers), max(self.contexts)
        if most + self.all_steps > config.max_context:
            raise InputError(f"context is {most} and steps {self.all_steps}; {self.layout} ends at {config.max_context}")

    @property
    def all_steps(self) -> int:
        """Steps of all runs, one after the other in the same cache."""
        return self.steps * (1 + RUNS) + PROFILED


def bench(options: Options, note: Note) -> Row:
    """Build, compile and time; returns the content of a result file."""
    model = Whole.make(options.layout, options.layers, note)
    problems: list[str] = []
    rows: list[Row] = []
    for kind in options.caches:
        # The weights are the same for either; what the model does with them is not.
        config, weights = dataclasses.replace(model.config, cache=kind), model.weights
        graph, _ = nnx.split(build(config, ((tensor.name, tensor.abstract) for tensor in model.checkpoint.tensors)))
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


def _compiled(options: Options, config: Config, graph: nnx.GraphDef, weights: nnx.State) -> list[tuple[int, Any]]:
    """A program for each context, compiled in threads of their own while others are traced."""
    pending = []
    with ThreadPoolExecutor(len(options.contexts)) as pool:
        for context in options.contexts:
            capacity = _capacity(options, config, context)
            start = jax.eval_shape(lambda capacity=capacity: decode.start(config, capacity, 0, drafter=None, max_draft=0))
            lowered = lower(PLAIN, graph, weights, start)
            pending.append((context, pool.submit(lowered.compile)))
        return [(context, future.result()) for context, future in pending]


def _capacity(options: Options, config: Config, context: int) -> int:
    return capacity_for(context + options.all_steps, config.max_context)


def _again(state: DecodeState) -> DecodeState:
    """The state with everything that it generated forgotten and its cache kept; a copy would not fit at a million rows."""
    return dataclasses.replace(state, count=jnp.int32(0), stopped=jnp.array(False), acceptance=Acceptance.none(0))


def _measured(options: Options, config: Config, weights: nnx.State, context: int, executable: Any, problems: list[str]) -> Row:
    capacity = _capacity(options, config, context)
    state = jax.block_until_ready(filled(config, PLAIN, context, capacity))
    cache_bytes = nbytes(state.cache)
    samples = []
    for _ in range(1 + RUNS):
        state = jax.block_until_ready(_again(state))
        began = time.perf_counter()
        state = jax.block_until_ready(executable(weights, state, *arguments(PLAIN, options.steps, 0)))
        samples.append(1e3 * (time.perf_counter() - began) / int(state.acceptance.steps))
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


def _profiled(weights: nnx.State, state: DecodeState, executable: Any) -> list[Row]:
    """The longest kernels of a few more steps, where there is a profiler for them."""
    if jax.default_backend() != "gpu":
        return []
    found = device_events(lambda: executable(weights, _again(state), *arguments(PLAIN, PROFILED, 0)))
    return longest(found, PROFILED, TOP)


def show(content: Mapping[str, Any]) -> None:
    """Print a table on stdout, a line for each context."""
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

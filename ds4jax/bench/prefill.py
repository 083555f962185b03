"""Prefill at full shape: tokens a second, memory beside weights and cache, and where a call's time goes.

Weights are random, and so are the prompt's tokens; every call has the shapes that a real prompt of that length has.
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
import numpy as np
from flax import nnx

from ds4jax import decode
from ds4jax.bench import synthetic
from ds4jax.bench.programs import timed_compile
from ds4jax.bench.whole import Note, Row, Whole, finite, good, longest, peak_bytes
from ds4jax.buckets import capacity_for
from ds4jax.cache import Cache
from ds4jax.config import Config
from ds4jax.errors import InputError
from ds4jax.generation import nbytes
from pallas_kernels.timing import device_events

SCHEMA = 1
RUNS = 2
# Tokens that are to follow a prompt, for which its cache has room.
FOLLOWING = 128
TOP = 15

__all__ = ["Options", "bench", "good", "show"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        layout: a name in `synthetic.LAYOUTS`.
        layers: the first layers alone; None takes all.
        tokens: lengths of the prompts.
        chunk: rows of a call; prompts are a multiple of it, or shorter.

    Raises:
        InputError: what cannot be measured; the message names it.
    """

    layout: str = "flash-q2"
    layers: int | None = None
    tokens: tuple[int, ...] = (4096, 32768)
    chunk: int = 4096

    def __post_init__(self) -> None:
        config = synthetic.config_of(self.layout, self.layers)
        for tokens in self.tokens:
            if tokens + FOLLOWING > config.max_context:
                raise InputError(f"tokens is {tokens}; {self.layout} ends at {config.max_context}, {FOLLOWING} of them to follow")
            if tokens > self.chunk and tokens % self.chunk:
                raise InputError(f"tokens is {tokens}; a prompt longer than a chunk of {self.chunk} must be a multiple of it")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A compiled call of one width into a cache for one length.

    Attributes:
        tokens: of the whole prompt.
        width: rows of a call.
        lower_seconds, compile_seconds: to trace and to compile it, others beside it.
    """

    config: Config
    tokens: int
    width: int
    executable: Any
    weights: nnx.State
    lower_seconds: float
    compile_seconds: float

    @property
    def capacity(self) -> int:
        """Rows of the cache."""
        return capacity_for(self.tokens + FOLLOWING, self.config.max_context)

    def empty(self) -> Cache:
        """A cache without a row."""
        return jax.block_until_ready(decode.start(self.config, self.capacity, 0, drafter=None, max_draft=0).cache)

    def call(self, cache: Cache, ids_T: jax.Array) -> Cache:
        """Take one chunk in; the cache is given away."""
        made, _ = self.executable(self.weights, cache, None, ids_T, ids_T, jnp.int32(self.width))
        return made

    def run(self) -> tuple[float, list[float], Cache]:
        """Seconds of a whole prompt, milliseconds of each call when waited for, and the cache."""
        chunks = [jnp.asarray(_tokens(self.config, self.width, i)) for i in range(self.tokens // self.width)]
        cache = self.empty()
        began = time.perf_counter()
        for ids_T in chunks:
            cache = self.call(cache, ids_T)
        jax.block_until_ready(cache)
        seconds, each, cache = time.perf_counter() - began, [], self.empty()
        for ids_T in chunks:
            began = time.perf_counter()
            cache = jax.block_until_ready(self.call(cache, ids_T))
            each.append(1e3 * (time.perf_counter() - began))
        return seconds, each, cache


def _tokens(config: Config, width: int, chunk: int) -> np.ndarray:
    return np.random.default_rng(chunk).integers(0, config.vocab_size, width, dtype=np.int32)


def bench(options: Options, note: Note) -> Row:
    """Build, compile, time and profile; returns the content of a result file."""
    model = Whole.make(options.layout, options.layers, note)
    problems: list[str] = []
    rows = [_measured(prompt, model.nbytes, problems, note) for prompt in _compiled(options, model)]
    return {
        "schema": SCHEMA,
        **model.fields(),
        "chunk": options.chunk,
        "weight_bytes": model.nbytes,
        "rows": rows,
        "problems": problems,
    }


def _compiled(options: Options, model: Whole) -> list[Prompt]:
    """A program for each length, compiled in a thread of its own while the next is traced."""
    config, pending = model.config, []
    with ThreadPoolExecutor(len(options.tokens)) as pool:
        for tokens in options.tokens:
            width = min(tokens, options.chunk)
            capacity = capacity_for(tokens + FOLLOWING, config.max_context)
            start = jax.eval_shape(lambda capacity=capacity: decode.start(config, capacity, 0, drafter=None, max_draft=0))
            began = time.perf_counter()
            lowered = decode.lower_prefill(model.graph, model.weights, start, width, drafter=None, strict=False)
            pending.append((tokens, width, time.perf_counter() - began, pool.submit(timed_compile, lowered)))
        return [
            Prompt(config, tokens, width, executable, model.weights, seconds, compile_seconds)
            for tokens, width, seconds, future in pending
            for executable, compile_seconds in [future.result()]
        ]


def _measured(prompt: Prompt, held: int, problems: list[str], note: Note) -> Row:
    prompt.run()
    runs = []
    for _ in range(RUNS):
        seconds, each, cache = prompt.run()
        runs.append((seconds, each))
    if not finite(cache):
        problems.append(f"{prompt.tokens} tokens: values that are not finite")
    cache_bytes = nbytes(cache)
    del cache
    seconds = statistics.median(seconds for seconds, _ in runs)
    analysis = prompt.executable.memory_analysis()
    peak = peak_bytes()
    row: Row = {
        "tokens": prompt.tokens,
        "width": prompt.width,
        "capacity": prompt.capacity,
        "seconds": [round(seconds, 4) for seconds, _ in runs],
        "tokens_per_second": round(prompt.tokens / seconds, 1),
        "call_ms": [round(ms, 2) for ms in runs[-1][1]],
        "cache_bytes": cache_bytes,
        "temporary_bytes": getattr(analysis, "temp_size_in_bytes", None),
        "peak_bytes": peak,
        "peak_beside": peak - held - cache_bytes if peak else None,
        "trace_seconds": round(prompt.lower_seconds, 2),
        "compile_seconds": round(prompt.compile_seconds, 2),
        "kernels": _profiled(prompt, problems),
    }
    note(f"{prompt.tokens} tokens: {row['tokens_per_second']:.0f} a second")
    return row


def _profiled(prompt: Prompt, problems: list[str]) -> list[Row]:
    """The longest kernels of the prompt's last call, where there is a profiler for them."""
    if jax.default_backend() != "gpu":
        return []
    start = dataclasses.replace(prompt.empty(), length=jnp.full(1, prompt.tokens - prompt.width, jnp.int32))
    ids_T = jnp.asarray(_tokens(prompt.config, prompt.width, 0))
    found = device_events(lambda: prompt.call(start, ids_T))
    if not found:
        problems.append(f"{prompt.tokens} tokens: the trace holds no kernels")
        return []
    return longest(found, 1, TOP)


def show(content: Mapping[str, Any]) -> None:
    """Print a table of the prompts and the longest kernels of each one's last call on stdout."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from ds4jax.bench.decode_report import LONGEST_NAME, title

    console = Console(width=max(150, Console().width), highlight=False, markup=False)
    made = Table(title=title({**content, "context": "0"}), box=box.SIMPLE)
    for heading in ("tokens", "a call", "tokens/s", "first call ms", "last call ms", "temporaries GB", "cache GB", "peak GB"):
        made.add_column(heading, justify="right", no_wrap=True)
    for row in content["rows"]:
        sizes = (row["temporary_bytes"], row["cache_bytes"], row["peak_bytes"])
        cells = ("" if size is None else f"{size / 1e9:.2f}" for size in sizes)
        times = (f"{row['call_ms'][place]:.1f}" for place in (0, -1))
        made.add_row(f"{row['tokens']}", f"{row['width']}", f"{row['tokens_per_second']:.0f}", *times, *cells)
    console.print(made)
    for row in content["rows"]:
        if row["kernels"]:
            kernels = Table(title=f"kernels of the last call of {row['tokens']} tokens", box=box.SIMPLE)
            for heading in ("kernel", "calls", "ms", "share"):
                kernels.add_column(heading, justify="left" if heading == "kernel" else "right", no_wrap=True)
            for kernel in row["kernels"]:
                name, calls = kernel["name"][:LONGEST_NAME], f"{kernel['calls']:g}"
                kernels.add_row(name, calls, f"{kernel['us'] / 1e3:.2f}", f"{kernel['share']:.3f}")
            console.print(kernels)
    for problem in content["problems"]:
        console.print(f"problem: {problem}")

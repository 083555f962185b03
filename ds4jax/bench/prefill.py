"""Measures prefill at full shape: tokens/s, memory in addition to weights and cache, and the longest kernels.

Weights and tokens are random. Each call has the shapes of a real prompt of that length.
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
import numpy as np

from ds4jax.bench.whole_model import Note, Row, WholeModel, finite, good, longest, peak_bytes
from ds4jax.cache.capacity import capacity_for
from ds4jax.cache.state import Cache
from ds4jax.config import Config
from ds4jax.decode import loop as decode
from ds4jax.engine import compile
from ds4jax.engine.prefill import nbytes
from ds4jax.errors import InputError
from ds4jax.random_models import checkpoint as synthetic
from pallas_kernels.core.timing import device_events

SCHEMA = 1
RUNS = 2
# Tokens after a prompt for which its cache has room.
FOLLOWING = 128
TOP = 15

__all__ = ["Options", "bench", "good", "show"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        layout: a name in `LAYOUT_NAMES`.
        layers: number of first layers; None for all.
        tokens: lengths of the prompts.
        chunk: rows of a call; each prompt is a multiple of it, or shorter.

    Raises:
        InputError: the options cannot be measured; the message names the option.
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
    """The compiled prefill call for prompts of one length.

    Attributes:
        tokens: length of the prompt.
        width: rows of a call.
        lower_seconds, compile_seconds: times of tracing and of compiling, in parallel with other programs.
    """

    config: Config
    tokens: int
    width: int
    executable: Any
    weights: tuple[jax.Array, ...]
    lower_seconds: float
    compile_seconds: float

    @property
    def capacity(self) -> int:
        """Rows of the cache."""
        return capacity_for(self.tokens + FOLLOWING, self.config.max_context)

    def empty(self) -> Cache:
        """An empty cache."""
        return jax.block_until_ready(decode.start(self.config, self.capacity, [0], drafter=None, max_draft=0).cache)

    def call(self, cache: Cache, ids_T: jax.Array) -> Cache:
        """Prefill one chunk; the cache is donated."""
        made, _ = self.executable(self.weights, cache, None, ids_T, ids_T, jnp.int32(self.width))
        return made

    def run(self) -> tuple[float, list[float], Cache]:
        """Prefill the prompt twice: seconds of all calls together, then milliseconds of each call. Also returns the cache."""
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
    """Build, compile, time and profile. Returns the content of a result file."""
    model = WholeModel.make(options.layout, options.layers, note)
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


def _compiled(options: Options, model: WholeModel) -> list[Prompt]:
    """A program for each length, each compiled in its own thread while the next is traced."""
    config, calls, lowers = model.config, [], []
    for tokens in options.tokens:
        width, capacity = min(tokens, options.chunk), capacity_for(tokens + FOLLOWING, config.max_context)
        start = jax.eval_shape(lambda capacity=capacity: decode.start(config, capacity, [0], drafter=None, max_draft=0))
        lower = functools.partial(decode.lower_prefill, model.graph, model.weights, start, width, drafter=None, strict=False)
        calls.append((tokens, width))
        lowers.append(lower)
    return [
        Prompt(config, tokens, width, one.executable, model.weights, one.lower_seconds, one.compile_seconds)
        for (tokens, width), one in zip(calls, compile.compile_all(map(compile.Program, lowers), len(lowers)), strict=True)
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
    """The longest kernels of the prompt's last call; none without a GPU."""
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
    """Print a table of the prompts on stdout, and the longest kernels of each prompt's last call."""
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

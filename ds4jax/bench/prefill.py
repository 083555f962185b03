"""Measures prompts at full shape: the time to the first token by the prompt's length, prefix cache empty or filled.

Weights and tokens are random. A prompt goes the way of an engine's requests, through the same programs, without its threads.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
import time
from typing import Any

import jax
import numpy as np

from ds4jax.bench import prefill_floor
from ds4jax.bench.traffic import step_bytes
from ds4jax.bench.whole_model import Note, Row, WholeModel, finite, good, longest, peak_bytes
from ds4jax.cache.capacity import CALL_ROWS, capacity_for, cut
from ds4jax.config import Config
from ds4jax.decode.module import merged
from ds4jax.engine.intake import Intake
from ds4jax.engine.prefix import PrefixCache
from ds4jax.engine.request import Request
from ds4jax.engine.shape import Shape, state_bytes, with_widths
from ds4jax.engine.slots import Slots
from ds4jax.engine.wish import Wish
from ds4jax.errors import InputError
from ds4jax.language_model import LanguageModel
from ds4jax.loading.plan import plan
from ds4jax.random_models import checkpoint as synthetic
from pallas_kernels.core.timing import device_events

SCHEMA = 2
RUNS = 2
# Tokens after a prompt for which its cache has room.
FOLLOWING = 128
TOP = 15
# Calls whose kernels are timed.
LOOKED_AT = (256, 4096)
PREFIX_BYTES = 8_000_000_000
# Names of kernels of the routed experts in a prompt's calls.
EXPERTS = re.compile(r"gate_up|(grouped|stored|few)_down|dequantise_")

__all__ = ["Options", "bench", "good"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        layout: a name in `LAYOUT_NAMES`.
        layers: number of first layers; None for all.
        tokens: rows of the prompts. A prompt has one token more, which the first step takes in.
        chunk: maximum rows of a call; None for an engine's default.

    Raises:
        InputError: the options cannot be measured; the message names the option.
    """

    layout: str = "flash-q2"
    layers: int | None = None
    tokens: tuple[int, ...] = (16, 64, 256, 1024, 4096, 8192, 32768)
    chunk: int | None = None

    def __post_init__(self) -> None:
        end = synthetic.config_of(self.layout, self.layers).max_context
        for tokens in self.tokens:
            if tokens + FOLLOWING > end:
                raise InputError(f"tokens is {tokens}; {self.layout} ends at {end}, {FOLLOWING} of them to follow")


@dataclasses.dataclass(frozen=True)
class Prompts:
    """An engine's slot for prompts up to a length."""

    model: LanguageModel
    slots: Slots
    context: int

    @classmethod
    def of(cls, options: Options, built: WholeModel) -> Prompts:
        """Start compiling the programs, all at the same time."""
        model, context = LanguageModel(merged(built.graph, built.weights), None, max_draft=0), max(options.tokens) + FOLLOWING
        free = Shape(1, capacity_for(context, built.config.max_context), (), False, None)
        return cls(model, Slots(model, with_widths(model, free, context, options.chunk)), context)

    def request(self, rows: int, seed: int) -> Request:
        """A request for one token after a random prompt."""
        ids = tokens_of(self.model.config, rows + 1, seed)
        wish = Wish.of(self.model, self.context - len(ids), max_new_tokens=1, ignore_eos=True)
        return Request(self.model, ids, wish, drafter="none", strict=False, wake=_nobody)

    def first_token(self, request: Request, prefix: PrefixCache) -> float:
        """Milliseconds until the request's first token is on the host."""
        began = time.perf_counter()
        intake = Intake(self.slots, prefix, 0, request)
        while not intake.turn():
            pass
        self.slots.step(1)
        took = 1e3 * (time.perf_counter() - began)
        return took

    def temporary_bytes(self) -> dict[str, int | None]:
        """Bytes of a call's temporary arrays by its width."""
        programs = self.slots.compiled()
        analysed = {width: programs[width].memory_analysis() for width in self.slots.shape.widths}
        return {str(width): getattr(one, "temp_size_in_bytes", None) for width, one in analysed.items()}


def _nobody() -> None:
    """There is no scheduler to wake."""


def tokens_of(config: Config, count: int, seed: int) -> np.ndarray:
    """Random tokens, int32 [count]."""
    return np.random.default_rng([seed, count]).integers(0, config.vocab_size, count, dtype=np.int32)


def bench(options: Options, note: Note) -> Row:
    """Build, compile, time and profile. Returns the content of a result file."""
    built = WholeModel.make(options.layout, options.layers, note)
    began = time.perf_counter()
    prompts, problems = Prompts.of(options, built), list[str]()
    prompts.slots.warm()
    seconds = time.perf_counter() - began
    shape = prompts.slots.shape
    note(f"programs for calls of {', '.join(map(str, shape.widths))} rows and a step made in {seconds:.1f} s")
    rows = [_measured(prompts, built, tokens, note) for tokens in sorted(options.tokens)]
    if not finite(prompts.slots.state.cache):
        problems.append("values that are not finite")
    return {
        "schema": SCHEMA,
        **built.fields(),
        "widths": shape.widths,
        "call_rows": CALL_ROWS,
        "weight_bytes": built.nbytes,
        "state_bytes": state_bytes(prompts.model, shape),
        "temporary_bytes": prompts.temporary_bytes(),
        "programs_seconds": round(seconds, 1),
        "rows": rows,
        "calls": [_call(prompts, built, width, problems, note) for width in shape.widths if width in LOOKED_AT],
        "peak_bytes": peak_bytes(),
        "problems": problems,
    }


def _measured(prompts: Prompts, built: WholeModel, tokens: int, note: Note) -> Row:
    """Time new prompts, each once more after it, and the least time."""
    prefix, cold, warm, reused = PrefixCache(ahead=0, maximum=PREFIX_BYTES), [], [], 0
    for seed in range(1 + RUNS):
        times = []
        for _ in range(2):
            request = prompts.request(tokens, seed)
            times.append(prompts.first_token(request, prefix))
            prompts.slots.free(0)
            prefix.settle()
            reused = request.reused
        # The first prompt of a length makes the small programs that move its states.
        if seed:
            cold.append(times[0])
            warm.append(times[1])
    bytes_read, operations = prefill_floor.work(built.config, built.checkpoint.tensors, tokens)
    step = step_bytes(plan(built.checkpoint, prompts.context), built.config, 0)
    bandwidth = built.bandwidth
    floor = prefill_floor.milliseconds(bytes_read, operations, bandwidth) + step / bandwidth / 1e6 if bandwidth else None
    ms = statistics.median(cold)
    row: Row = {
        "tokens": tokens,
        "calls": list(cut(tokens, prompts.slots.shape.widths)),
        "cold_ms": [round(sample, 2) for sample in cold],
        "warm_ms": [round(sample, 2) for sample in warm],
        "reused": reused,
        "tokens_per_second": round(1e3 * tokens / ms, 1),
        "bytes": bytes_read,
        "operations": operations,
        "step_bytes": step,
        "floor_ms": floor and round(floor, 2),
    }
    note(f"{tokens} tokens: {ms:.1f} ms to the first token, {statistics.median(warm):.1f} ms with {reused} rows known")
    return row


def _call(prompts: Prompts, built: WholeModel, width: int, problems: list[str], note: Note) -> Row:
    """Time one call, and its kernels if there is a GPU: per layer, and the rate of the routed experts' products."""
    config, ids = built.config, tokens_of(built.config, width + 1, 0)

    def call() -> Any:
        prompts.slots.prefill(0, ids, 0, width, width)
        return prompts.slots.state.cache.length

    samples = []
    for _ in range(1 + RUNS):
        began = time.perf_counter()
        call()
        samples.append(1e3 * (time.perf_counter() - began))
        prompts.slots.free(0)
    # The last layer makes only its rows of the cache.
    layers, ms = max(config.n_layers - 1, 1), statistics.median(samples[1:])
    row: Row = {"width": width, "ms": round(ms, 2), "ms_per_layer": round(ms / layers, 4), "experts": None, "kernels": []}
    if jax.default_backend() != "gpu":
        return row
    found = device_events(call)
    prompts.slots.free(0)
    experts = sum(us for name, us in found if EXPERTS.search(name))
    if not experts:
        problems.append(f"call of {width} rows: the trace holds no kernels of experts")
        return row
    operations = 6 * width * config.n_active * config.dim * config.moe_dim * layers
    row["experts"] = {
        "ms": round(experts / 1e3, 3),
        "ms_per_layer": round(experts / 1e3 / layers, 4),
        "tflops": round(operations / experts / 1e6, 1),
    }
    row["kernels"] = longest(found, 1, TOP)
    note(f"call of {width} rows: {ms:.1f} ms, experts {row['experts']['tflops']} TFLOP/s")
    return row

"""The pieces that the benchmark of several devices measures of a model: a function for each, which returns rows of its result."""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from ds4jax.bench import profile
from ds4jax.bench.decode import lossless_check, tokens_per_step
from ds4jax.bench.mesh_options import Options
from ds4jax.bench.prefill import tokens_of
from ds4jax.bench.programs import RUNS, Loop, Program, compiled
from ds4jax.bench.whole_model import Note, Row, WholeModel, finite
from ds4jax.bounds import drafts_of, own_drafter
from ds4jax.cache.capacity import capacity_for
from ds4jax.decode import loop as decode
from ds4jax.decode.loop import DecodeState
from ds4jax.engine import compile
from ds4jax.loading import fingerprint
from ds4jax.loading.placement import everywhere

PLAIN = Program(0)
# Hexadecimal digits of a digest.
DIGITS = 16


@dataclasses.dataclass(frozen=True)
class Measured:
    """A model on its devices, and what to measure of it.

    Attributes:
        meet: waits for the other processes of a job, if there are any; called before the first exchange.
        problem, profiled: take a problem, and totals and rows of a profile.
    """

    model: WholeModel
    options: Options
    devices: tuple[jax.Device, ...]
    meet: Callable[[], None]
    problem: Callable[[str], None]
    profiled: Callable[[Row, list[Row]], None]
    note: Note

    def loops(self, programs: Sequence[Program], context: int) -> dict[Program, Loop]:
        """Compile programs for caches that begin with `context` rows."""
        model = self.model
        capacity = capacity_for(context + self.options.steps, model.config.max_context)
        made = compiled(programs, model.config, model.graph, model.weights, context, capacity)
        self.meet()
        return made

    def timed(self, name: str, loop: Loop, context: int, depth: int = 0) -> Row:
        """Time a loop's steps. Returns the row, with a digest for each step."""
        steps, program = self.options.steps, loop.program
        samples, state = loop.timed(steps, depth)
        ms = statistics.median(samples)
        if not finite(state.cache):
            self.problem(f"{name}: values that are not finite")
        row = {
            "name": name,
            "context_rows": context,
            "sequences": program.sequences,
            "drafts": depth,
            "ms_per_step": round(ms, 4),
            "samples_ms": [round(sample, 4) for sample in samples],
            "tokens_per_second": round(1e3 * program.sequences / ms, 2) if depth == 0 else None,
            "trace_seconds": round(loop.lower_seconds, 2),
            "compile_seconds": round(loop.compile_seconds, 2),
            "temporary_bytes": getattr(loop.executable.memory_analysis(), "temp_size_in_bytes", None),
            "peak_bytes": peaks(self.devices),
            **digests(state, steps),
        }
        speed = f", {row['tokens_per_second']:.1f} tokens/s" if depth == 0 else ""
        self.note(f"{name}: {ms:.3f} ms a step{speed}")
        return row


def peaks(devices: Sequence[jax.Device]) -> list[int | None]:
    """Peak bytes of each device of this process; None where it is not counted."""
    stats = [one.memory_stats() for one in devices if one.process_index == jax.process_index()]
    return [found.get("peak_bytes_in_use") if found else None for found in stats]


def digests(state: DecodeState, steps: int) -> Row:
    """Digests of the first `steps` tokens of all sequences, and of tokens and fingerprints of each step."""
    tokens_SN, marks_SN2 = (np.asarray(array)[:, :steps] for array in (state.tokens, state.fingerprints))
    each = [_digest(tokens_SN[:, i].tobytes() + marks_SN2[:, i].tobytes()) for i in range(steps)]
    return {"tokens_digest": _digest(tokens_SN.tobytes()), "step_digests": each}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:DIGITS]


def plain(one: Measured) -> Iterator[Row]:
    """Decode without drafts, and its kernels if there is a GPU."""
    context = one.options.context
    [loop] = one.loops([PLAIN], context).values()
    yield one.timed("plain", loop, context)
    if jax.default_backend() != "gpu" or jax.process_count() > 1:
        return
    totals, kernels = profile.profile(loop, 0, one.model.bandwidth)
    exchanging = [row for row in kernels if "nccl" in row["name"].lower()]
    exchanged = {
        "exchange_kernels": round(sum(row["calls"] for row in exchanging), 2),
        "exchange_ms": round(sum(row["us"] for row in exchanging) / 1e3, 4),
    }
    one.profiled(totals | exchanged, kernels)


def drafts(one: Measured) -> Iterator[Row]:
    """Steps with the drafter's usual number of drafts, and whether drafting changes a bit. Acceptance is simulated."""
    options, config = one.options, one.model.config
    drafter = own_drafter(config)
    depth = drafts_of(drafter, config)[0]
    if not depth:
        return
    program = Program(depth, inner=drafter)
    [loop] = one.loops([program], options.context).values()
    row = one.timed(f"{depth} drafts of {drafter}", loop, options.context, depth) | {"drafter": drafter}
    # What a step commits on random weights says nothing.
    assumed = options.per_step if drafter == "dspark" else tokens_per_step(options.acceptance, depth) if options.acceptance else 0
    if assumed:
        speed = round(1e3 * assumed / row["ms_per_step"], 2)
        row |= {"simulated": True, "assumed_tokens_per_step": round(assumed, 4), "simulated_tokens_per_second": speed}
    lossless = lossless_check(loop, options.steps, depth, one.note)
    if not lossless["equal"]:
        one.problem("not the output of plain decode")
    yield row | {"lossless": lossless["equal"]}


def slots(one: Measured) -> Iterator[Row]:
    """Steps of several sequences."""
    context = one.options.context
    loops = one.loops([Program(0, sequences=count) for count in one.options.slots], context)
    for loop in loops.values():
        yield one.timed(f"{loop.program.sequences} slots", loop, context)


def long(one: Measured) -> Iterator[Row]:
    """Decode without drafts at a long context."""
    context = one.options.long_context
    [loop] = one.loops([PLAIN], context).values()
    yield one.timed("long", loop, context)


def prefill(one: Measured) -> Iterator[Row]:
    """One call of a prompt. The digest is that of the cache."""
    model, rows = one.model, one.options.prompt
    graph, config = model.graph, model.config
    capacity = capacity_for(rows + one.options.steps, config.max_context)
    ids = tokens_of(config, rows + 1, 0)

    def empty() -> DecodeState:
        made = decode.start(config, capacity, [0], drafter=None, max_draft=0)
        return everywhere(made, graph.mesh) if isinstance(graph.mesh, Mesh) else made

    shapes = jax.eval_shape(lambda: decode.start(config, capacity, [0], drafter=None, max_draft=0))
    program = compile.Program(lambda: decode.lower_prefill(graph, model.weights, shapes, rows, drafter=None, strict=False))
    [made] = compile.compile_all([program], 1)
    one.meet()
    samples = []
    for _ in range(1 + RUNS):
        state = jax.block_until_ready(empty())
        began = time.perf_counter()
        cache, _ = made.executable(model.weights, state.cache, None, ids[:-1], ids[1:], np.int32(rows))
        jax.block_until_ready(cache)
        samples.append(1e3 * (time.perf_counter() - began))
    ms = statistics.median(samples[1:])
    if not finite(cache):
        one.problem("values that are not finite")
    one.note(f"prefill: {ms:.1f} ms for {rows} tokens")
    yield {
        "name": "prefill",
        "prompt_rows": rows,
        "ms_per_call": round(ms, 3),
        "samples_ms": [round(sample, 3) for sample in samples[1:]],
        "tokens_per_second": round(1e3 * rows / ms, 1),
        "trace_seconds": round(made.lower_seconds, 2),
        "compile_seconds": round(made.compile_seconds, 2),
        "temporary_bytes": getattr(made.executable.memory_analysis(), "temp_size_in_bytes", None),
        "peak_bytes": peaks(one.devices),
        "step_digests": [fingerprint.of_weights(config, cache)[:DIGITS]],
    }


FUNCTIONS: dict[str, Callable[[Measured], Iterator[Row]]] = {
    "plain": plain,
    "drafts": drafts,
    "slots": slots,
    "prefill": prefill,
    "long": long,
}

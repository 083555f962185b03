"""The decode step at full shape: time, bytes, kernels, and whether drafting says what plain decode says.

Weights are random; so is what the caches hold. The loop, its programs and everything they read have the shapes of the published
model.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

import jax
import numpy as np

from ds4jax.bench import profile, synthetic
from ds4jax.bench.programs import RUNS, Loop, Program, compiled, told
from ds4jax.bench.traffic import step_bytes
from ds4jax.bench.whole import Note, Row, Whole, finite, peak_bytes
from ds4jax.buckets import capacity_for
from ds4jax.decode import DecodeState
from ds4jax.errors import InputError
from ds4jax.loading.plan import Plan, plan

SCHEMA = 1
PLAIN = Program(0)
STRICT = Program(0, strict=True)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        layout: a name in `synthetic.LAYOUTS`.
        layers: the first layers alone; None takes all.
        context: rows that the caches hold before the first step.
        drafts: drafts a step, each of 0 to 4; the deepest is what the drafting program is compiled for.
        strict: also measure strict plain decode.
        steps: tokens that every run generates.
        acceptance: shares of the first, second, .. draft that stand, for figures that are labelled simulated.

    Raises:
        InputError: what cannot be measured; the message names it.
    """

    layout: str = "flash-q2"
    layers: int | None = None
    context: int = 2048
    drafts: tuple[int, ...] = (0, 1, 2)
    strict: bool = False
    steps: int = 64
    acceptance: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        config = synthetic.config_of(self.layout, self.layers)
        if self.context + self.steps > config.max_context:
            raise InputError(f"context is {self.context} and steps {self.steps}; {self.layout} ends at {config.max_context}")
        if self.acceptance and len(self.acceptance) < self.most:
            raise InputError(f"acceptance has {len(self.acceptance)} shares; draft {self.most} needs {self.most}")

    @property
    def most(self) -> int:
        """The deepest draft."""
        return max(self.drafts)

    @property
    def programs(self) -> tuple[Program, ...]:
        """What has to be compiled, the largest first."""
        drafting = (Program(self.most),) if self.most else ()
        return (*drafting, *((STRICT,) if self.strict else ()), PLAIN)


def bench(options: Options, note: Note) -> Row:
    """Build, compile, time, profile and compare; returns the content of a result file."""
    model = Whole.make(options.layout, options.layers, note)
    config, bandwidth = model.config, model.bandwidth
    planned = plan(model.checkpoint, options.context, max_draft=options.most)
    capacity = capacity_for(options.context + options.steps, config.max_context)
    loops = compiled(options.programs, config, model.graph, model.weights, options.context, capacity)
    for loop in loops.values():
        note(f"{loop.program.name}: traced in {loop.lower_seconds:.1f} s, compiled in {loop.compile_seconds:.1f} s")
    problems: list[str] = []
    rows = _timed(options, loops, planned, bandwidth, problems, note)
    lossless = _lossless(loops[Program(options.most)], options, note) if options.most else None
    profiles, kernels = _profiles(options, loops, bandwidth, problems, note)
    return {
        "schema": SCHEMA,
        **model.fields(),
        "context": options.context,
        "capacity": capacity,
        "tokens": options.steps,
        "runs": RUNS,
        "weight_bytes": planned.device,
        "build_seconds": round(model.seconds, 2),
        "peak_bytes": peak_bytes(),
        "compiled": [_compiled(loop) for loop in loops.values()],
        "rows": rows,
        "simulated": _simulated(rows, options.acceptance),
        "lossless": lossless,
        "profiles": profiles,
        "kernels": kernels,
        "problems": problems,
    }


def good(content: Row) -> bool:
    """Whether everything was measured, and drafting said what plain decode says."""
    return not content["problems"] and (content["lossless"] is None or content["lossless"]["equal"])


def _compiled(loop: Loop) -> Row:
    return {
        "program": loop.program.name,
        "trace_seconds": round(loop.lower_seconds, 2),
        "compile_seconds": round(loop.compile_seconds, 2),
    }


def _timed(
    options: Options, loops: dict[Program, Loop], planned: Plan, bandwidth: float | None, problems: list[str], note: Note
) -> list[Row]:
    """A row for each way to decode: plain alone, each depth inside the drafting program, strict plain."""
    ways = [("plain", PLAIN, 0)]
    if options.most:
        inside = Program(options.most)
        ways += [(f"{f'draft {depth}' if depth else 'plain'} in {inside.name}", inside, depth) for depth in options.drafts]
    if options.strict:
        ways.append(("strict plain", STRICT, 0))
    rows: list[Row] = []
    for name, program, depth in ways:
        loop = loops[program]
        samples, state = loop.timed(options.steps, depth)
        problems += [f"{name}: {words}" for words in _unusable(state, options.steps)]
        count = step_bytes(planned, loop.config, depth)
        rows.append(_row(name, program, depth, samples, count, bandwidth, rows[0] if rows else None))
        note(f"{name}: {rows[-1]['ms_per_step']:.3f} ms a step")
    return rows


def _row(
    name: str, program: Program, depth: int, samples: Sequence[float], count: int, bandwidth: float | None, plain: Row | None
) -> Row:
    """One row. Tokens a second are those of steps that commit one token; what drafts would add is not measured here."""
    ms = statistics.median(samples)
    made: Row = {
        "name": name,
        "program": program.name,
        "draft": depth,
        "strict": program.strict,
        "ms_per_step": round(ms, 4),
        "samples": [round(sample, 4) for sample in samples],
        "tokens_per_second": round(1e3 / ms, 2) if depth == 0 else None,
        "bytes": count,
        "fraction": round(count / ms / 1e6 / bandwidth, 4) if bandwidth else None,
    }
    if depth and plain:
        floor = (count - plain["bytes"]) / 1e6 / bandwidth if bandwidth else None
        extra = ms - plain["ms_per_step"]
        made["extra_ms"] = round(extra, 4)
        made["extra_floor_ms"] = round(floor, 4) if floor else None
        made["extra_over_floor"] = round(extra / floor, 2) if floor else None
    return made


def _unusable(state: DecodeState, tokens: int) -> list[str]:
    """Why the random model's run says nothing: values that are not finite, or steps that are all alike."""
    marks = {tuple(mark) for mark in np.asarray(state.fingerprints)[:tokens].tolist()}
    found = [] if finite(state.cache) else ["values that are not finite"]
    return found if len(marks) > tokens // 2 else [*found, f"{len(marks)} different logits in {tokens} tokens"]


def _simulated(rows: Sequence[Row], acceptance: Sequence[float]) -> list[Row]:
    """Tokens a second if the stated shares of drafts stood; the steps' times are measured, the shares are not."""
    made = []
    for row in rows:
        depth = row["draft"]
        if acceptance and depth:
            tokens = 1 + sum(math.prod(acceptance[: i + 1]) for i in range(depth))
            made.append(
                {
                    "name": row["name"],
                    "simulated": True,
                    "acceptance": list(acceptance[:depth]),
                    "tokens_per_step": round(tokens, 4),
                    "tokens_per_second": round(1e3 * tokens / row["ms_per_step"], 2),
                }
            )
    return made


def _lossless(loop: Loop, options: Options, note: Note) -> Row:
    """Plain decode and the deepest draft in one executable, with drafts that are right for 0, 1, .. of them in turn."""
    count = options.steps
    plain = loop.run(loop.fresh(), count, 0)
    tokens, marks = np.asarray(plain.tokens)[:count], np.asarray(plain.fingerprints)[:count]
    drafted = loop.run(loop.fresh(told(loop.start, tokens)), count, options.most)
    differing = np.asarray(drafted.tokens)[:count] != tokens
    bits = np.any(np.asarray(drafted.fingerprints)[:count] != marks, axis=1)
    found = {
        "equal": not differing.any() and not bits.any(),
        "program": loop.program.name,
        "draft": options.most,
        "tokens": count,
        "steps": int(drafted.acceptance.steps),
        "tried": np.asarray(drafted.acceptance.tried).tolist(),
        "stood": np.asarray(drafted.acceptance.stood).tolist(),
        "differing_tokens": int(differing.sum()),
        "differing_fingerprints": int(bits.sum()),
    }
    note(f"draft {options.most} and plain: {'equal' if found['equal'] else 'DIFFERENT'} over {count} tokens")
    return found


def _profiles(
    options: Options, loops: dict[Program, Loop], bandwidth: float | None, problems: list[str], note: Note
) -> tuple[list[Row], list[Row]]:
    """Kernels of the plain step and of the deepest draft's, where there is a profiler."""
    if jax.default_backend() != "gpu":
        note("no profile: kernels are timed on a GPU")
        return [], []
    together, kernels = [], []
    for program, depth in ((PLAIN, 0), (Program(options.most), options.most))[: 2 if options.most else 1]:
        try:
            summary, rows = profile.profile(loops[program], depth, bandwidth)
        except RuntimeError as error:
            problems.append(f"profile of {program.name}: {error}")
            continue
        together.append(summary)
        kernels += rows
        note(f"{program.name}: {summary['kernels']:.0f} kernels a step")
    return together, kernels

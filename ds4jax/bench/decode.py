"""Measures the decode step at full shape: time, bytes, kernels, and whether drafting gives the same output as plain decode.

Weights and cache rows are random. The loop, its programs and their arrays have the shapes of the published model.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

import jax
import numpy as np

from ds4jax.bench import calls, profile
from ds4jax.bench.programs import GREEDY, RUNS, SAMPLED, SAMPLED_FIRST, Loop, Program, compiled, with_truth
from ds4jax.bench.traffic import step_bytes
from ds4jax.bench.whole_model import Note, Row, WholeModel, finite, peak_bytes
from ds4jax.bounds import drafts_of, own_drafter
from ds4jax.cache.capacity import capacity_for
from ds4jax.decode.loop import DecodeState
from ds4jax.decode.sampling import Sampling
from ds4jax.errors import InputError
from ds4jax.loading.plan import Plan, plan
from ds4jax.random_models import checkpoint as synthetic

SCHEMA = 1
PLAIN = Program(0)
STRICT = Program(0, strict=True)
# Length of the texts for timing calls, as a multiple of the steps of a run.
TEXT = 4


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        layout: a name in `LAYOUT_NAMES`.
        layers: number of first layers; None for all.
        context: rows in the caches before the first step.
        drafts: drafts per step, none larger than the drafter can make. The drafting program is compiled for the maximum.
        strict: also measure strict plain decode.
        steps: tokens of each run.
        acceptance: assumed acceptance of the first, second, .. draft, for the figures labelled simulated.
        per_step: assumed tokens per step at the maximum draft, likewise.

    Raises:
        InputError: the options cannot be measured; the message names the option.
    """

    layout: str = "flash-q2"
    layers: int | None = None
    context: int = 2048
    drafts: tuple[int, ...] = (0, 1, 2)
    strict: bool = False
    steps: int = 64
    acceptance: tuple[float, ...] = ()
    per_step: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        config = synthetic.config_of(self.layout, self.layers)
        if self.context + self.steps > config.max_context:
            raise InputError(f"context is {self.context} and steps {self.steps}; {self.layout} ends at {config.max_context}")
        name = own_drafter(config)
        if self.max_draft > drafts_of(name, config)[1]:
            raise InputError(f"draft is {self.max_draft}; the {name} drafter makes at most {drafts_of(name, config)[1]}")
        if self.acceptance and len(self.acceptance) < self.max_draft:
            raise InputError(f"acceptance has {len(self.acceptance)} shares; draft {self.max_draft} needs {self.max_draft}")
        if any(not 1 <= tokens <= 1 + self.max_draft for tokens in self.per_step):
            raise InputError(f"per-step is 1 to {1 + self.max_draft} tokens with at most {self.max_draft} drafts")

    @property
    def max_draft(self) -> int:
        """The maximum number of drafts per step."""
        return max(self.drafts)

    @property
    def drafting(self) -> Program:
        """The program that drafts, with the layout's own drafter."""
        return Program(self.max_draft, inner=own_drafter(synthetic.config_of(self.layout, self.layers)))

    @property
    def programs(self) -> tuple[Program, ...]:
        """The programs to compile, the largest first."""
        drafting = (self.drafting,) if self.max_draft else ()
        return (*drafting, *((STRICT,) if self.strict else ()), PLAIN)


def bench(options: Options, note: Note) -> Row:
    """Build, compile, time, profile and compare. Returns the content of a result file."""
    model = WholeModel.make(options.layout, options.layers, note)
    config, bandwidth = model.config, model.bandwidth
    planned = plan(model.checkpoint, options.context, max_draft=options.max_draft)
    capacity = capacity_for(options.context + options.steps, config.max_context)
    loops = compiled(options.programs, config, model.graph, model.weights, options.context, capacity)
    for loop in loops.values():
        note(f"{loop.program.name}: traced in {loop.lower_seconds:.1f} s, compiled in {loop.compile_seconds:.1f} s")
    problems: list[str] = []
    rows = _timed(options, loops, planned, bandwidth, problems, note)
    by_call = calls.measured(model, capacity, TEXT * options.steps, note)
    lossless = lossless_check(loops[options.drafting], options.steps, options.max_draft, note) if options.max_draft else None
    profiles, kernels = _profiles(options, loops, bandwidth, problems, note)
    return {
        "schema": SCHEMA,
        **model.fields(),
        "drafter": options.drafting.inner,
        "context": options.context,
        "capacity": capacity,
        "tokens": options.steps,
        "runs": RUNS,
        "weight_bytes": planned.device,
        "build_seconds": round(model.seconds, 2),
        "peak_bytes": peak_bytes(),
        "compiled": [_compiled(loop) for loop in loops.values()],
        "rows": rows,
        "calls": by_call,
        "simulated": _simulated(rows, options.acceptance),
        "simulated_per_step": _per_step(max(rows, key=lambda row: row["draft"]), options.per_step),
        "lossless": lossless,
        "profiles": profiles,
        "kernels": kernels,
        "problems": problems,
    }


def good(content: Row) -> bool:
    """Whether everything was measured, and drafting gave the same output as plain decode."""
    return not content["problems"] and (content["lossless"] is None or content["lossless"]["equal"])


def _compiled(loop: Loop) -> Row:
    return {
        "program": loop.program.name,
        "trace_seconds": round(loop.lower_seconds, 2),
        "compile_seconds": round(loop.compile_seconds, 2),
    }


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to decode: a program, its drafts a step, and how tokens are chosen."""

    name: str
    program: Program
    draft: int
    sampling: Sampling = GREEDY


def _ways(options: Options) -> list[Way]:
    """Plain in its own program, each depth in the drafting program, strict plain; then plain and the largest depth sampled.

    Sampled steps with `top_k` 1 have the greedy tokens, so that the time over greedy is that of the sampling alone.
    """
    plain, inside = Way("plain", PLAIN, 0), options.drafting
    depths = options.drafts if options.max_draft else ()
    drafting = [Way(f"{f'draft {depth}' if depth else 'plain'} in {inside.name}", inside, depth) for depth in depths]
    strict = [Way("strict plain", STRICT, 0)] if options.strict else []
    most = [plain, *(way for way in drafting if way.draft == options.max_draft)]
    ways = {"sampled": SAMPLED, "sampled, top-k 1": SAMPLED_FIRST}
    sampled = [dataclasses.replace(way, name=f"{way.name}, {name}", sampling=ways[name]) for name in ways for way in most]
    return [plain, *drafting, *strict, *sampled]


def _timed(
    options: Options, loops: dict[Program, Loop], planned: Plan, bandwidth: float | None, problems: list[str], note: Note
) -> list[Row]:
    """A row for each way to decode."""
    rows: list[Row] = []
    greedy: dict[tuple[Program, int], Row] = {}
    for way in _ways(options):
        loop = loops[way.program]
        samples, state = loop.timed(options.steps, way.draft, way.sampling)
        problems += [f"{way.name}: {words}" for words in _unusable(state, options.steps)]
        count = step_bytes(planned, loop.config, way.draft)
        place = (way.program, way.draft)
        row = _row(way, samples, count, bandwidth, rows[0] if rows else None, greedy.get(place))
        greedy.setdefault(place, row)
        rows.append(row)
        note(f"{way.name}: {row['ms_per_step']:.3f} ms a step")
    return rows


def _row(way: Way, samples: Sequence[float], count: int, bandwidth: float | None, plain: Row | None, greedy: Row | None) -> Row:
    """One row. Tokens/s are given for plain steps only, because random weights accept hardly any drafts."""
    ms, depth = statistics.median(samples), way.draft
    made: Row = {
        "name": way.name,
        "program": way.program.name,
        "draft": depth,
        "strict": way.program.strict,
        "sampled": way.sampling is not GREEDY,
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
    if greedy:
        made["over_greedy_ms"] = round(ms - greedy["ms_per_step"], 4)
    return made


def _unusable(state: DecodeState, tokens: int) -> list[str]:
    """Reasons not to trust the random model's run: values that are not finite, or steps with equal logits."""
    marks = {tuple(mark) for mark in np.asarray(state.fingerprints)[0, :tokens].tolist()}
    found = [] if finite(state.cache) else ["values that are not finite"]
    return found if len(marks) > tokens // 2 else [*found, f"{len(marks)} different logits in {tokens} tokens"]


def _simulated(rows: Sequence[Row], acceptance: Sequence[float]) -> list[Row]:
    """Tokens/s under the assumed acceptance. The times of the steps are measured; the acceptance is not."""
    made = []
    for row in rows:
        depth = row["draft"]
        if acceptance and depth and not row["sampled"]:
            tokens = tokens_per_step(acceptance, depth)
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


def tokens_per_step(acceptance: Sequence[float], depth: int) -> float:
    """Mean tokens of a step with `depth` drafts, if each stands with its share of `acceptance` whenever those before it do."""
    return 1 + sum(math.prod(acceptance[: i + 1]) for i in range(depth))


def _per_step(row: Row, tokens: Sequence[float]) -> list[Row]:
    """Tokens/s of the row's step under assumed numbers of tokens per step."""
    return [
        {
            "name": row["name"],
            "simulated": True,
            "tokens_per_step": one,
            "tokens_per_second": round(1e3 * one / row["ms_per_step"], 2),
        }
        for one in tokens
    ]


def lossless_check(loop: Loop, count: int, depth: int, note: Note) -> Row:
    """Compare `count` tokens of plain decode and of `depth` drafts, the program's maximum, in one executable.

    In successive steps 0, 1, .. drafts are right.
    """
    plain = loop.run(loop.fresh(), count, 0)
    tokens, marks = np.asarray(plain.tokens)[0, :count], np.asarray(plain.fingerprints)[0, :count]
    drafted = loop.run(loop.fresh(with_truth(loop.start, tokens)), count, depth)
    differing = np.asarray(drafted.tokens)[0, :count] != tokens
    bits = np.any(np.asarray(drafted.fingerprints)[0, :count] != marks, axis=1)
    found = {
        "equal": not differing.any() and not bits.any(),
        "program": loop.program.name,
        "draft": depth,
        "tokens": count,
        "steps": int(drafted.acceptance.steps[0]),
        "tried": np.asarray(drafted.acceptance.tried)[0].tolist(),
        "stood": np.asarray(drafted.acceptance.stood)[0].tolist(),
        "differing_tokens": int(differing.sum()),
        "differing_fingerprints": int(bits.sum()),
    }
    note(f"draft {depth} and plain: {'equal' if found['equal'] else 'DIFFERENT'} over {count} tokens")
    return found


def _profiles(
    options: Options, loops: dict[Program, Loop], bandwidth: float | None, problems: list[str], note: Note
) -> tuple[list[Row], list[Row]]:
    """Kernels of the plain step and of the step with the maximum draft; none without a GPU."""
    if jax.default_backend() != "gpu":
        note("no profile: kernels are timed on a GPU")
        return [], []
    together, kernels = [], []
    for program, depth in ((PLAIN, 0), (options.drafting, options.max_draft))[: 2 if options.max_draft else 1]:
        try:
            summary, rows = profile.profile(loops[program], depth, bandwidth)
        except RuntimeError as error:
            problems.append(f"profile of {program.name}: {error}")
            continue
        together.append(summary)
        kernels += rows
        note(f"{program.name}: {summary['kernels']:.0f} kernels a step")
    return together, kernels

"""Measures decode steps of many sequences: time, bytes and kernels over the number of sequences, and the bits of each sequence.

Weights and cache rows are random. A sequence starts with the same token and the same rows whatever runs beside it, so its logits
must have the same bits in the program of any number of sequences.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import jax
import numpy as np

from ds4jax.bench import profile
from ds4jax.bench.programs import GREEDY, RUNS, SAMPLED, Loop, Program, compiled
from ds4jax.bench.traffic import distinct_experts, step_bytes
from ds4jax.bench.whole_model import Note, Row, WholeModel, finite, peak_bytes
from ds4jax.cache.capacity import capacity_for
from ds4jax.decode.loop import DecodeState
from ds4jax.decode.sampling import Sampling
from ds4jax.engine.prefill import nbytes
from ds4jax.errors import InputError
from ds4jax.loading.plan import Plan, plan
from ds4jax.random_models import checkpoint as synthetic

SCHEMA = 1
# Where a step is also sampled and profiled, and where it is also timed at a long context.
LOOKED_AT = (8, 32)
LONG_SEQUENCES, LONG_CONTEXT = 8, 32768
MAX_SEQUENCES = 64

Result = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        layout, layers: as in `ds4jax.bench.decode.Options`.
        sequences: numbers of sequences, ascending; a program for each.
        context: rows in the cache of each sequence before the first step.
        long_context: the same for one more program of 8 sequences; 0 for none. None is 32,768, or none if the model ends before.
        steps: tokens of each sequence in a run.

    Raises:
        InputError: the options cannot be measured; the message names the option.
    """

    layout: str = "flash-q2"
    layers: int | None = None
    sequences: tuple[int, ...] = (1, 4, 8, 16, 32)
    context: int = 2048
    long_context: int | None = None
    steps: int = 64

    def __post_init__(self) -> None:
        end = synthetic.config_of(self.layout, self.layers).max_context
        if self.long_context is None:
            object.__setattr__(self, "long_context", LONG_CONTEXT if LONG_CONTEXT + self.steps <= end else 0)
        for name in ("context", "long_context"):
            if getattr(self, name) + self.steps > end:
                raise InputError(f"{name} is {getattr(self, name)} and steps {self.steps}; {self.layout} ends at {end}")
        if max(self.sequences) > MAX_SEQUENCES:
            raise InputError(f"sequences is {max(self.sequences)}; a step has at most {MAX_SEQUENCES}")

    @property
    def programs(self) -> tuple[Program, ...]:
        """A program for each number of sequences, the largest first."""
        return tuple(Program(0, sequences=count) for count in reversed(self.sequences))


def bench(options: Options, note: Note) -> Row:
    """Build, compile, time, compare and profile. Returns the content of a result file."""
    model = WholeModel.make(options.layout, options.layers, note)
    problems: list[str] = []
    rows: list[Row] = []
    results: dict[int, Result] = {}
    profiles: list[Row] = []
    kernels: list[Row] = []
    made: list[Row] = []
    loops = _compiled(options, model, options.programs, options.context, made, note)
    planned = plan(model.checkpoint, options.context)
    for count in options.sequences:
        loop = loops.pop(Program(0, sequences=count))
        row, results[count] = _measured(options, loop, GREEDY, planned, model.bandwidth, problems)
        rows.append({"name": _name(count), "context": options.context, **row})
        note(f"{rows[-1]['name']}: {row['ms_per_step']:.3f} ms a step, {row['tokens_per_second']:.0f} tokens/s")
        if count in LOOKED_AT:
            sampled, _ = _measured(options, loop, SAMPLED, planned, model.bandwidth, problems)
            over = round(sampled["ms_per_step"] / row["ms_per_step"], 4)
            rows.append({"name": f"{_name(count)}, sampled", "context": options.context, **sampled, "over_greedy": over})
            note(f"{rows[-1]['name']}: {over:.3f} of the greedy step's time")
            _profiled(loop, model.bandwidth, profiles, kernels, problems, note)
    bits = _compared(results, problems, note)
    if options.long_context:
        program = Program(0, sequences=LONG_SEQUENCES)
        [loop] = _compiled(options, model, (program,), options.long_context, made, note).values()
        row, _ = _measured(options, loop, GREEDY, planned, model.bandwidth, problems)
        rows.append({"name": f"{_name(LONG_SEQUENCES)}, long", "context": options.long_context, **row})
        note(f"{rows[-1]['name']}: {row['ms_per_step']:.3f} ms a step")
    return {
        "schema": SCHEMA,
        **model.fields(),
        "context": options.context,
        "tokens": options.steps,
        "runs": RUNS,
        "weight_bytes": planned.device,
        "build_seconds": round(model.seconds, 2),
        "peak_bytes": peak_bytes(),
        "compiled": made,
        "rows": rows,
        # The modules of a CPU sum in another order for another number of sequences.
        "promised": jax.default_backend() == "gpu",
        "bits": bits,
        "profiles": profiles,
        "kernels": kernels,
        "problems": problems,
    }


def good(content: Row) -> bool:
    """Whether everything was measured, and each sequence has the same bits beside any others where kernels promise it."""
    return not content["problems"] and (not content["promised"] or all(row["equal"] for row in content["bits"]))


def _name(count: int) -> str:
    return f"{count} sequence{'s' * (count > 1)}"


def _compiled(
    options: Options, model: WholeModel, programs: tuple[Program, ...], context: int, made: list[Row], note: Note
) -> dict[Program, Loop]:
    """The loops of programs, each compiled in its own thread while the next is traced. Their times are added to `made`."""
    capacity = capacity_for(context + options.steps, model.config.max_context)
    loops = compiled(programs, model.config, model.graph, model.weights, context, capacity)
    for loop in loops.values():
        note(f"{loop.program.name}: traced in {loop.lower_seconds:.1f} s, compiled in {loop.compile_seconds:.1f} s")
        seconds = {"trace_seconds": round(loop.lower_seconds, 2), "compile_seconds": round(loop.compile_seconds, 2)}
        made.append({"program": loop.program.name, "context": context, **seconds})
    return loops


def _measured(
    options: Options, loop: Loop, sampling: Sampling, planned: Plan, bandwidth: float | None, problems: list[str]
) -> tuple[Row, Result]:
    """Time, bytes and bandwidth of a loop's steps, and the tokens and fingerprints of all its sequences."""
    samples, state = loop.timed(options.steps, 0, sampling)
    count, ms = loop.program.sequences, statistics.median(samples)
    tokens, marks = (np.asarray(array)[:, : options.steps] for array in (state.tokens, state.fingerprints))
    problems += [f"{_name(count)}: {words}" for words in _unusable(state, marks)]
    read = step_bytes(planned, loop.config, 0, count)
    row: Row = {
        "sequences": count,
        "sampled": sampling is not GREEDY,
        "ms_per_step": round(ms, 4),
        "samples": [round(sample, 4) for sample in samples],
        "tokens_per_second": round(1e3 * count / ms, 2),
        "experts_per_layer": round(distinct_experts(loop.config, count), 1),
        "bytes": read,
        "bound": round(1e9 * count * bandwidth / read, 2) if bandwidth else None,
        "fraction": round(read / ms / 1e6 / bandwidth, 4) if bandwidth else None,
        "cache_bytes": nbytes(loop.start.cache),
        "temporary_bytes": getattr(loop.executable.memory_analysis(), "temp_size_in_bytes", None),
    }
    return row, (tokens, marks)


def _unusable(state: DecodeState, marks_SN2: np.ndarray) -> list[str]:
    """Reasons not to trust the random model's run: values that are not finite, or steps or sequences with equal logits."""
    found = [] if finite(state.cache) else ["values that are not finite"]
    number, steps, _ = marks_SN2.shape
    different = len({tuple(mark) for mark in marks_SN2.reshape(-1, 2).tolist()})
    return found if different > number * steps // 2 else [*found, f"{different} different logits in {number * steps} tokens"]


def _compared(results: dict[int, Result], problems: list[str], note: Note) -> list[Row]:
    """Compare each program's sequences with the same ones of the program of the most sequences."""
    most, found = max(results), []
    for count, (tokens, marks) in results.items():
        if count == most:
            continue
        wanted, wanted_marks = (array[:count] for array in results[most])
        bits = np.any(marks != wanted_marks, axis=2)
        row: Row = {
            "sequences": count,
            "beside": most,
            "tokens": int(tokens.size),
            "differing_tokens": int(np.sum(tokens != wanted)),
            "differing_fingerprints": int(bits.sum()),
        }
        row["equal"] = row["differing_tokens"] == row["differing_fingerprints"] == 0
        first = f", first at step {int(np.argmax(bits.any(axis=0)))}" if bits.any() else ""
        note(f"{_name(count)} alone and among {most}: {'equal' if row['equal'] else 'DIFFERENT'}{first}")
        found.append(row)
    if len(results) == 1:
        problems.append("bits: one number of sequences has nothing to compare with")
    return found


def _profiled(
    loop: Loop, bandwidth: float | None, profiles: list[Row], kernels: list[Row], problems: list[str], note: Note
) -> None:
    """Add the kernels of a step; none without a GPU."""
    if jax.default_backend() != "gpu":
        note("no profile: kernels are timed on a GPU")
        return
    try:
        summary, rows = profile.profile(loop, 0, bandwidth)
    except RuntimeError as error:
        problems.append(f"profile of {loop.program.name}: {error}")
        return
    profiles.append(summary)
    kernels += rows
    note(f"{loop.program.name}: {summary['kernels']:.0f} kernels a step")


def table(content: Row) -> Any:
    """A table with a line for each number of sequences and way to choose tokens."""
    from rich import box
    from rich.table import Table

    from ds4jax.bench.decode_report import title

    made = Table(title=title({**content, "context": "below"}), box=box.SIMPLE)
    made.add_column("", no_wrap=True)
    headings = ("context", "ms a step", "tokens/s", "bound", "GB a step", "of the bandwidth", "experts a layer", "over greedy")
    for heading in headings:
        made.add_column(heading, justify="right", no_wrap=True)
    for row in content["rows"]:
        made.add_row(
            row["name"],
            f"{row['context']:,}",
            f"{row['ms_per_step']:.3f}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['bound']:.0f}" if row["bound"] else "",
            f"{row['bytes'] / 1e9:.2f}",
            f"{row['fraction']:.3f}" if row["fraction"] else "",
            f"{row['experts_per_layer']:g}",
            f"{row['over_greedy']:.3f}" if "over_greedy" in row else "",
        )
    return made


def verdict(content: Row) -> list[str]:
    """The lines below the table: bits, kernels, memory and problems."""
    lines = []
    for row in content["bits"]:
        if row["equal"]:
            same = "the same tokens and fingerprints"
        else:
            same = f"{row['differing_tokens']} tokens and {row['differing_fingerprints']} fingerprints DIFFER"
            same += "" if content["promised"] else ", as they may without the decode kernels,"
        lines.append(f"bits: {_name(row['sequences'])} alone and among {row['beside']}: {same} over {row['tokens']} tokens")
    if not content["profiles"]:
        lines.append("no profile: kernels are timed on a GPU")
    for where in content["profiles"]:
        lines.append(f"{where['program']}: {where['kernels']:g} kernels a step, {where['kernel_ms']:.3f} ms in kernels")
    memory = f"; peak {content['peak_bytes'] / 1e9:.1f} GB" if content["peak_bytes"] else ""
    seconds = ", ".join(f"{row['program']} {row['compile_seconds']:.0f} s" for row in content["compiled"])
    lines.append(f"{content['weight_bytes'] / 1e9:.1f} GB made in {content['build_seconds']:.1f} s; compiled: {seconds}{memory}")
    lines.append("bytes and bound count the weights of a step, with experts chosen at random; cache rows come on top")
    return lines + [f"problem: {problem}" for problem in content["problems"]]


def show(content: Row, *, kernels: bool = True) -> None:
    """Print the tables and the lines below them on stdout, in their full width."""
    from rich.console import Console

    from ds4jax.bench.decode_report import kernel_table

    console = Console(width=max(150, Console().width), highlight=False, markup=False)
    for where in content["profiles"] if kernels else ():
        console.print(kernel_table(content, where))
    console.print(table(content))
    for line in verdict(content):
        console.print(line, soft_wrap=True)


def plot(path: Any, content: Row) -> None:
    """Draw tokens/s over the number of sequences, greedy and sampled, beside the bound of the weights' bytes."""
    from matplotlib.figure import Figure

    from ds4jax.bench.decode_report import title
    from ds4jax.files import replacing

    rows = [row for row in content["rows"] if row["context"] == content["context"]]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for sampled, style in ((False, "o-"), (True, "s")):
        points = [(row["sequences"], row["tokens_per_second"]) for row in rows if row["sampled"] == sampled]
        if points:
            axes.plot(*zip(*points, strict=True), style, label="sampled, top-p 0.95" if sampled else "greedy")
    bounds = [(row["sequences"], row["bound"]) for row in rows if row["bound"] and not row["sampled"]]
    if bounds:
        axes.plot(*zip(*bounds, strict=True), "k--", label="the step's weights at the speed of a copy")
    axes.set(xlabel="sequences", ylabel="tokens/s of all sequences", ylim=(0, None), xlim=(0, None))
    axes.set_title(title(content), fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format=path.suffix[1:], dpi=120)

"""Reports of the decode benchmark: tables, a figure and the list of kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds4jax.bench import calls
from ds4jax.bench.profile import KINDS, TOP
from ds4jax.files import replacing

if TYPE_CHECKING:
    from rich.table import Table

COLOURS = dict(zip(KINDS, ("tab:blue", "tab:green", "tab:grey", "tab:orange"), strict=True))
READS = {"weights": "reads weights", "library": "library product", "compiler": "made by XLA", "none": "reads no weights"}
LONGEST_NAME = 60


def title(content: Mapping[str, Any]) -> str:
    """Title of a report: the model, the context and the device. A slice is labelled as one."""
    layers = f"{content['layers']} layers"
    if content["slice"]:
        layers = f"a SLICE of {content['layers']} of {content['whole_layers']} layers, not the model"
    copy = f", copy {content['copy_gbps']:.0f} GB/s" if content["copy_gbps"] else ""
    where = f"context {content['context']}, {content['device']}, jax {content['jax']}{copy}"
    return f"{content['layout']} (random weights), {layers}, {where}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def table(content: Mapping[str, Any]) -> Table:
    """A table with a line for each way to decode. Figures under an assumed acceptance are labelled."""
    from rich import box
    from rich.table import Table

    made = Table(title=title(content), box=box.SIMPLE)
    made.add_column("", no_wrap=True)
    for heading in ("ms a step", "tokens/s", "GB a step", "of the bandwidth", "extra ms", "over its floor", "over greedy, ms"):
        made.add_column(heading, justify="right", no_wrap=True)
    simulated = {row["name"]: row for row in content["simulated"]}
    made.add_column("tokens/s, simulated", justify="right", no_wrap=True)
    for row in content["rows"]:
        assumed = simulated.get(row["name"])
        shares = "/".join(f"{share:g}" for share in assumed["acceptance"]) if assumed else ""
        made.add_row(
            row["name"],
            _number(row["ms_per_step"], 3),
            _number(row["tokens_per_second"], 1),
            _number(row["bytes"] / 1e9, 3),
            _number(row["fraction"], 3),
            _number(row.get("extra_ms"), 3),
            _number(row.get("extra_over_floor"), 2),
            # Results of earlier versions have no sampled rows.
            _number(row.get("over_greedy_ms"), 3),
            f"{assumed['tokens_per_second']:.1f} at {shares}" if assumed else "",
        )
    return made


def kernel_table(content: Mapping[str, Any], where: Mapping[str, Any], limit: int | None = TOP) -> Table:
    """A table of the kernels of one profile, longest first; at most `limit`."""
    from rich import box
    from rich.table import Table

    made = Table(title=f"kernels of a step: {where['program']}, draft {where['draft']}", box=box.SIMPLE)
    made.add_column("kernel", no_wrap=True)
    for heading in ("calls", "µs", "share", "MB", "of the copy"):
        made.add_column(heading, justify="right", no_wrap=True)
    made.add_column("", no_wrap=True)
    for row in _kernels(content, where)[:limit]:
        made.add_row(
            row["name"][:LONGEST_NAME],
            f"{row['calls']:g}",
            f"{row['us']:.1f}",
            f"{row['share']:.3f}",
            _number(row["bytes"] and row["bytes"] / 1e6, 1),
            _number(row["fraction"], 3),
            READS[row["kind"]],
        )
    return made


def _kernels(content: Mapping[str, Any], where: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    key = (where["program"], where["draft"])
    return [row for row in content["kernels"] if (row["program"], row["draft"]) == key]


def _summary(where: Mapping[str, Any]) -> str:
    shares = ", ".join(f"{READS[one]} {where['shares'][one]:.1%}" for one in KINDS)
    return (
        f"{where['program']}, draft {where['draft']}: {where['kernels']:g} kernels a step, "
        f"{where['kernels_per_layer']:g} a layer, {where['kernel_ms']:.3f} ms in kernels; {shares}"
    )


def verdict(content: Mapping[str, Any]) -> list[str]:
    """The lines below the tables: kernels, the lossless check, compile times, memory and problems."""
    lines = [_summary(where) for where in content["profiles"]]
    # Results of earlier versions do not have calls.
    if content.get("calls"):
        lines.append(calls.line(content["calls"]))
    lossless = content["lossless"]
    if lossless:
        output = "the same tokens and fingerprints" if lossless["equal"] else "NOT the same output"
        stood = ", ".join(f"{stood} of {tried}" for stood, tried in zip(lossless["stood"], lossless["tried"], strict=True))
        # Results of earlier versions do not name the drafter.
        by = f" by {content['drafter']}" if content.get("drafter") else ""
        lines.append(
            f"lossless: draft {lossless['draft']}{by} gives {output} as plain over {lossless['tokens']} tokens; accepted: {stood}"
        )
    if content["simulated"]:
        lines.append("simulated: measured milliseconds under an assumed acceptance; random weights accept hardly any drafts")
    # Results of earlier versions do not have these.
    for row in content.get("simulated_per_step", ()):
        rate, count = row["tokens_per_second"], row["tokens_per_step"]
        lines.append(f"simulated: {row['name']}, {rate:.1f} tokens/s if a step commits {count:g} tokens")
    compiled = ", ".join(f"{row['program']} {row['compile_seconds']:.0f} s" for row in content["compiled"])
    memory = f"; peak {content['peak_bytes'] / 1e9:.1f} GB" if content["peak_bytes"] else ""
    lines.append(f"{content['weight_bytes'] / 1e9:.1f} GB made in {content['build_seconds']:.1f} s; compiled: {compiled}{memory}")
    return lines + [f"problem: {problem}" for problem in content["problems"]]


def show(content: Mapping[str, Any], *, kernels: bool = True) -> None:
    """Print the tables and the lines below them on stdout, in their full width."""
    from rich.console import Console

    console = Console(width=max(150, Console().width), highlight=False, markup=False)
    for where in content["profiles"] if kernels else ():
        console.print(kernel_table(content, where))
    console.print(table(content))
    for line in verdict(content):
        console.print(line, soft_wrap=True)


def write_profile(path: Path, content: Mapping[str, Any]) -> None:
    """Write a text file with all kernels of all profiles."""
    from rich.console import Console

    with replacing(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        console = Console(file=file, width=160, highlight=False, markup=False)
        console.print(title(content), soft_wrap=True)
        for where in content["profiles"]:
            console.print(kernel_table(content, where, None))
            console.print(_summary(where), soft_wrap=True)


def plot(path: Path, content: Mapping[str, Any]) -> None:
    """Draw the longest kernels of each profile: microseconds per step, coloured by kind.

    Without a profile, draw the milliseconds per step.
    """
    from matplotlib.figure import Figure

    profiles = content["profiles"]
    figure = Figure(figsize=(10, 5 * max(len(profiles), 1)), layout="constrained")
    figure.suptitle(title(content), fontsize=9)
    panels = figure.subplots(max(len(profiles), 1), squeeze=False)[:, 0]
    if not profiles:
        rows = content["rows"]
        _bars(panels[0], [row["name"] for row in rows], [row["ms_per_step"] for row in rows], ["tab:blue"] * len(rows))
        panels[0].set_xlabel("time of a step, ms")
    for axes, where in zip(panels, profiles, strict=False):
        rows = _kernels(content, where)[:TOP]
        colours = [COLOURS[row["kind"]] for row in rows]
        _bars(axes, [f"{row['name'][:40]} ({row['calls']:g})" for row in rows], [row["us"] for row in rows], colours)
        for one in KINDS:
            axes.barh(0, 0, color=COLOURS[one], label=READS[one])
        axes.legend(fontsize=8, loc="lower right")
        axes.set_xlabel("time in a step, µs")
        axes.set_ylabel("kernel (calls a step)")
        axes.set_title(f"{where['program']}, draft {where['draft']}: {where['kernel_ms']:.2f} ms in {where['kernels']:g} kernels")
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format=path.suffix[1:], dpi=120)


def _bars(axes: Any, names: Sequence[str], values: Sequence[float], colours: Sequence[str]) -> None:
    axes.barh(range(len(names)), values, color=colours)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)

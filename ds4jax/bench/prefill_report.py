"""Tables and the picture of `ds4jax bench prefill`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds4jax.bench.decode_report import LONGEST_NAME, title
from ds4jax.bench.prefill_floor import MATRIX_FLOPS
from ds4jax.files import replacing


def _table(content: Mapping[str, Any]) -> Any:
    from rich import box
    from rich.table import Table

    made = Table(title=title({**content, "context": "0"}), box=box.SIMPLE)
    headings = ("tokens", "calls", "first token ms", "floor ms", "over the floor", "tokens/s", "known before ms", "rows known")
    for heading in headings:
        made.add_column(heading, justify="right", no_wrap=True)
    for row in content["rows"]:
        cold, warm = (statistics.median(row[name]) for name in ("cold_ms", "warm_ms"))
        floor = row["floor_ms"]
        made.add_row(
            f"{row['tokens']:,}",
            by_width(row["calls"]),
            f"{cold:.1f}",
            f"{floor:.1f}" if floor else "",
            f"{cold / floor:.2f}" if floor else "",
            f"{row['tokens_per_second']:,.0f}",
            f"{warm:.1f}" if row["reused"] else "",
            f"{row['reused']:,}" if row["reused"] else "",
        )
    return made


def by_width(calls: list[list[int]]) -> str:
    """Numbers of calls by their width: "4×4096 + 64"."""
    widths = [width for width, _ in calls]
    counts = {width: widths.count(width) for width in widths}
    return " + ".join(f"{count}×{width}" if count > 1 else f"{width}" for width, count in counts.items())


def _kernels(call: Mapping[str, Any]) -> Any:
    from rich import box
    from rich.table import Table

    made = Table(title=f"kernels of a call of {call['width']:,} rows", box=box.SIMPLE)
    for heading in ("kernel", "calls", "ms", "share"):
        made.add_column(heading, justify="left" if heading == "kernel" else "right", no_wrap=True)
    for kernel in call["kernels"]:
        name, calls = kernel["name"][:LONGEST_NAME], f"{kernel['calls']:g}"
        made.add_row(name, calls, f"{kernel['us'] / 1e3:.2f}", f"{kernel['share']:.3f}")
    return made


def verdict(content: Mapping[str, Any]) -> list[str]:
    """The lines below the tables: calls, experts, memory and problems."""
    lines = []
    for call in content["calls"]:
        line = f"a call of {call['width']:,} rows: {call['ms']:.1f} ms, {call['ms_per_layer']:.2f} ms a layer"
        if experts := call["experts"]:
            line += f"; routed experts {experts['ms_per_layer']:.2f} ms a layer, {experts['tflops']:.0f} TFLOP/s"
        lines.append(line)
    temporaries = [f"{int(width):,} rows {size / 1e9:.2f} GB" for width, size in content["temporary_bytes"].items() if size]
    if temporaries:
        lines.append(f"temporaries of a call: {', '.join(temporaries)}")
    peak = f"; peak {content['peak_bytes'] / 1e9:.1f} GB" if content["peak_bytes"] else ""
    lines.append(f"programs made in {content['programs_seconds']:.0f} s{peak}")
    lines.append(f"floor: each weight once at the speed of a copy, or products at {MATRIX_FLOPS / 1e12:.0f} TFLOP/s; then a step")
    return lines + [f"problem: {problem}" for problem in content["problems"]]


def show(content: Mapping[str, Any]) -> None:
    """Print the tables and the lines below them on stdout, in their full width."""
    from rich.console import Console

    console = Console(width=max(150, Console().width), highlight=False, markup=False)
    for call in content["calls"]:
        if call["kernels"]:
            console.print(_kernels(call))
    console.print(_table(content))
    for line in verdict(content):
        console.print(line, soft_wrap=True)


def plot(path: Path, content: Mapping[str, Any]) -> None:
    """Draw the time to the first token over the prompt's length: new prompts, prompts known before, and the floor."""
    from matplotlib.figure import Figure

    rows = content["rows"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.loglog([row["tokens"] for row in rows], [statistics.median(row["cold_ms"]) for row in rows], "o-", label="new prompt")
    known = [row for row in rows if row["reused"]]
    if known:
        warm = [statistics.median(row["warm_ms"]) for row in known]
        axes.loglog([row["tokens"] for row in known], warm, "s-", label="known before")
    floors = [(row["tokens"], row["floor_ms"]) for row in rows if row["floor_ms"]]
    if floors:
        label = f"floor: weights at the speed of a copy, products at {MATRIX_FLOPS / 1e12:.0f} TFLOP/s"
        axes.loglog(*zip(*floors, strict=True), "k--", label=label)
    ticks = [row["tokens"] for row in rows]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="tokens of the prompt", ylabel="time to the first token, ms")
    axes.set_title(title({**content, "context": "0"}), fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format=path.suffix[1:], dpi=120)

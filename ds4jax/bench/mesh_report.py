"""Reports of the benchmark of several devices: a table, a picture and the list of kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds4jax.bench import decode_report
from ds4jax.files import replacing

if TYPE_CHECKING:
    from rich.table import Table

GB = 1e9
# Bars that take this share of the place of a measurement.
WIDTH = 0.8


def title(content: Mapping[str, Any]) -> str:
    """Title of a report. A slice is labelled as one."""
    slices = {(one["layers"], one["whole_layers"]) for one in content["models"] if one["layers"] < one["whole_layers"]}
    layers = "".join(f", a SLICE of {some} of {every} layers, not the model" for some, every in sorted(slices))
    copy = f", copy {content['models'][0]['copy_gbps']:.0f} GB/s" if _copied(content) else ""
    return f"{content['devices']} x {content['device']}, jax {content['jax']}{copy}: random weights{layers}"


def _copied(content: Mapping[str, Any]) -> bool:
    return bool(content["models"] and content["models"][0]["copy_gbps"])


def column(row: Mapping[str, Any]) -> str:
    """What devices a row was measured on."""
    parts = [f"{row['devices']} device{'s' * (row['devices'] > 1)}"]
    parts += [row["exchange"]] if row["exchange"] not in ("none", "collective") else []
    parts += [f"{row['processes']} processes"] if row["processes"] > 1 else []
    return ", ".join(parts)


def speed(row: Mapping[str, Any]) -> float | None:
    """Tokens/s, of drafts under the assumed acceptance; None without one."""
    return row["tokens_per_second"] or row.get("simulated_tokens_per_second")


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    ms, rate = row.get("ms_per_step", row.get("ms_per_call")), speed(row)
    simulated = " (simulated)" if row.get("simulated") else ""
    return f"{ms:.2f} ms" + (f", {rate:.1f}{simulated}" if rate else "")


def table(content: Mapping[str, Any]) -> Table:
    """A line for each layout and measurement, a column for each number of devices: milliseconds and tokens/s."""
    from rich import box
    from rich.table import Table

    columns = list(dict.fromkeys(map(column, sorted(content["rows"], key=lambda row: (row["processes"], row["devices"])))))
    made = Table(title=f"{title(content)}; ms a step or call, tokens/s", box=box.SIMPLE)
    for heading in ("layout", ""):
        made.add_column(heading, no_wrap=True)
    for heading in columns:
        made.add_column(heading, justify="right", no_wrap=True)
    found = {(row["layout"], row["name"], column(row)): row for row in content["rows"]}
    for layout, name in dict.fromkeys(key[:2] for key in found):
        made.add_row(layout, name, *(_cell(found.get((layout, name, one))) for one in columns))
    return made


def verdict(content: Mapping[str, Any]) -> list[str]:
    """The lines below the table: exchanges, memory, bits, and what is missing."""
    lines = [
        f"a gather by {row['exchange']} of {row['whole_bytes']:,} bytes ({row['name']}): {row['us_per_gather']:.2f} µs"
        for row in content["gathers"]
    ]
    for one in content["profiled"]:
        total = one["totals"]
        lines.append(
            f"{total['program']}: {total['kernels']:g} kernels a step, {total['kernel_ms']:.3f} ms, "
            f"{total['exchange_kernels']:g} of them exchanges, {total['exchange_ms']:.3f} ms"
        )
    for one in content["models"]:
        peak = max((count for count in one["made_peak_bytes"] if count), default=None)
        peaks = f", peak {peak / GB:.2f} GB while they were made" if peak else ""
        lines.append(
            f"{one['layout']}, {column(one)}: {one['weight_bytes'] / GB:.2f} GB of weights made in {one['made_seconds']:.1f} s, "
            f"at most {max(one['held_bytes']) / GB:.2f} GB ({max(one['held_share']):.3f}) on a device{peaks}"
        )
    if any(row.get("simulated") for row in content["rows"]):
        lines.append("simulated: measured milliseconds under an assumed acceptance; random weights accept hardly any drafts")
    same = [one for one in content["compared"] if one["equal"]]
    lines.append(f"bits: {len(content['compared'])} comparisons, {len(content['compared']) - len(same)} with differences")
    lines += [f"DIFFERENT: {_difference(one)}" for one in content["compared"] if not one["equal"]]
    lines += [f"not measured: {one['layout']}, {column(one)}: {one['reason']}" for one in content["not_measured"]]
    return lines + [f"problem: {problem}" for problem in content["problems"]]


def _difference(one: Mapping[str, Any]) -> str:
    against = {name: one[f"against_{name}"] for name in ("devices", "exchange", "processes")}
    where = f"{one['layout']}, {one['name']}, {column(one)} against {column(against)}"
    return f"{where}: {one['differing_steps']} of {one['steps']} steps, first {one['first_differing_step']}"


def show(content: Mapping[str, Any]) -> None:
    """Print the lines and the table on stdout, in their full width; the table comes last."""
    from rich.console import Console

    console = Console(width=max(150, Console().width), highlight=False, markup=False)
    for line in verdict(content):
        console.print(line, soft_wrap=True)
    console.print(table(content))


def write_profile(path: Path, content: Mapping[str, Any]) -> None:
    """Write a text file with all kernels of all profiles; none without profiles."""
    from rich.console import Console

    if not content["profiled"]:
        return
    flat = {"kernels": [row for one in content["profiled"] for row in one["kernels"]]}
    with replacing(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        console = Console(file=file, width=160, highlight=False, markup=False)
        console.print(f"{title(content)}; kernels of the first device", soft_wrap=True)
        for one in content["profiled"]:
            console.print(decode_report.kernel_table(flat, one["totals"], None))


def plot(path: Path, content: Mapping[str, Any]) -> None:
    """Draw tokens/s by measurement and number of devices, a panel for each layout, and the time of a gather by its size."""
    from matplotlib.figure import Figure

    layouts = list(dict.fromkeys(row["layout"] for row in content["rows"]))
    figure = Figure(figsize=(9, 4 * (len(layouts) + 1)), layout="constrained")
    figure.suptitle(title(content), fontsize=9)
    *panels, last = figure.subplots(len(layouts) + 1, squeeze=False)[:, 0]
    for axes, layout in zip(panels, layouts, strict=True):
        _bars(axes, layout, [row for row in content["rows"] if row["layout"] == layout and speed(row)])
    _gathers(last, content["gathers"])
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format=path.suffix[1:], dpi=120)


def _bars(axes: Any, layout: str, rows: Sequence[Mapping[str, Any]]) -> None:
    names = list(dict.fromkeys(row["name"] for row in rows))
    columns = sorted(dict.fromkeys(map(column, rows)))
    width = WIDTH / max(len(columns), 1)
    for i, one in enumerate(columns):
        mine = [row for row in rows if column(row) == one]
        places = [names.index(row["name"]) + (i - (len(columns) - 1) / 2) * width for row in mine]
        drawn = axes.bar(places, [speed(row) for row in mine], width, label=one)
        axes.bar_label(drawn, fmt="%.0f", fontsize=7)
    simulated = {row["name"] for row in rows if row.get("simulated")}
    labels = [f"{name}\n(simulated acceptance)" if name in simulated else name for name in names]
    axes.set_xticks(range(len(names)), labels, fontsize=8)
    # A prompt has a hundred times the tokens/s of a step.
    axes.set(yscale="log", ylabel="tokens/s", title=layout)
    axes.grid(axis="y", alpha=0.3)
    if columns:
        axes.legend(fontsize=8)


def _gathers(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    for one in dict.fromkeys((row["devices"], row["exchange"]) for row in rows):
        points = sorted((row["whole_bytes"], row["us_per_gather"]) for row in rows if (row["devices"], row["exchange"]) == one)
        axes.plot(*zip(*points, strict=True), "o-", label=f"{one[0]} devices, {one[1]}")
    axes.set(xlabel="gathered, from all devices together, bytes", ylabel="time of a gather in a chain, µs")
    axes.grid(alpha=0.3, which="both")
    if rows:
        axes.set(xscale="log", yscale="log")
        axes.legend(fontsize=8)

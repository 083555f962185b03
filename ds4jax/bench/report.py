"""Reports of the kernel benchmark: a JSON file, a short table and a figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds4jax.files import replacing

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 1
NAMES = {"activation": "q8_activation", "dot_bf16": "jnp.dot bf16", "dot_f16": "jnp.dot f16"}
MARKERS = "osD^vPX*"


def document(
    environment: Mapping[str, Any],
    copy_gbps: float,
    rows: Sequence[Mapping[str, Any]],
    bits: Sequence[Mapping[str, Any]],
    problems: Sequence[str],
) -> dict[str, Any]:
    """The content of a result file."""
    return {
        "schema": SCHEMA,
        **environment,
        "copy_gbps": round(copy_gbps, 1),
        "rows": list(rows),
        "bits": list(bits),
        "problems": list(problems),
    }


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result file, one row per line. The file is either complete or unchanged."""
    fields = []
    for key, value in content.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(f"    {json.dumps(item, ensure_ascii=False)}" for item in value) + "\n  ]"
        fields.append(f"  {json.dumps(key)}: {text}")
    with replacing(path) as unfinished:
        unfinished.write_text("{\n" + ",\n".join(fields) + "\n}\n", encoding="utf-8")


def _cell(row: Mapping[str, Any] | None) -> str:
    return "" if row is None else f"{row['us']:.1f} {row['fraction']:.2f}"


def table(content: Mapping[str, Any]) -> Table:
    """A table of microseconds and fractions of the copy bandwidth: a line for each shape and kind, a column for each M."""
    from rich import box
    from rich.table import Table

    found = {(row["name"], row["shape"], row["kind"], row["m"]): row for row in content["rows"]}
    columns = sorted({m for *_, m in found})
    made = Table(
        title=f"{content['device']}, jax {content['jax']}, copy {content['copy_gbps']:.0f} GB/s: µs, fraction of the copy",
        box=box.SIMPLE,
    )
    for heading in ("product", "shape"):
        made.add_column(heading, no_wrap=True)
    for m in columns:
        made.add_column(f"M={m}", justify="right", no_wrap=True)
    for name, shape, kind in dict.fromkeys(key[:3] for key in found):
        made.add_row(NAMES.get(kind, name), shape, *(_cell(found.get((name, shape, kind, m))) for m in columns))
    return made


def verdict(content: Mapping[str, Any]) -> list[str]:
    """The lines below the table: bit comparisons, the speed relative to `jnp.dot`, and all problems."""
    lines = []
    if content["bits"]:
        bad = [row for row in content["bits"] if row["differing"]]
        lines.append(f"bits: {len(content['bits'])} comparisons, {len(bad)} with differences")
        lines += [f"  {row['shape']} M={row['m']}, {row['against']}: {row['differing']} values differ" for row in bad]
    us = {(row["shape"], row["kind"], row["m"]): row["us"] for row in content["rows"]}
    for (shape, kind, m), dot in us.items():
        if kind == "dot_bf16" and (shape, "share_warp", m) in us:
            lines.append(f"{shape} M={m}: {dot / us[shape, 'share_warp', m]:.2f} times as fast as jnp.dot bf16")
    return lines + [f"not measured: {problem}" for problem in content["problems"]]


def show(content: Mapping[str, Any]) -> None:
    """Print the table and the lines below it on stdout, in their full width."""
    from rich.console import Console

    console = Console(width=max(120, Console().width), highlight=False, markup=False)
    console.print(table(content))
    for line in verdict(content):
        console.print(line, soft_wrap=True)


def plot(path: Path, content: Mapping[str, Any]) -> None:
    """Draw the share-warp launches: fraction of the copy bandwidth over bytes of weights, with a marker for each M."""
    from matplotlib.figure import Figure

    rows = [row for row in content["rows"] if row["kind"] == "share_warp"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for i, m in enumerate(sorted({row["m"] for row in rows})):
        points = sorted((row["weight_bytes"] / 1e6, row["fraction"]) for row in rows if row["m"] == m)
        axes.plot(*zip(*points, strict=True), MARKERS[i % len(MARKERS)], label=f"M = {m}", linestyle=":", linewidth=0.7)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(xscale="log", ylim=(0, 1.1), xlabel="weights of a launch, MB")
    axes.set_ylabel(f"fraction of the copy bandwidth, {content['copy_gbps']:.0f} GB/s")
    axes.set_title(f"Q8_0 share-warp matmul on {content['device']}, jax {content['jax']}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format=path.suffix[1:], dpi=120)

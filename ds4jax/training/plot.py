"""Draws the loss curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ds4jax.files import replacing

CURVES = (
    ("train_bits_per_byte", "training (with its noise)", "C0", 1.0),
    ("mtp_bits_per_byte", "training, MTP block", "C2", 1.0),
    ("validation_bits_per_byte", "validation", "C3", 2.0),
)


def draw_curve(log: list[dict[str, Any]], path: Path) -> None:
    """Draw bits per byte over steps for training, MTP block and validation, as a PNG of 1200 × 700 pixels."""
    figure = Figure(figsize=(12, 7), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    lowest, typical = [], []
    for name, label, colour, width in CURVES:
        points = [(entry["step"], entry[name]) for entry in log if name in entry]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color=colour, linewidth=width, label=f"{label} (last {values[-1]:.3f})")
            lowest.append(min(values))
            typical.append(sorted(values)[int(0.9 * (len(values) - 1))])
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte")
    if lowest:
        # The loss of the first steps is so high that it would flatten the curve after them.
        axes.set_ylim(min(lowest) - 0.1, max(max(typical), min(lowest) + 0.5))
        axes.legend()
    axes.grid(alpha=0.3)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="png")

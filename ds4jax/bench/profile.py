"""Profiles the kernels of a decode step: calls, time, and whether they read weights."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from ds4jax.bench.programs import Loop
from ds4jax.bench.traffic import base_name, kernel_bytes
from ds4jax.decode.loop import DecodeState
from pallas_kernels.core.timing import device_events

STEPS = 8
TOP = 15
# Names of products by a library, and of the compiler's other kernels. Both may read weights.
_LIBRARY = re.compile(r"gemm|gemv|cublas|cutlass|nvjet|cudnn|dot_", re.IGNORECASE)
_COMPILER = re.compile(
    r"fusion|^wrapped_|^loop_|^input_|^copy|^memcpy|^memset|^sort|^topk|radix|cub::|scatter|^select_and|^transpose|^reduce"
    r"|^broadcast|^concatenate|^dynamic|^convert|^gather|^slice|^iota|^compare|^bitcast|^while|^rng",
    re.IGNORECASE,
)
KINDS = ("weights", "library", "compiler", "none")

Row = dict[str, Any]


def kind(name: str) -> str:
    """Kind of a kernel. Ours are "weights" (it reads weights) or "none"; "library" and "compiler" may read weights or not."""
    if kernel_bytes(name):
        return "weights"
    if _LIBRARY.search(name):
        return "library"
    return "compiler" if _COMPILER.search(name) else "none"


def events(loop: Loop, depth: int) -> tuple[list[tuple[str, float]], int]:
    """Name and microseconds of each kernel in a few steps, and the number of steps."""
    state, done = loop.fresh(), []

    def run() -> DecodeState:
        done.append(loop.run(state, STEPS, depth))
        return done[0]

    found = device_events(run)
    return found, int(done[0].acceptance.steps[0])


def rows(found: Sequence[tuple[str, float]], steps: int, copy_gbps: float | None) -> list[Row]:
    """A row for each kernel, longest first: calls, microseconds and bytes per step, and share of the kernels' total time."""
    times: dict[str, list[float]] = defaultdict(list)
    for name, us in found:
        times[base_name(name)].append(us)
    total = sum(map(sum, times.values()))
    made = []
    for name, samples in sorted(times.items(), key=lambda item: -sum(item[1])):
        us, calls = sum(samples) / steps, len(samples) / steps
        count = round(calls * (kernel_bytes(name) or 0)) or None
        made.append(
            {
                "name": name,
                "kind": kind(name),
                "calls": round(calls, 2),
                "us": round(us, 2),
                "share": round(sum(samples) / total, 4),
                "bytes": count,
                "fraction": round(count / us / 1e3 / copy_gbps, 4) if count and copy_gbps else None,
            }
        )
    return made


def summary(made: Sequence[Row], layers: int) -> Row:
    """Totals of the rows: kernels and milliseconds per step, and the share of the time by kind of kernel.

    `no_weights_at_most` includes the compiler's kernels, some of which do read weights.
    """
    shares = {one: round(sum(row["share"] for row in made if row["kind"] == one), 4) for one in KINDS}
    calls = sum(row["calls"] for row in made)
    return {
        "kernels": round(calls, 1),
        "kernels_per_layer": round(calls / layers, 2),
        "kernel_ms": round(sum(row["us"] for row in made) / 1e3, 4),
        "shares": shares,
        "no_weights": shares["none"],
        "no_weights_at_most": round(shares["none"] + shares["compiler"], 4),
    }


def profile(loop: Loop, depth: int, copy_gbps: float | None) -> tuple[Row, list[Row]]:
    """Profile a program's step at a depth: the totals, and a row for each kernel.

    Raises:
        RuntimeError: the trace contains no kernels.
    """
    found, steps = events(loop, depth)
    if not found:
        raise RuntimeError("the trace holds no kernels")
    where = {"program": loop.program.name, "draft": depth}
    made = rows(found, steps, copy_gbps)
    return {**where, "steps": steps, **summary(made, loop.config.n_layers)}, [{**where, **row} for row in made]

"""The kernels of a decode step by the profiler: how often, how long, and whether they read weights."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from ds4jax.bench.programs import Loop
from ds4jax.bench.traffic import base_name, kernel_bytes
from ds4jax.decode import DecodeState
from pallas_kernels.timing import device_events

STEPS = 8
TOP = 15
# What a library or the compiler made of a product, and whatever else the compiler made: both may read weights.
_LIBRARY = re.compile(r"gemm|gemv|cublas|cutlass|nvjet|cudnn|dot_", re.IGNORECASE)
_COMPILER = re.compile(
    r"fusion|^wrapped_|^loop_|^input_|^copy|^memcpy|^memset|^sort|^topk|radix|cub::|scatter|^select_and|^transpose|^reduce"
    r"|^broadcast|^concatenate|^dynamic|^convert|^gather|^slice|^iota|^compare|^bitcast|^while|^rng",
    re.IGNORECASE,
)
KINDS = ("weights", "library", "compiler", "none")

Row = dict[str, Any]


def kind(name: str) -> str:
    """What a kernel is: "weights" and "none" are ours, which read some or none; of "library" and "compiler" nobody can say."""
    if kernel_bytes(name):
        return "weights"
    if _LIBRARY.search(name):
        return "library"
    return "compiler" if _COMPILER.search(name) else "none"


def events(loop: Loop, depth: int) -> tuple[list[tuple[str, float]], int]:
    """Name and microseconds of every kernel of a few steps, and the number of steps."""
    state, done = loop.fresh(), []

    def run() -> DecodeState:
        done.append(loop.run(state, STEPS, depth))
        return done[0]

    found = device_events(run)
    return found, int(done[0].acceptance.steps)


def rows(found: Sequence[tuple[str, float]], steps: int, copy_gbps: float | None) -> list[Row]:
    """A row for each kernel, longest first: calls and microseconds of a step, share of all kernels' time, and bytes of a step."""
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
    """What the rows say together: kernels and milliseconds of a step, and the share of the time by what kernels read.

    `no_weights_at_most` counts the compiler's kernels in, some of which do read weights.
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
    """The kernels of a program's step at a depth: what they are together, and a row for each.

    Raises:
        RuntimeError: the trace holds no kernels.
    """
    found, steps = events(loop, depth)
    if not found:
        raise RuntimeError("the trace holds no kernels")
    where = {"program": loop.program.name, "draft": depth}
    made = rows(found, steps, copy_gbps)
    return {**where, "steps": steps, **summary(made, loop.config.n_layers)}, [{**where, **row} for row in made]

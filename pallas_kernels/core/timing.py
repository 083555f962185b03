"""Kernel times from the profiler. A host clock would measure the launch, not the kernel."""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Callable, Sequence

import jax


def device_events(run: Callable[[], object]) -> list[tuple[str, float]]:
    """Name and time (µs) of every kernel that `run` starts on the GPU, in order; of several GPUs on the first."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        [path] = glob.glob(folder + "/**/*.xplane.pb", recursive=True)
        data = jax.profiler.ProfileData.from_file(path)
        events = {
            plane.name: [
                (event.start_ns, event.name, event.duration_ns / 1e3)
                for line in plane.lines
                if "Stream" in line.name
                for event in line.events
            ]
            for plane in data.planes
            if "GPU" in plane.name
        }
    first = min((name for name, found in events.items() if found), default=None)
    return [(name, us) for _, name, us in sorted(events[first])] if first else []


def kernel_times(programs: Sequence[Callable[[], object]], kernel: str, calls: int, repeats: int = 5) -> list[list[float]]:
    """Times (µs) of every call of `kernel` by each compiled program, in one trace.

    Args:
        calls: launches of the kernel in one run of a program.
        repeats: runs of each program.

    Raises:
        RuntimeError: the number of launches in the trace is not the expected one.
    """
    for program in programs:
        jax.block_until_ready(program())

    def run_all() -> object:
        return [[program() for _ in range(repeats)] for program in programs]

    times = [us for name, us in device_events(run_all) if kernel in name]
    each = calls * repeats
    if len(times) != each * len(programs):
        raise RuntimeError(f"{kernel}: the trace holds {len(times)} launches, expected {each * len(programs)}")
    return [times[i * each : (i + 1) * each] for i in range(len(programs))]

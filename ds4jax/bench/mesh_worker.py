"""A process of the benchmark of several devices. It measures one run, and prints a line of JSON for everything that it has found.

Usage: python -m ds4jax.bench.mesh_worker RUN, where RUN is a JSON object with the fields of `Task`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax

from ds4jax.bench.mesh_options import GATHERS, Options, Run

# Begins the lines of this program; libraries print other ones.
MARK = "ds4jax-mesh "
HOST = "127.0.0.1"
# Characters of an error that are told.
LONGEST = 300

# Says what was found: its kind, and a value for JSON.
Speak = Callable[[str, Any], None]


@dataclasses.dataclass(frozen=True)
class Task:
    """What a process has to do.

    Attributes:
        index, port: which of the run's processes it is, and where process 0 listens; used if there are several.
    """

    options: Options
    run: Run
    index: int = 0
    port: int = 0

    def text(self) -> str:
        """The task as an argument of the program."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def of(cls, text: str) -> Task:
        """The task of an argument."""
        fields = json.loads(text)
        options, run = ({name: _tuples(value) for name, value in fields[part].items()} for part in ("options", "run"))
        return cls(Options(**options), Run(**run), fields["index"], fields["port"])


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def say(kind: str, value: Any) -> None:
    """Print one thing that was found."""
    print(f"{MARK}{json.dumps({kind: value})}", flush=True)


def main(text: str) -> None:
    """Do a task. Process 0 of several says what is found; the others wait for its end."""
    from ds4jax import runtime

    task = Task.of(text)
    runtime.configure()
    if task.run.processes == 1:
        _measure(task)
    else:
        _together(task)


def _together(task: Task) -> None:
    from ds4jax.processes.job import begin
    from ds4jax.processes.seat import WAIT, Seat

    job = begin(Seat(HOST, task.port, task.index, task.run.processes, WAIT), {})
    with job.together():
        # The first exchange gives up if a process comes half a minute after the others.
        _measure(task, meet=functools.lru_cache(job.meet))
        if task.index == 0:
            job.close()
        else:
            for _ in job.orders():
                pass


def _measure(task: Task, meet: Callable[[], None] = lambda: None) -> None:
    """Measure all pieces. One that fails is a problem, and the next one is measured; it does not count as finished."""
    from ds4jax.errors import InputError
    from ds4jax.loading.placement import chosen

    run, options = task.run, task.options
    speak = say if task.index == 0 else _silent
    devices = chosen("all" if run.processes > 1 else run.devices)
    if run.layout is None:
        if _gathers(task, devices, speak):
            speak("finished", {"piece": GATHERS})
        speak("done", True)
        return
    from ds4jax.bench import mesh_pieces
    from ds4jax.bench.whole_model import WholeModel

    note = functools.partial(speak, "note")
    # One device exchanges nothing.
    exchange = run.exchange if len(devices) > 1 else "auto"
    try:
        model = WholeModel.make(run.layout, options.layers, note, devices, exchange)
    except InputError as error:
        speak("too_large", str(error))
        return
    speak("model", _weights(model, devices, mesh_pieces.peaks(devices)))
    profiled = functools.partial(_profiled, speak, run)
    problems: list[str] = []
    one = mesh_pieces.Measured(model, options, devices, meet, problems.append, profiled, note)
    for piece in run.pieces:
        with contextlib.nullcontext() if run.processes > 1 else _caught(problems):
            for row in mesh_pieces.FUNCTIONS[piece](one):
                speak("row", {"piece": piece, **row})
        for problem in problems:
            speak("problem", f"{piece}: {problem}")
        if not problems:
            speak("finished", {"piece": piece})
        problems.clear()
    speak("done", True)


def _silent(kind: str, value: Any) -> None:
    """For processes whose findings are those of process 0."""


@contextlib.contextmanager
def _caught(problems: list[str]) -> Iterator[None]:
    """An error inside is a problem."""
    try:
        yield
    except Exception as error:
        problems.append(" ".join(str(error).split())[:LONGEST] or type(error).__name__)


def _gathers(task: Task, devices: tuple[jax.Device, ...], speak: Speak) -> bool:
    """Time gathers. Returns whether all brought their values to the right places."""
    from ds4jax.bench import exchanges
    from ds4jax.random_models.checkpoint import config_of

    options, right = task.options, True
    config, note = config_of(options.layouts[0], options.layers), functools.partial(speak, "note")
    for row in exchanges.measure(config, devices, (1, *options.slots), options.links, task.run.exchange, note):
        speak("gather", {"piece": GATHERS, **row})
        if not row["right"]:
            right = False
            speak("problem", f"a gather of {row['whole_bytes']} bytes brings values to a wrong place")
    return right


def _weights(model: Any, devices: tuple[jax.Device, ...], peaks: list[int | None]) -> dict[str, Any]:
    """Bytes of the weights, those that each device of this process holds, and its peak while they were made."""
    held = dict.fromkeys((one for one in devices if one.process_index == jax.process_index()), 0)
    for array in model.weights:
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    share = [round(count / model.nbytes, 4) for count in held.values()]
    return {
        "copy_gbps": round(model.bandwidth, 1) if model.bandwidth else None,
        "whole_layers": model.fields()["whole_layers"],
        "layers": model.config.n_layers,
        "weight_bytes": model.nbytes,
        "held_bytes": list(held.values()),
        "held_share": share,
        "made_peak_bytes": peaks,
        "made_seconds": round(model.seconds, 2),
    }


def _profiled(speak: Speak, run: Run, totals: dict[str, Any], kernels: list[dict[str, Any]]) -> None:
    program = f"{run.name}: {totals['program']}"
    speak("profile", {"totals": totals | {"program": program}, "kernels": [row | {"program": program} for row in kernels]})


if __name__ == "__main__":
    main(sys.argv[1])

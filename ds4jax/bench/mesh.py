"""Measures V4-Flash on several devices, and compares its bits on any number of them.

Every run is a process with a time limit. If one waits for an exchange forever, it costs no more than that, and the next one finds
all memory free. What a process has found is kept at once.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from ds4jax.bench import environment, mesh_processes
from ds4jax.bench.mesh_options import Options, Run, runs
from ds4jax.bench.mesh_worker import Task
from ds4jax.bench.whole_model import Note, Row
from ds4jax.bounds import WAYS
from ds4jax.errors import InputError
from ds4jax.model import paths

SCHEMA = 1
# Lists of a result to which processes add, by the kind of what they say.
LISTS = {"model": "models", "row": "rows", "gather": "gathers", "profile": "profiled", "finished": "finished"}
# What tells runs apart.
WHERE = ("layout", "devices", "exchange", "processes")

__all__ = ["Options", "bench", "earlier", "good"]


def bench(options: Options, note: Note, keep: Callable[[Row], None], before: Row | None = None) -> Row:
    """Measure everything, or what the time allows. Returns the content of a result file.

    Args:
        keep: takes the content after everything that was found.
        before: an earlier result. What it has is not measured again if device, versions, source and options are the same.

    Raises:
        InputError: there are not so many devices, or JAX does not start.
    """
    began = time.monotonic()
    found = environment.probe()
    devices = options.devices or found["count"]
    if devices > found["count"]:
        raise InputError(f"devices is {devices}; there are {found['count']} {found['backend']} devices")
    if devices < 2:
        raise InputError(f"devices is {devices}; this measures at least 2")
    if not options.exchanges:
        able = paths.why_no_peers([found["device"]] * devices, 1) is None
        options = dataclasses.replace(options, exchanges=WAYS if able else WAYS[:1])
    content, planned = _begun(options, devices, found, before, note), runs(options, devices)
    if not planned:
        raise InputError("pieces is processes: it stands beside plain, on an even number of devices; name plain, too")
    for run in planned:
        left = _left(run, content)
        spent = time.monotonic() - began
        limits = [options.limit_seconds or None, options.all_seconds - spent if options.all_seconds else None]
        if left.pieces:
            _follow(Task(options, left), min((one for one in limits if one is not None), default=None), content, note, keep)
    return content


def good(content: Row) -> bool:
    """Whether everything was measured that fits on the devices, and no bit depends on their number."""
    return not content["problems"] and all(one["equal"] for one in content["compared"])


def earlier(path: Path) -> Row | None:
    """An earlier result; None if there is no such file.

    Raises:
        InputError: the file is no result of this benchmark.
    """
    content: object
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or "options" not in content:
        raise InputError(f"{path}: is no result of this benchmark and version; remove it, or give another file")
    return content


def _begun(options: Options, devices: int, found: Row, before: Row | None, note: Note) -> Row:
    """A result without figures, or with those of an earlier run of the same."""
    asked = json.loads(json.dumps(dataclasses.asdict(options)))
    # Limits change no figure.
    asked = {name: value for name, value in asked.items() if not name.endswith("_seconds")}
    content = {"schema": SCHEMA, **found, "devices": devices, "options": asked}
    same = {name: value for name, value in content.items() if name not in ("command", "commit")}
    other = [name for name, value in same.items() if before and before.get(name) != value]
    if before is not None and not other:
        content |= _finished(before)
    else:
        content |= {name: [] for name in LISTS.values()}
    if other:
        note(f"the earlier result has another {', '.join(other)}, so everything is measured again")
    return content | {"compared": compared(content["rows"]), "not_measured": [], "problems": []}


def _finished(before: Row) -> Row:
    """The lists of an earlier result, without rows of pieces that were cut, which are measured again."""
    whole = [_place(one) for one in before["finished"]]
    return {name: [row for row in before[name] if "piece" not in row or _place(row) in whole] for name in LISTS.values()}


def _place(row: Row) -> list[object]:
    return [row[name] for name in (*WHERE, "piece")]


def _left(run: Run, content: Row) -> Run:
    """The run without the pieces that were measured."""
    finished, where = [_place(one) for one in content["finished"]], [getattr(run, name) for name in WHERE]
    return dataclasses.replace(run, pieces=tuple(piece for piece in run.pieces if [*where, piece] not in finished))


def _follow(task: Task, limit: float | None, content: Row, note: Note, keep: Callable[[Row], None]) -> None:
    """Run a task's processes, and add what they say to the result."""
    run, done, reason = task.run, False, "the process ended early"
    where = {name: getattr(run, name) for name in WHERE}
    note(f"{run.name}: {', '.join(run.pieces)}")
    try:
        for kind, value in mesh_processes.said(task, limit):
            if kind == "note":
                note(f"{run.name}: {value}")
                continue
            if kind in LISTS:
                _add(content[LISTS[kind]], where | value, once=kind == "model")
            elif kind == "problem":
                content["problems"].append(f"{run.name}: {value}")
            elif kind == "too_large":
                content["not_measured"].append(where | {"reason": value})
                done, reason = run.devices < content["devices"], value
            done = done or kind == "done"
            content["compared"] = compared(content["rows"])
            keep(content)
    except mesh_processes.FailedError as error:
        reason = str(error)
    if not done:
        content["problems"].append(f"{run.name}: {reason}")
        keep(content)


def _add(rows: list[Row], row: Row, *, once: bool) -> None:
    """Add a row; if there is one of each run, it takes the earlier one's place."""
    if once:
        rows[:] = [other for other in rows if any(other[name] != row[name] for name in WHERE)]
    rows.append(row)


def compared(rows: Iterable[Row]) -> list[Row]:
    """Compare the bits of each row with those of the same on the fewest devices, processes and exchanges in their order."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["layout"], row["name"]), []).append(row)
    found = []
    for (layout, name), same in groups.items():
        base, *others = sorted(same, key=lambda row: (row["devices"], row["processes"]))
        for row in others:
            pairs = list(zip(base["step_digests"], row["step_digests"], strict=True))
            differing = [i for i, (ours, theirs) in enumerate(pairs) if ours != theirs]
            found.append(
                {
                    "layout": layout,
                    "name": name,
                    **{what: row[what] for what in WHERE[1:]},
                    **{f"against_{what}": base[what] for what in WHERE[1:]},
                    "steps": len(pairs),
                    "differing_steps": len(differing),
                    "first_differing_step": differing[0] if differing else None,
                    "equal_tokens": base.get("tokens_digest") == row.get("tokens_digest"),
                    "equal": not differing,
                }
            )
    return found

"""Measures the time of a decode step at each depth of a drafting loop, for draft 'auto' and the table of `engine.cost_table`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from ds4jax.bench import environment
from ds4jax.bench.whole_model import Row
from ds4jax.bounds import DRAFTERS, LAYOUT_NAMES, own_drafter
from ds4jax.cache.capacity import capacity_for
from ds4jax.engine.cost_table import Entry
from ds4jax.engine.costs import measured
from ds4jax.engine.loaded import Loaded
from ds4jax.engine.warmup import without_weights
from ds4jax.errors import InputError
from ds4jax.files import read_regular
from ds4jax.random_models import checkpoint as synthetic

SCHEMA = 1
# Fields of a result that say where and how it was made.
_ORIGIN = ("device", "driver", "jax", "jaxlib", "python", "commit", "kernels_sha256", "command")


def random_model(layout: str, drafter: str = DRAFTERS[0], max_draft: int | None = None) -> Loaded:
    """A model of random weights in a layout's shapes, opened with a drafter.

    Raises:
        InputError: the layout lacks the drafter, or the weights do not fit on the device.
    """
    config = synthetic.config_of(layout)
    own = own_drafter(config)
    if drafter not in (DRAFTERS[0], own, "ngram"):
        raise InputError(f"drafter is {drafter}; {layout} has {own}, and ngram needs no weights")
    name = own if drafter == DRAFTERS[0] else drafter
    return Loaded(synthetic.synthetic(synthetic.checkpoint(config, layout)), None, drafter=name, max_draft=max_draft)


def bench(model: Loaded, name: str, *, strict: bool, runs: int, tokens: int) -> Row:
    """Time the loop of a model. Returns the content of a result file.

    Raises:
        InputError: the loop has no drafts, so there is nothing to choose.
    """
    if not model.max_draft:
        raise InputError(f"{name}: max-draft is 0; draft 'auto' needs a loop that can draft")
    capacity = capacity_for(1, model.config.max_context)
    samples = list(zip(*measured(model, capacity, strict=strict, runs=runs, tokens=tokens), strict=True))
    ms = [round(_typical(times), 4) for times in samples]
    return {
        "schema": SCHEMA,
        **environment.describe(),
        "model": name,
        "key": model.shape_key,
        "drafter": model.drafter_name,
        "max_draft": model.max_draft,
        "strict": strict,
        "capacity": capacity,
        "tokens": tokens,
        "ms": ms,
        "samples": [[round(time, 4) for time in times] for times in samples],
    }


def _typical(times: tuple[float, ...]) -> float:
    """The median. On a CPU the minimum, because other processes take its cores and only lengthen a run."""
    return min(times) if jax.default_backend() == "cpu" else statistics.median(times)


def from_result(path: Path) -> Row:
    """The same content from a file: a result of this benchmark, or one of `bench decode`, of which the drafting program counts.

    Raises:
        InputError: the file is no such result, covers a part of the layers, or lacks a depth.
    """
    try:
        result: Row = json.loads(read_regular(path))
        if "key" in result:
            entry(result)
            return result
        layout, part, rows = result["layout"], result["slice"], result["rows"]
        # Results of earlier versions have no sampled rows.
        greedy = [row for row in rows if not row["strict"] and not row.get("sampled")]
        times = {(row["program"], row["draft"]): row["ms_per_step"] for row in greedy}
        most = max(row["draft"] for row in rows)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: is no result of `ds4jax bench decode` or `bench costs` ({error})") from None
    if part or layout not in LAYOUT_NAMES:
        raise InputError(f"{path}: layout: is {layout}{', a slice' if part else ''}; a table needs a whole layout")
    config, program = synthetic.config_of(layout), f"max_draft {most}"
    missing = [str(depth) for depth in range(1 + most) if (program, depth) not in times]
    if missing or not most:
        raise InputError(f"{path}: rows: draft {', '.join(missing) or 1} is missing; run `ds4jax bench decode` with every depth")
    model = without_weights(synthetic.checkpoint(config, layout), max_draft=most)
    return {
        "schema": SCHEMA,
        **{name: result.get(name) for name in _ORIGIN},
        "model": layout,
        "key": model.shape_key,
        "drafter": result.get("drafter", model.drafter_name),
        "max_draft": most,
        "strict": False,
        "capacity": result.get("capacity"),
        "ms": [times[program, depth] for depth in range(1 + most)],
    }


def entry(content: Mapping[str, Any], note: str = "") -> Entry:
    """The table's entry of a result."""
    names = ("device", "key", "drafter", "max_draft", "strict", "model", "command", "commit")
    return Entry(ms=tuple(content["ms"]), note=note, **{name: content[name] for name in names})


def show(content: Mapping[str, Any]) -> None:
    """Print a line for each depth on stdout."""
    loop = f"max_draft {content['max_draft']}{' strict' if content['strict'] else ''}"
    print(f"{content['model']} ({content['key']}) on {content['device']}, {content['drafter']} in {loop}")
    for depth, ms in enumerate(content["ms"]):
        print(f"draft {depth}: {ms:.3f} ms a step, {ms / content['ms'][0]:.3f} of a step without drafts")

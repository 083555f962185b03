"""`ds4jax doctor`: find what is wrong with this installation, and say what to do."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ds4jax.cli import progress

if TYPE_CHECKING:
    from ds4jax.doctor.row import Row

# Seconds that JAX may take to start on a busy machine.
STARTING = 60.0

DESCRIPTION = """\
Look at this installation: versions, device, driver, kernels, the cache of compiled programs, free memory, and a self-check of the
tiny model, whose greedy text has to have equal bits with drafts and without. Prints a line for each, and at the end one line for
each thing that is wrong, with what to do. Exit code 1 if something is wrong, 0 if all is well.

The first self-check compiles the tiny model's programs, which may take minutes on a busy machine; a later one takes seconds.
With --json, stdout is one object: well (the verdict) and rows with name, value, todo (null if nothing is wrong) and figures."""

EXAMPLES = """\
examples:
  ds4jax doctor
  ds4jax doctor --json"""


def add_parser(commands: Any) -> None:
    """Declare the sub-command."""
    parser = commands.add_parser(
        "doctor", help="find what is wrong with this installation", description=DESCRIPTION, epilog=EXAMPLES
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command. Returns 0, or 1 if something is wrong."""
    rows = []
    for row in _rows():
        rows.append(row)
        if not options.json:
            print(f"{row.name:<11} {row.value}", flush=True)
    wrong = [row for row in rows if row.todo]
    if options.json:
        print(json.dumps({"well": not wrong, "rows": [row.fields() for row in rows]}, ensure_ascii=False))
    else:
        print(*(f"{row.name}: {row.todo}" for row in wrong), sep="\n", end="\n" if wrong else "")
        print(f"{len(wrong)} to mend" if wrong else "all is well")
    return 1 if wrong else 0


def _rows() -> Iterator[Row]:
    """All that the doctor looks at, in order."""
    from ds4jax import nvidia
    from ds4jax.device import host_memory
    from ds4jax.doctor import devices, resources, versions
    from ds4jax.doctor.probe import probe
    from ds4jax.doctor.self_check import self_check

    yield from versions.rows()
    with progress.status("starting jax"):
        cards, found = nvidia.cards(), probe(STARTING)
    yield from devices.rows(found, cards)
    yield resources.cache()
    yield resources.host(host_memory())
    yield from resources.device(cards)
    if found.platform is not None:
        with progress.counting_bar("self-check") as bar:
            row = self_check(bar)
        yield row

"""A short lossless check of the tiny model on this machine: the same comparisons as `ds4jax check`, of one prompt."""

from __future__ import annotations

import time
from collections.abc import Callable

from ds4jax.doctor.child import ChildError, objects, say
from ds4jax.doctor.row import Row

PROMPT, NEW_TOKENS = "In the beginning", 48
# Seconds until the model is loaded, until its programs are compiled or found in the cache, and for each of the two comparisons
# that follow the first.
LOADING, COMPILING, COMPARING = 120.0, 1200.0, 10.0
# Loading and the comparisons: draft 0 with itself, the drafter's depth with draft 0, and with itself.
PARTS = 4
PROGRAM = "from ds4jax.doctor.self_check import main; main()"


def self_check(show: Callable[[int, int], None] | None = None) -> Row:
    """A row for the self-check.

    Args:
        show: called with the parts that are done and their number.
    """
    began, rows = time.monotonic(), []
    try:
        for done, found in enumerate(objects(PROGRAM, LOADING, COMPILING, COMPARING), 1):
            rows.append(found)
            if show:
                show(done, PARTS)
    except ChildError as error:
        return Row("self-check", "not complete", f"{error}: ds4jax generate '{PROMPT}' shows what happens")
    seconds = time.monotonic() - began
    different = next((row for row in rows[1:] if row["difference"]), None)
    figures = {"equal": different is None, "seconds": round(seconds, 1)}
    last = rows[-1]
    if different is None:
        text = f"{last['tokens']} tokens of the tiny model with {last['draft']} drafts a step and without: equal bits"
        return Row("self-check", f"{text}, {seconds:.1f} s", None, figures)
    todo = f"with {different['draft']} drafts {different['difference']}: ds4jax check shows which modes differ; use --draft 0"
    return Row("self-check", "not equal", todo, figures)


def main() -> None:
    """In the child: load the tiny model, compare, and print an object for each part."""
    from ds4jax import runtime

    runtime.process_of_a_command = True
    runtime.configure()
    from ds4jax.evaluation import check
    from ds4jax.language_model import load

    model = load()
    say()
    ids = model.encode(PROMPT)
    plan = check.Plan((ids,), NEW_TOKENS, (False,), (model.max_draft,), (), "given")
    for row in check.compare(model, plan):
        say(**check.fields(row))

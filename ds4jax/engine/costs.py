"""The time of a decode step at each depth, for draft 'auto': from the package's table, or measured where it has no entry."""

from __future__ import annotations

import jax

from ds4jax.decode.drafter import Drafter
from ds4jax.decode.drafters.named import name_of
from ds4jax.engine import cost_table
from ds4jax.engine.cost_table import Entry
from ds4jax.engine.generation import Costs, Generation
from ds4jax.engine.loaded import Loaded
from ds4jax.engine.options import Options

TIMED_TOKENS = 12
# Time that a draft adds to a step of an engine, in steps without drafts, for models without an entry. An engine measures nothing:
# its requests would depend on the host's clock.
COST_OF_DRAFT = 0.15


def entry_of(model: Loaded, *, strict: bool, drafter: Drafter | None = None) -> Entry | None:
    """The entry of the package's table for a model on this device; None without one."""
    name = name_of(model.drafter(drafter))
    place = jax.devices()[0].device_kind, model.shape_key, name, model.max_draft, strict
    return cost_table.shipped().get(place)


def step_costs(model: Loaded, capacity: int, *, strict: bool, drafter: Drafter | None = None) -> tuple[float, ...]:
    """Time (ms) of a decode step at each depth 0 to `max_draft`, from the package's table or measured once per program."""
    key = (capacity, strict, drafter)
    if key not in model.costs:
        entry = entry_of(model, strict=strict, drafter=drafter)
        (model.costs[key],) = (entry.ms,) if entry else measured(model, capacity, strict=strict, drafter=drafter)
    return model.costs[key]


def engine_costs(model: Loaded, *, strict: bool, drafter: Drafter | None = None) -> tuple[float, ...]:
    """Time of a step at each depth 0 to `max_draft` for an engine, in any unit: from the package's table or by a fixed rule."""
    entry = entry_of(model, strict=strict, drafter=drafter)
    return entry.ms if entry else tuple(1 + COST_OF_DRAFT * depth for depth in range(1 + model.max_draft))


def source(model: Loaded, *, strict: bool, drafter: Drafter | None = None) -> str:
    """Where `step_costs` takes its times from, in words."""
    entry = entry_of(model, strict=strict, drafter=drafter)
    return f"the package's table for {entry.model} on {entry.device}" if entry else "measured here, not in the package's table"


def costs_of(model: Loaded, options: Options) -> Costs:
    """`step_costs` of the options' program, as a function of the capacity; for `Generation`."""
    return lambda capacity: step_costs(model, capacity, strict=options.strict, drafter=options.drafter)


def measured(
    model: Loaded, capacity: int, *, strict: bool, drafter: Drafter | None = None, runs: int = 1, tokens: int = TIMED_TOKENS
) -> list[tuple[float, ...]]:
    """Measure the time (ms) of a decode step at each depth 0 to `max_draft`, one depth after another, `runs` times."""
    max_new_tokens = min(capacity, model.config.max_context) - 1

    def timed(depth: int) -> float:
        options = Options(max_new_tokens=max_new_tokens, ignore_eos=True, strict=strict, draft=depth, drafter=drafter)
        generation = Generation(model, [0], options, costs=costs_of(model, options))
        generation.advance(tokens)
        return generation.result().ms_per_step

    # The first run compiles.
    timed(0)
    return [tuple(timed(depth) for depth in range(1 + model.max_draft)) for _ in range(runs)]

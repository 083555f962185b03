"""What a generation begins with on the device: an empty state, and the filters of its sampling. Each is one small program.

The operations one by one would be dozens of programs, and every process would trace them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ds4jax.config import Config
from ds4jax.decode import loop, sampling
from ds4jax.decode.drafter import Drafter
from ds4jax.decode.groups import AnyMesh
from ds4jax.decode.loop import DecodeState
from ds4jax.decode.sampling import Filters, Numbers, Sampling
from ds4jax.engine.compile import Lower, begin, wait


def state(
    config: Config,
    capacity: int,
    last_S: Sequence[int],
    *,
    drafter: Drafter | None,
    max_draft: int,
    mesh: AnyMesh = None,
) -> DecodeState:
    """As `ds4jax.decode.loop.start`; slots on the groups of `mesh`, by default on one device."""
    lower = functools.partial(loop.lower_start, config, capacity, len(last_S), drafter=drafter, max_draft=max_draft, mesh=mesh)
    key = ("state", config, capacity, len(last_S), drafter, max_draft, *([mesh] if mesh else []))
    made: DecodeState = _run(key, lower, np.array(last_S, np.int32))
    return made


def filters(samplings: Sequence[Sampling]) -> Filters:
    """As `Filters.of`."""
    numbers = Numbers.of(samplings)
    made: Filters = _run(("filters", len(samplings)), functools.partial(_lower_filters, numbers), numbers)
    return made


def _lower_filters(numbers: Numbers) -> jax.stages.Lowered:
    return sampling.with_keys.lower(numbers)


def _run(key: tuple[Any, ...], lower: Lower, argument: Any) -> Any:
    (program,) = wait([begin(key, lower)])
    return program(argument)

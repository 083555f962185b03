"""Bytes of a decode step: what it cannot do without, and what our kernels count for themselves."""

from __future__ import annotations

import re

from ds4jax.config import Config
from ds4jax.loading.plan import Plan
from pallas_kernels.bundle import TRAFFIC

# What a compiler puts behind a name that it meets a second time.
_NUMBER = re.compile(r"_+\d+$")


def distinct_experts(config: Config, rows: int) -> float:
    """Experts that so many rows choose together on average, when they choose evenly and independently."""
    return config.n_experts * (1 - (1 - config.n_active / config.n_experts) ** rows)


def step_bytes(plan: Plan, config: Config, depth: int) -> int:
    """Bytes that a step with so many drafts has to read: everything dense once, each chosen expert once, and the drafter's part.

    A step that could draft but does not is counted as a plain one, without the MTP block's own row, which it could leave for
    later. With drafts the block runs once for what was committed and once for each draft after the first; each draft reads the
    head.
    """
    experts = plan.parts["routed experts"].token
    chosen = round(experts * distinct_experts(config, 1 + depth) / config.n_active)
    return plan.token - experts + chosen + depth * plan.draft


def base_name(kernel: str) -> str:
    """The name that a kernel of ours was launched under; any other's as it is."""
    bare = _NUMBER.sub("", kernel)
    return bare if bare in TRAFFIC else kernel


def kernel_bytes(name: str) -> int | None:
    """Bytes of weights that one launch of a kernel reads by its own count, 0 where it reads none; None where nobody counts."""
    return TRAFFIC.get(base_name(name))

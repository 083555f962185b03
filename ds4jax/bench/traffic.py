"""Bytes of a decode step: the minimum it must read, and the kernels' own counts."""

from __future__ import annotations

import re

from ds4jax.config import Config
from ds4jax.loading.plan import Plan
from pallas_kernels.core.launch import TRAFFIC

# The suffix that the compiler adds to a repeated name.
_NUMBER = re.compile(r"_+\d+$")


def distinct_experts(config: Config, rows: int) -> float:
    """Mean number of distinct experts that `rows` rows choose, if each chooses uniformly and independently."""
    return config.n_experts * (1 - (1 - config.n_active / config.n_experts) ** rows)


def step_bytes(plan: Plan, config: Config, depth: int, sequences: int = 1) -> int:
    """Minimum bytes of weights that a step with `depth` drafts of each sequence reads: dense weights once, each chosen expert
    once, the drafter's weights.

    A step with depth 0 is counted without the MTP block. With drafts, the block runs once for the committed tokens and once for
    each draft after the first. Each draft reads the head.
    """
    experts = plan.parts["routed experts"].token
    chosen = round(experts * distinct_experts(config, sequences * (1 + depth)) / config.n_active)
    return plan.token - experts + chosen + depth * plan.draft


def base_name(kernel: str) -> str:
    """Launch name of one of our kernels, without the compiler's suffix; any other name unchanged."""
    bare = _NUMBER.sub("", kernel)
    return bare if bare in TRAFFIC else kernel


def kernel_bytes(name: str) -> int | None:
    """Bytes of weights that one launch of a kernel reads, by its own count; None for a kernel that is not ours."""
    return TRAFFIC.get(base_name(name))

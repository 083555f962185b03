"""Bytes of a decode step: what it cannot do without, and what our kernels count for themselves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp

from ds4jax.bench.synthetic import ON_DEVICE, stored_type
from ds4jax.config import Config
from ds4jax.decode import step_rows
from ds4jax.loading.gguf_names import EXPERTS, slots
from ds4jax.loading.plan import Plan
from pallas_kernels.expert_matmul import DOWN, GATE_UP
from pallas_kernels.float_matmul import NAME as FLOAT
from pallas_kernels.formats import FORMATS
from pallas_kernels.hyper_connections import MIX
from pallas_kernels.q8_matmul import MOST_ROWS, NAME
from pallas_kernels.shapes import Product


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of the decode loop, as kernels see it.

    Attributes:
        config: the model.
        max_draft: drafts that the program can make; its steps have 1 + max_draft rows (8 for four drafts).
        depth: drafts of this step; rows beyond 1 + depth are clones.
    """

    config: Config
    max_draft: int
    depth: int

    @property
    def rows(self) -> int:
        """Rows of the main model."""
        return step_rows(self.max_draft)

    @property
    def mtp_rows(self) -> tuple[int, ...]:
        """Rows of each call of the MTP block: the committed rows, and one for each draft after the first."""
        return (self.rows, *[1] * (self.depth - 1)) if self.max_draft else ()

    @property
    def head_rows(self) -> tuple[int, ...]:
        """Rows of each product with the vocabulary's head: the main model's, and one for each draft."""
        return (self.rows, *[1] * self.depth)


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


def share_warp_products(config: Config) -> tuple[Product, ...]:
    """Launches of the Q8_0 kernel in one block, attention first."""
    heads = config.n_heads * config.head_dim
    return (
        Product("q_a + kv", (config.q_lora_rank, config.head_dim), config.dim),
        Product("q_b", (heads,), config.q_lora_rank),
        Product("o_a", (config.o_lora_rank,), heads // config.o_groups, groups=config.o_groups),
        Product("o_b", (config.dim,), config.o_groups * config.o_lora_rank),
        Product("gate + up", (config.moe_dim, config.moe_dim), config.dim),
        Product("down", (config.dim,), config.moe_dim),
    )


def _launched(product: Product, rows: int) -> int:
    """Bytes of a product with so many rows, in launches of at most eight."""
    parts = [MOST_ROWS] * (rows // MOST_ROWS) + [rows % MOST_ROWS] * (rows % MOST_ROWS > 0)
    return sum(product.traffic(part) for part in parts)


def share_warp_bytes(step: Step) -> int:
    """Bytes that all launches of the Q8_0 kernel in a step move."""
    config, block = step.config, share_warp_products(step.config)
    head, square = Product("head", (config.vocab_size,), config.dim), Product("e_proj, h_proj", (config.dim,), config.dim)
    total = config.n_layers * sum(_launched(product, step.rows) for product in block)
    for rows in step.mtp_rows:
        total += sum(_launched(product, rows) for product in block)
        total += _launched(square, rows) + _launched(square, rows * config.hc_mult)
    return total + sum(_launched(head, rows) for rows in step.head_rows)


def _row_bytes(stored: str, k: int) -> int:
    """Bytes on the device of one row of K weights."""
    if stored in FORMATS:
        return k // FORMATS[stored].BLOCK * FORMATS[stored].DEVICE_BYTES
    return k * jnp.dtype(ON_DEVICE[stored]).itemsize


def _weight_bytes(step: Step, *parts: str) -> int:
    """Bytes of the weights that a step reads of all parameters whose names hold one of the parts.

    An expert is read once however many rows chose it; of rows beyond the live ones, which are clones, nothing is read again.
    """
    config, total = step.config, 0.0
    for slot in slots(config):
        if any(part in slot.name for part in parts):
            count = math.prod(slot.shape[:-1]) * _row_bytes(stored_type(slot), slot.shape[-1])
            mtp = slot.name.startswith("mtp.")
            share = 1.0
            if slot.types is EXPERTS:
                # The committed rows of a random model are one.
                share = distinct_experts(config, 1 if mtp else 1 + step.depth) / config.n_experts
            total += count * share * (len(step.mtp_rows) if mtp else 1)
    return round(total)


def _gate_up_bytes(step: Step) -> int:
    return _weight_bytes(step, ".experts.w1", ".experts.w3")


def _down_bytes(step: Step) -> int:
    return _weight_bytes(step, ".experts.w2")


def _float_bytes(step: Step) -> int:
    return _weight_bytes(step, "ffn.gate.weight", *COMPRESSED)


def _mix_bytes(step: Step) -> int:
    return _weight_bytes(step, "hc_attn_fn", "hc_ffn_fn", "hc_head_fn")


# Products of the compressors and the indexer, by a part of their parameters' names.
COMPRESSED = ("compressor.wkv", "compressor.wgate", "indexer.wq_b", "indexer.weights_proj")
# Bytes that a step moves in the kernels whose names hold the key; of all but the first the weights alone. A kernel that is added
# here gets a figure in the table and counts as one that reads weights.
KERNEL_BYTES: dict[str, Callable[[Step], int]] = {
    NAME: share_warp_bytes,
    GATE_UP: _gate_up_bytes,
    DOWN: _down_bytes,
    FLOAT: _float_bytes,
    MIX: _mix_bytes,
}


def kernel_bytes(name: str, step: Step) -> int | None:
    """What the kernels of a name move in a step by their own count, None where nobody counts."""
    return next((count(step) for key, count in KERNEL_BYTES.items() if key in name), None)

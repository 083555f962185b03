"""The least time of a prompt: bytes of weights at the speed of a copy, or operations at a matrix rate, whichever is longer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ds4jax.bench.traffic import distinct_experts
from ds4jax.cache.state import OVERLAP_RATIO
from ds4jax.config import Config
from ds4jax.loading.checkpoint import Tensor

# Operations/s of bfloat16 products with float32 sums that a library reaches on an H100 or H200.
MATRIX_FLOPS = 650e12
# Of the last layer a prompt needs only what makes its rows of the cache.
_ROWS = ("attn.wkv", "attn.compressor", "attn.indexer.compressor")


def work(config: Config, tensors: Sequence[Tensor], rows: int) -> tuple[int, int]:
    """Bytes of weights that a prompt of `rows` rows reads at least, in one call, and the operations of its products.

    Each row chooses its experts at random. A product's addition and multiplication are two operations.
    """
    bytes_read, operations = 0.0, float(_attention(config, rows))
    share = distinct_experts(config, rows) / config.n_experts
    for tensor in tensors:
        if not tensor.name.startswith("layers.") or not _needed(config, tensor.name):
            continue
        stacked = len(tensor.shape) == 3
        bytes_read += tensor.device_nbytes * (share if stacked else 1.0)
        if len(tensor.shape) > 1 and tensor.form != "I32":
            active = config.n_active / config.n_experts if stacked else 1.0
            operations += 2 * rows * active * math.prod(tensor.shape)
    return round(bytes_read), round(operations)


def _needed(config: Config, name: str) -> bool:
    layer, part = name.removeprefix("layers.").split(".", 1)
    return int(layer) < config.n_layers - 1 or part.startswith(_ROWS)


def _attention(config: Config, rows: int) -> int:
    """Operations of attention and index scores of all layers but the last."""
    total = 0.0
    for ratio in config.layer_ratios[: config.n_layers - 1]:
        visible = rows / (2 * ratio) if ratio else 0.0
        if ratio == OVERLAP_RATIO:
            total += 2 * rows * visible * config.index_heads * config.index_dim
            visible = min(visible, config.index_topk)
        total += 4 * rows * (min(rows / 2, config.window) + visible) * config.n_heads * config.head_dim
    return round(total)


def milliseconds(bytes_read: int, operations: int, copy_gbps: float) -> float:
    """The longer of the two times."""
    return 1e3 * max(bytes_read / (copy_gbps * 1e9), operations / MATRIX_FLOPS)

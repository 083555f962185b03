"""Models in the layout of the published q2 file of which nothing can be read, and the sizes that tests write."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest import mock

from ds4jax.bench.q2_file import WIDE, info
from ds4jax.config import Config
from ds4jax.loading.checkpoint import Checkpoint, Tensor
from ds4jax.loading.gguf_names import slots
from ds4jax.loading.gguf_values import device_nbytes

# 4.2 GB, with tensors of up to 0.18 GB.
WIDER = dataclasses.replace(
    WIDE, dim=4096, moe_dim=2048, n_experts=128, n_layers=9, compress_ratios=(0, 0, 4, 128) + (4, 128) * 3
)


def q2_checkpoint(config: Config) -> Checkpoint:
    """An opened model of which nothing can be read."""
    unreadable = mock.Mock(side_effect=AssertionError("a tensor was read"))
    tensors = []
    for slot in slots(config):
        one = info(slot)
        tensors.append(Tensor(slot.name, slot.shape, one.type, one.type, one.nbytes, device_nbytes(one), unreadable))
    return Checkpoint(Path("q2.gguf"), "gguf", config, tuple(tensors), None, {})

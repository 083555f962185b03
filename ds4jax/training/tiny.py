"""The shape of the tiny model and the table of its hash-routed layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds4jax.config import Config

if TYPE_CHECKING:
    import numpy as np


def tiny_config(vocab_size: int) -> Config:
    """Configuration of the shipped model: every part of V4-Flash, small.

    Inner dimensions of quantised matrices are multiples of 32. In a window of 512 tokens the indexer chooses 32 of up to 128
    rows. YaRN stretches a context of 1024 by four.
    """
    return Config(
        vocab_size=vocab_size,
        dim=256,
        n_layers=6,
        n_heads=8,
        head_dim=64,
        rope_dim=32,
        q_lora_rank=128,
        o_groups=4,
        o_lora_rank=64,
        window=128,
        n_experts=8,
        n_active=2,
        moe_dim=96,
        n_hash_layers=1,
        compress_ratios=(0, 4, 128, 4, 128, 4, 0),
        original_context=1024,
        rope_factor=4.0,
        index_heads=4,
        index_dim=32,
        index_topk=32,
        max_context=4096,
        qat=False,
    )


def hash_table(config: Config, seed: int) -> np.ndarray:
    """A random table int32 [V, K] of experts for each token: distinct in a row, and balanced in each column."""
    import numpy as np

    rng = np.random.default_rng(seed)
    first_V = rng.permutation(np.arange(config.vocab_size) % config.n_experts)
    table = np.empty((config.vocab_size, config.n_active), np.int32)
    table[:, 0] = first_V
    offsets = np.arange(1, config.n_experts)
    for expert in range(config.n_experts):
        tokens = np.flatnonzero(first_V == expert)
        # Offsets cycle, so the tokens of one first expert spread evenly over the other experts.
        index = (np.arange(len(tokens))[:, None] + np.arange(config.n_active - 1)) % max(len(offsets), 1)
        table[tokens, 1:] = (expert + offsets[index]) % config.n_experts
    return table

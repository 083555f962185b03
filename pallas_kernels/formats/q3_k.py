"""Q3_K: blocks of 256 weights of three bits in groups of 16, each with a scale of six bits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.formats.base import Terms
from pallas_kernels.formats.stored import Stored, planes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Q3_K(Stored):
    """A weight [..., N, K] in three bits: w = scale · factor · quant, quant from −4 to 3, factor from −32 to 31 for every 16.

    Source: GGUF block layout Q3_K (ggml-common.h, `block_q3_K`).
    """

    BLOCK = 256
    BLOCK_BYTES = 110
    DEVICE_BYTES = 110
    FLOAT16 = (108,)

    def terms(self) -> Terms:
        """Integers and scales, in the order of K."""
        lead = self.blocks.shape[:-1]
        # Byte i of the first 32 has the high bits of weights i, 32 + i, ..., 224 + i.
        high = planes(self.blocks[..., :32], 1, 8).reshape(*lead, 16, 16)
        low = planes(self.blocks[..., 32:96].reshape(*lead, 2, 32), 2, 4).reshape(*lead, 16, 16)
        values = (low | (high << 2)).astype(jnp.int8) - 4
        # Of each factor, four bits are in the first eight bytes and two in the last four.
        small = planes(self.blocks[..., 96:104], 4, 2).reshape(*lead, 16)
        large = planes(self.blocks[..., 104:108], 2, 4).reshape(*lead, 16)
        factors = (small | (large << 4)).astype(jnp.int32) - 32
        return Terms(values, self.number(108), factors)

"""IQ3_S: groups of four weights from a codebook of 512 patterns, with signs and a four-bit scale for every 32 weights."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.formats.base import Terms
from pallas_kernels.formats.codebook import codebook
from pallas_kernels.formats.stored import Stored, fields, signed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IQ3_S(Stored):
    """A weight [..., N, K] in three bits: w = scale · (2 · factor + 1) · sign · magnitude, factor for every 32.

    Nine bits choose the pattern of four weights: a byte, and a bit that is stored elsewhere. `terms` takes the patterns from
    `codebook`.

    Source: GGUF block layout IQ3_S (ggml-common.h, `block_iq3_s`).
    """

    BLOCK = 256
    BLOCK_BYTES = 110
    DEVICE_BYTES = 110
    FLOAT16 = (0,)

    def terms(self) -> Terms:
        """Integers and scales, in the order of K."""
        lead = self.blocks.shape[:-1]
        high = fields(self.blocks[..., 66:74], 1, 8).astype(jnp.int32).reshape(*lead, 64)
        codes = self.blocks[..., 2:66].astype(jnp.int32) | (high << 8)
        magnitudes = jnp.asarray(codebook("IQ3_S"))[codes].reshape(*lead, 32, 8)
        values = signed(magnitudes, self.blocks[..., 74:106]).reshape(*lead, 8, 32)
        factors = fields(self.blocks[..., 106:], 4, 2).astype(jnp.int32).reshape(*lead, 8)
        return Terms(values, self.number(0), 2 * factors + 1)

"""IQ2_XS: groups of eight weights from a codebook of 512 patterns, with signs and a four-bit scale for every 16 weights."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.formats.base import Terms
from pallas_kernels.formats.codebook import codebook
from pallas_kernels.formats.stored import Stored, fields, pairs, signed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IQ2_XS(Stored):
    """A weight [..., N, K] in two bits: w = scale · (2 · factor + 1) / 8 · sign · magnitude, factor for every 16.

    Nine bits choose the pattern of eight weights, seven have their signs; the eighth sign follows from parity. `terms` takes the
    patterns from `codebook`.

    Source: GGUF block layout IQ2_XS (ggml-common.h, `block_iq2_xs`).
    """

    BLOCK = 256
    BLOCK_BYTES = 74
    DEVICE_BYTES = 74
    FLOAT16 = (0,)

    def terms(self) -> Terms:
        """Integers and scales, in the order of K."""
        lead = self.blocks.shape[:-1]
        codes = pairs(self.blocks[..., 2:66])
        seven = codes >> 9
        signs = seven | ((jax.lax.population_count(seven) & 1) << 7)
        values = signed(jnp.asarray(codebook("IQ2_XS"))[codes & 511], signs).reshape(*lead, 16, 16)
        factors = fields(self.blocks[..., 66:], 4, 2).astype(jnp.int32).reshape(*lead, 16)
        return Terms(values, self.number(0) * 0.125, 2 * factors + 1)

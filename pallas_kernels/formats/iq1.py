"""IQ1_S and IQ1_M: groups of eight weights of −1, 0 and 1 from a codebook of 2048 patterns, shifted by an eighth up or down."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.base import Terms
from pallas_kernels.formats.codebook import codebook
from pallas_kernels.formats.stored import Stored, fields, pairs


def _values(codes: jax.Array, down: jax.Array) -> jax.Array:
    """Eight times the shifted weights of patterns int32 [..., n], int8 [..., n, 8]; `down` is 1 where the shift is negative."""
    shift = (1 - 2 * down).astype(jnp.int8)
    return 8 * jnp.asarray(codebook("IQ1_S"))[codes] + shift[..., None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IQ1_S(Stored):
    """A weight [..., N, K] in 1.6 bits: w = scale · (2 · factor + 1) / 8 · value, factor for every 32.

    A value is 8 · digit ± 1, the sign for every 32. `terms` takes the patterns of digits from `codebook`.

    Source: GGUF block layout IQ1_S (ggml-common.h, `block_iq1_s`).
    """

    BLOCK = 256
    BLOCK_BYTES = 50
    DEVICE_BYTES = 50
    FLOAT16 = (0,)

    def terms(self) -> Terms:
        """Integers and scales, in the order of K."""
        lead = self.blocks.shape[:-1]
        # A word for every 32 weights: the high bits of four patterns, the factor, and the sign of the shift.
        words = pairs(self.blocks[..., 34:])
        low = self.blocks[..., 2:34].astype(jnp.int32).reshape(*lead, 8, 4)
        values = _values(low | (fields(words, 3, 4) << 8), words[..., None] >> 15)
        return Terms(values.reshape(*lead, 8, 32), self.number(0) * 0.125, 2 * ((words >> 12) & 7) + 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IQ1_M(Stored):
    """A weight [..., N, K] in 1.75 bits: w = scale · (2 · factor + 1) / 8 · value, factor for every 16.

    A value is 8 · digit ± 1, the sign for every eight. The float16 scale is cut into the high halves of the high bytes of the
    four words of factors. `terms` takes the patterns of digits from `codebook`.

    Source: GGUF block layout IQ1_M (ggml-common.h, `block_iq1_m`).
    """

    BLOCK = 256
    BLOCK_BYTES = 56
    DEVICE_BYTES = 56
    FLOAT16 = ()

    @classmethod
    def broken(cls, blocks: np.ndarray) -> np.ndarray:
        """Which blocks of a file have a scale that is not finite: bool [n]."""
        # The third and the fourth part hold the exponent, all ones for infinities and NaN.
        return (blocks[:, 55] & 0x70 == 0x70) & (blocks[:, 53] & 0xC0 == 0xC0)

    def terms(self) -> Terms:
        """Integers and scales, in the order of K."""
        lead = self.blocks.shape[:-1]
        # Four bits for every eight weights: the high bits of the pattern, and the sign of the shift.
        high = fields(self.blocks[..., 32:48], 4, 2).astype(jnp.int32).reshape(*lead, 32)
        values = _values(self.blocks[..., :32].astype(jnp.int32) | ((high & 7) << 8), high >> 3)
        words = pairs(self.blocks[..., 48:])
        factors = fields(words, 3, 4).reshape(*lead, 16)
        bits = jnp.sum((words >> 12) << jnp.arange(0, 16, 4, dtype=jnp.int32), axis=-1, dtype=jnp.int32)
        scale = jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.float16).astype(jnp.float32)
        return Terms(values.reshape(*lead, 16, 16), scale * 0.125, 2 * factors + 1)

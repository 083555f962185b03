"""IQ3_XXS: groups of four weights from a codebook of 256 patterns, with signs and a four-bit scale for every 32 weights."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats import signs
from pallas_kernels.formats.base import Quantized, Terms, as_bytes, halves, words
from pallas_kernels.formats.codebook import codebook
from pallas_kernels.formats.stored import fields, signed

# Bit positions in a sign word of the signs of each group of eight weights.
_PLACES = 7 + 8 * (np.arange(32) % 4) - np.arange(32) // 4
SIGN_PLACES = _PLACES.reshape(4, 8)


@functools.cache
def patterns() -> np.ndarray:
    """The patterns as int32 [256]: four int8 magnitudes, the first weight in the lowest byte."""
    return codebook("IQ3_XXS").view("<i4")[:, 0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IQ3_XXS(Quantized):
    """A weight [..., N, K] in three bits: w = scale · (2 · factor + 1) / 4 · sign · magnitude, factor for every 32.

    Device layout: a lane owns 64 weights, 16 bytes of pattern indices, contiguous over the lanes. Byte i of word j is the pattern
    of weights 16j + 4i .. + 3. The sign words of its two halves of 32 weights are each contiguous over the lanes; pattern n of a
    half, shifted left by n, has the sign of each weight in the highest bit of the weight's byte. The lane's factors are one byte,
    the lower 32 weights in the low half. The file has seven of eight signs, the last follows from parity. Here all are stored:
    102 bytes instead of 98.

    Attributes:
        indices: int32 [..., N, K/64, 4].
        signs: int32 [..., 2, N, K/64].
        factors: uint8 [..., N, K/64].
        scales: float16 [..., N, K/256].

    Source: GGUF block layout IQ3_XXS (ggml-common.h, `block_iq3_xxs`).
    """

    BLOCK = 256
    BLOCK_BYTES = 98
    DEVICE_BYTES = 102
    FLOAT16 = (0,)

    indices: jax.Array
    signs: jax.Array
    factors: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [..., N, K] of the weight."""
        *lead, n, blocks = self.scales.shape
        return (*lead, n, blocks * self.BLOCK)

    @classmethod
    def split(cls, blocks: jax.Array) -> IQ3_XXS:
        """Convert blocks of a file to planes."""
        lead = blocks.shape[:-2]
        indices = words(blocks[..., 2:66]).reshape(*lead, -1, 4)
        packed = jax.lax.bitcast_convert_type(words(blocks[..., 66:]), jnp.uint32).reshape(*lead, -1, 2)
        placed = signs.spread(signs.with_parity(packed), SIGN_PLACES)
        factors = (packed[..., 0] >> 28) | ((packed[..., 1] >> 28) << 4)
        return cls(indices, jnp.moveaxis(placed, -1, -3), factors.astype(jnp.uint8), halves(blocks[..., :2])[..., 0])

    def join(self) -> jax.Array:
        """The inverse of `split`."""
        lead = self.scales.shape
        packed = signs.without_parity(self._signs()) | (self._factors().astype(jnp.uint32) << 28)
        indices = as_bytes(self.indices.reshape(*lead, 16))
        return jnp.concatenate([as_bytes(self.scales[..., None]), indices, as_bytes(packed)], axis=-1)

    def _signs(self) -> list[jax.Array]:
        """Signs of the four groups of every 32 weights in the order of K, uint32 [..., N, B, 8] each."""
        placed = jnp.moveaxis(self.signs, -3, -1).reshape(*self.scales.shape, 8)
        return signs.gather(placed, SIGN_PLACES)

    def _factors(self) -> jax.Array:
        """Factors in the order of K, uint8 [..., N, B, 8]."""
        return fields(self.factors, 4, 2).reshape(*self.scales.shape, 8)

    def terms(self) -> Terms:
        """Integers and scales, in the order of K."""
        lead = self.scales.shape
        magnitudes = jnp.asarray(codebook("IQ3_XXS"))[as_bytes(self.indices).astype(jnp.int32)].reshape(*lead, 8, 4, 8)
        values = signed(magnitudes, jnp.stack(self._signs(), axis=-1)).reshape(*lead, 8, 32)
        factors = self._factors().astype(jnp.int32)
        return Terms(values, self.scales.astype(jnp.float32) * 0.25, 2 * factors + 1)

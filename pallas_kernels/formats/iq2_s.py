"""IQ2_S: groups of eight weights from a codebook of 1,024 patterns, with signs and a four-bit scale for every 16 weights."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats import iq2_xxs, signs
from pallas_kernels.formats.base import Quantized, Terms, as_bytes, halves, words
from pallas_kernels.formats.codebook import codebook
from pallas_kernels.formats.iq2_xxs import SIGN_PLACES
from pallas_kernels.formats.stored import fields, signed

# Bits of a pattern's number; three numbers fit into an index word.
CODE = 10


@functools.cache
def selectors() -> np.ndarray:
    """The patterns as int32 [1024], in the form of `iq2_xxs.selectors`: both formats have the same three magnitudes."""
    return iq2_xxs.selectors(codebook("IQ2_S"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IQ2_S(Quantized):
    """A weight [..., N, K] in two bits: w = scale · (2 · factor + 1) / 8 · sign · magnitude, factor for every 16.

    Device layout: a lane owns 128 weights, contiguous over the lanes. Word j of a lane serves weights 32j .. 32j+31, four groups
    of eight. Its index word holds the ten-bit pattern numbers of the first three groups, from the lowest bit, and above them the
    two lowest bits of the fourth, whose other eight are byte j of the lane's `rest`. (signs >> i) & 0x11111111 holds the signs of
    group i, four bits apart as in `selectors`. Byte j of the lane's factors has the factor of the first two groups in its low
    half and that of the others in the high half. Same bytes as the file.

    Attributes:
        indices, signs: int32 [..., N, K/128, 4].
        rest, factors: int32 [..., N, K/128].
        scales: float16 [..., N, K/256].

    Source: GGUF block layout IQ2_S (ggml-common.h, `block_iq2_s`).
    """

    BLOCK = 256
    BLOCK_BYTES = 82
    DEVICE_BYTES = 82
    FLOAT16 = (0,)

    indices: jax.Array
    rest: jax.Array
    signs: jax.Array
    factors: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [..., N, K] of the weight."""
        *lead, n, blocks = self.scales.shape
        return (*lead, n, blocks * self.BLOCK)

    @classmethod
    def split(cls, blocks: jax.Array) -> IQ2_S:
        """Convert blocks of a file to planes."""
        lead = blocks.shape[:-2]
        low, sign = (blocks[..., first : first + 32].reshape(*lead, -1, 4, 4).astype(jnp.uint32) for first in (2, 34))
        high = blocks[..., 66:74].reshape(*lead, -1, 4).astype(jnp.uint32)
        codes = [low[..., i] | (((high >> (2 * i)) & 3) << 8) for i in range(4)]
        packed = codes[0] | (codes[1] << CODE) | (codes[2] << 2 * CODE) | (codes[3] << 3 * CODE)
        rest = words((codes[3] >> 2).astype(jnp.uint8))[..., 0]
        placed = signs.spread([sign[..., i] for i in range(4)], SIGN_PLACES)
        factors = words(blocks[..., 74:]).reshape(*lead, -1)
        return cls(jax.lax.bitcast_convert_type(packed, jnp.int32), rest, placed, factors, halves(blocks[..., :2])[..., 0])

    def join(self) -> jax.Array:
        """The inverse of `split`."""
        codes, lead = self._codes(), self.scales.shape
        low = (codes & 255).astype(jnp.uint8).reshape(*lead, 32)
        shifts = jnp.arange(0, 8, 2, dtype=jnp.int32)
        high = jnp.sum((codes >> 8) << shifts, axis=-1, dtype=jnp.int32).astype(jnp.uint8).reshape(*lead, 8)
        return jnp.concatenate([as_bytes(self.scales[..., None]), low, self._signs(), high, self._factors()], axis=-1)

    def _codes(self) -> jax.Array:
        """Pattern numbers in the order of K, int32 [..., N, K/128, 4, 4]."""
        packed = jax.lax.bitcast_convert_type(self.indices, jnp.uint32)
        first = [(packed >> (CODE * i)) & ((1 << CODE) - 1) for i in range(3)]
        last = (packed >> (3 * CODE)) | (as_bytes(self.rest[..., None]).astype(jnp.uint32) << 2)
        return jnp.stack([*first, last], axis=-1).astype(jnp.int32)

    def _signs(self) -> jax.Array:
        """The signs of each group as the file has them, uint8 [..., N, B, 32]."""
        groups = signs.gather(self.signs, SIGN_PLACES)
        return jnp.stack(groups, axis=-1).astype(jnp.uint8).reshape(*self.scales.shape, 32)

    def _factors(self) -> jax.Array:
        """Factors as the file has them, two in a byte, uint8 [..., N, B, 8]."""
        return as_bytes(self.factors[..., None]).reshape(*self.scales.shape, 8)

    def terms(self) -> Terms:
        """Integers and scales, in the order of K."""
        lead = self.scales.shape
        magnitudes = jnp.asarray(codebook("IQ2_S"))[self._codes().reshape(*lead, 32)]
        values = signed(magnitudes, self._signs()).reshape(*lead, 16, 16)
        factors = fields(self._factors(), 4, 2).astype(jnp.int32).reshape(*lead, 16)
        return Terms(values, self.scales.astype(jnp.float32) * 0.125, 2 * factors + 1)

"""Q5_K: like Q4_K, with a fifth bit a weight."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.formats.base import Quantized, Terms, as_bytes, halves, words
from pallas_kernels.formats.k_quants import K_BLOCK, factors_and_offsets, gather_groups, spread_groups

# One bit a byte.
_BITS = 0x01010101


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Q5_K(Quantized):
    """A weight [..., N, K] in five bits: w = scale · factor · quant − minimum · offset, factor and offset for every 32.

    Device layout: that of Q4_K for the low four bits and the groups. The fifth bits of a lane are two words, each contiguous over
    the lanes. Plane 2n + h has weights 64i + 32n + 16h + 4w .. + 3 of lane i in word w; the fifth bits of words 2u and 2u + 1 are
    in word u, for weight b of the four at bit 8b + 4(w % 2) + 2n + h. 180 bytes instead of 176 in the file.

    Attributes:
        quants: int32 [..., 2, N, K/64, 4].
        fifths: int32 [..., 2, N, K/64].
        groups: int32 [..., N, K/64].
        scales, minima: float16 [..., N, K/256].

    Source: GGUF block layout Q5_K (ggml-common.h, `block_q5_K`).
    """

    BLOCK = K_BLOCK
    BLOCK_BYTES = 176
    DEVICE_BYTES = 180
    FLOAT16 = (0, 2)

    quants: jax.Array
    fifths: jax.Array
    groups: jax.Array
    scales: jax.Array
    minima: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [..., N, K] of the weight."""
        *lead, n, blocks = self.scales.shape
        return (*lead, n, blocks * K_BLOCK)

    @classmethod
    def split(cls, blocks: jax.Array) -> Q5_K:
        """Convert blocks of a file to planes."""
        lead = blocks.shape[:-2]
        numbers = halves(blocks[..., :4])
        groups = spread_groups(blocks[..., 4:16]).reshape(*lead, -1)
        # In the file, bit g of byte j belongs to weight 32g + j of the block.
        high = words(blocks[..., 16:48]).reshape(*blocks.shape[:-1], 1, 2, 2, 2)
        lane = 2 * jnp.arange(4, dtype=jnp.int32)[:, None]
        fifths = jnp.zeros((*blocks.shape[:-1], 4, 2), jnp.int32)
        for n, h, odd in _places():
            fifths |= ((high[..., h, :, odd] >> (lane + n)) & _BITS) << (4 * odd + 2 * n + h)
        fifths = jnp.moveaxis(fifths.reshape(*lead, -1, 2), -1, -3)
        quants = jnp.moveaxis(words(blocks[..., 48:]).reshape(*lead, -1, 2, 4), -2, -4)
        return cls(quants, fifths, groups, numbers[..., 0], numbers[..., 1])

    def join(self) -> jax.Array:
        """The inverse of `split`."""
        lead = self.scales.shape
        fifths = jnp.moveaxis(self.fifths, -3, -1).reshape(*lead, 4, 2)
        lane = 2 * jnp.arange(4, dtype=jnp.int32)[:, None]
        high = jnp.zeros((*lead, 2, 2, 2), jnp.int32)
        for n, h, odd in _places():
            bits = ((fifths >> (4 * odd + 2 * n + h)) & _BITS) << (lane + n)
            high = high.at[..., h, :, odd].add(jnp.sum(bits, axis=-2, dtype=jnp.int32))
        numbers = as_bytes(jnp.stack([self.scales, self.minima], axis=-1))
        groups = gather_groups(self._groups())
        return jnp.concatenate([numbers, groups, as_bytes(high.reshape(*lead, 8)), self._packed().reshape(*lead, 128)], axis=-1)

    def _groups(self) -> tuple[jax.Array, jax.Array]:
        """Factors and offsets in the order of K, uint8 [..., B, 8] each."""
        return factors_and_offsets(self.groups.reshape(*self.scales.shape, 4))

    def _packed(self) -> jax.Array:
        """Bytes of low bits by lane, uint8 [..., B, 4, 32]."""
        return as_bytes(jnp.moveaxis(self.quants, -4, -2)).reshape(*self.scales.shape, 4, 32)

    def terms(self) -> Terms:
        """Integers and scales, in the order of K."""
        lead = self.scales.shape
        packed = self._packed()
        low = jnp.stack([packed & 15, packed >> 4], axis=-2).reshape(*lead, 4, 2, 2, 2, 2, 4)
        fifths = jnp.moveaxis(self.fifths, -3, -1).reshape(*lead, 4, 1, 1, 2, 1)
        n, h, odd = (jnp.arange(2, dtype=jnp.int32).reshape(2, *(1,) * after) for after in (3, 2, 0))
        bits = as_bytes(((fifths >> (4 * odd + 2 * n + h)) & _BITS)[..., None])
        values = (low | (bits << 4)).astype(jnp.int8).reshape(*lead, 8, 32)
        factors, offsets = self._groups()
        scale, minimum = self.scales.astype(jnp.float32), self.minima.astype(jnp.float32)
        return Terms(values, scale, factors.astype(jnp.int32), minimum, offsets.astype(jnp.int32))


def _places() -> list[tuple[int, int, int]]:
    """n, h and w % 2 of the four-weight words that share a word of fifth bits."""
    return [(n, h, odd) for n in range(2) for h in range(2) for odd in range(2)]

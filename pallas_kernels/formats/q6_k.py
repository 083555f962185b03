"""Q6_K: six bits a weight and an eight-bit scale for every 16 weights."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.formats.base import Quantized, Terms, as_bytes, halves, words
from pallas_kernels.formats.k_quants import K_BLOCK

# What a stored quant is above its value.
BIAS = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Q6_K(Quantized):
    """A weight [..., N, K] in six bits: w = scale · factor · (quant − 32), factor for every 16.

    Device layout: a lane owns the 64 weights of 32 bytes of low halves, in two parts of 16 bytes, and of 16 bytes of high bits;
    each of the three is contiguous over the lanes. With lane 4b + 2h + p, plane s = 0 .. 3 of a lane has weights
    256b + 128h + 32s + 16p + 4w .. + 3 in word w: the low four bits are the halves of the bytes of part s % 2, the low ones for
    s < 2, and the high two are bits 2s and 2s + 1 of each byte of the high word. Byte s of the lane's factors is theirs, int8.
    Same bytes as the file.

    Attributes:
        low: int32 [..., 2, N, K/64, 4].
        high: int32 [..., N, K/64, 4].
        factors: int32 [..., N, K/64].
        scales: float16 [..., N, K/256].

    Source: GGUF block layout Q6_K (ggml-common.h, `block_q6_K`).
    """

    BLOCK = K_BLOCK
    BLOCK_BYTES = 210
    DEVICE_BYTES = 210
    FLOAT16 = (208,)

    low: jax.Array
    high: jax.Array
    factors: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [..., N, K] of the weight."""
        *lead, n, blocks = self.scales.shape
        return (*lead, n, blocks * K_BLOCK)

    @classmethod
    def split(cls, blocks: jax.Array) -> Q6_K:
        """Convert blocks of a file to planes."""
        lead = blocks.shape[:-2]
        # In the file, a half of 128 weights has its parts one after the other, and its factors are ordered by plane.
        low = jnp.swapaxes(words(blocks[..., :128]).reshape(*blocks.shape[:-1], 2, 2, 2, 4), -2, -3)
        low = jnp.moveaxis(low.reshape(*lead, -1, 2, 4), -2, -4)
        high = words(blocks[..., 128:192]).reshape(*lead, -1, 4)
        factors = jnp.swapaxes(blocks[..., 192:208].reshape(*blocks.shape[:-1], 2, 4, 2), -1, -2)
        return cls(low, high, words(factors).reshape(*lead, -1), halves(blocks[..., 208:])[..., 0])

    def join(self) -> jax.Array:
        """The inverse of `split`."""
        lead = self.scales.shape
        low = jnp.swapaxes(self._low(), -2, -3).reshape(*lead, 128)
        high = as_bytes(self.high.reshape(*lead, 16))
        return jnp.concatenate([low, high, self._factors().reshape(*lead, 16), as_bytes(self.scales[..., None])], axis=-1)

    def _low(self) -> jax.Array:
        """Bytes of low halves by half of a block, lane and part, uint8 [..., N, B, 2, 2, 2, 16]."""
        return as_bytes(jnp.moveaxis(self.low, -4, -2)).reshape(*self.scales.shape, 2, 2, 2, 16)

    def _factors(self) -> jax.Array:
        """Factors in the order of K, uint8 [..., N, B, 2, 4, 2]."""
        return jnp.swapaxes(as_bytes(self.factors.reshape(*self.scales.shape, 2, 2, 1)), -1, -2)

    def terms(self) -> Terms:
        """Integers and scales, in the order of K."""
        lead = self.scales.shape
        low = jnp.moveaxis(self._low(), -2, -3)
        low = jnp.concatenate([low & 15, low >> 4], axis=-3)
        high = as_bytes(self.high).reshape(*lead, 2, 1, 2, 16)
        high = (high >> jnp.arange(0, 8, 2, dtype=jnp.uint8)[:, None, None]) & 3
        values = (low | (high << 4)).astype(jnp.int8) - jnp.int8(BIAS)
        factors = jax.lax.bitcast_convert_type(self._factors(), jnp.int8).astype(jnp.int32)
        return Terms(values.reshape(*lead, 16, 16), self.scales.astype(jnp.float32), factors.reshape(*lead, 16))

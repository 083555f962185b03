"""Q8_0: int8 values with one scale for every 32."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.base import Quantized, Terms, as_bytes, halves, words

BLOCK = 32
WORDS = BLOCK // 4
HALF = WORDS // 2
BLOCK_BYTES = 2 + BLOCK


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Q8_0(Quantized):
    """A weight [..., N, K] of int8 blocks of 32 along K, each with one float16 scale: w = scale · quant.

    Device layout: the eight words of a block (word k has values 4k..4k+3, lowest byte first) are stored in two halves of four.
    Each half is contiguous over the blocks. So a lane, which owns a block, loads 16 bytes at a time, and a warp loads contiguous
    memory.

    Attributes:
        quants: int32 [..., 2, N, K/32, 4], four int8 values per word.
        scales: float16 [..., N, K/32].

    Source: GGUF block layout Q8_0 (ggml-common.h, `block_q8_0`).
    """

    BLOCK = BLOCK
    BLOCK_BYTES = BLOCK_BYTES
    DEVICE_BYTES = BLOCK_BYTES
    FLOAT16 = (0,)

    quants: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [..., N, K] of the weight."""
        *lead, n, blocks = self.scales.shape
        return (*lead, n, blocks * BLOCK)

    @staticmethod
    def encode(weight: jax.Array | np.ndarray) -> np.ndarray:
        """Quantise a float weight [..., N, K] to the bytes of a file, uint8 [..., N, 34·K/32], on the host.

        ggml's rule: d = amax/127 in float32, round half away from zero. A block becomes 0 if 1/d is not finite.

        Raises:
            ValueError: K is not a multiple of 32.
        """
        weight = np.asarray(weight, np.float32)
        if weight.ndim < 2 or weight.shape[-1] % BLOCK:
            raise ValueError(f"weight has shape {weight.shape}; Q8_0 needs [..., N, K] with K a multiple of {BLOCK}")
        blocks = weight.reshape(*weight.shape[:-1], -1, BLOCK)
        scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale >= np.finfo(np.float32).tiny)
        scaled = blocks * inverse
        quants = np.copysign(np.floor(np.abs(scaled) + np.float32(0.5)), scaled).astype(np.int8)
        raw = np.concatenate([scale.astype(np.float16).view(np.uint8), quants.view(np.uint8)], axis=-1)
        return raw.reshape(*weight.shape[:-1], -1)

    @classmethod
    def quantize(cls, weight: jax.Array | np.ndarray) -> Q8_0:
        """Quantise a float weight [..., N, K]; see `encode`."""
        return cls.from_bytes(cls.encode(weight))

    @classmethod
    def split(cls, blocks: jax.Array) -> Q8_0:
        """Convert blocks of a file to planes."""
        quants = words(blocks[..., 2:])
        quants = quants.reshape(*quants.shape[:-1], 2, HALF)
        return cls(jnp.moveaxis(quants, -2, -4), halves(blocks[..., :2])[..., 0])

    def join(self) -> jax.Array:
        """The inverse of `split`."""
        quants = jax.lax.bitcast_convert_type(self.blocks(), jnp.uint8)
        return jnp.concatenate([as_bytes(self.scales[..., None]), quants], axis=-1)

    def terms(self) -> Terms:
        """Integers and scales, in the order of K."""
        return Terms(self.blocks()[..., None, :], self.scales.astype(jnp.float32))

    def blocks(self) -> jax.Array:
        """The quants in blocks, int8 [..., N, K/32, 32]."""
        quants = jnp.moveaxis(self.quants, -4, -2)
        return jax.lax.bitcast_convert_type(quants, jnp.int8).reshape(*self.scales.shape, BLOCK)

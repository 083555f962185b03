"""Quantised weight formats: how blocks lie in a GGUF file and how they lie on the device."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 32
WORDS = BLOCK // 4
HALF = WORDS // 2
BLOCK_BYTES = 2 + BLOCK


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Q8_0:
    """A weight [..., N, K] of int8 blocks of 32 along K, each with one float16 scale: w = scale · quant.

    Device layout: each block's eight words (word k holds values 4k..4k+3, lowest byte first) lie in two halves of four, each
    half contiguous over the blocks, so that a lane that owns a block loads 16 bytes at once and a warp loads contiguously.

    Attributes:
        quants: int32 [..., 2, N, K/32, 4], four int8 values a word.
        scales: float16 [..., N, K/32].

    Source: GGUF block layout Q8_0 (ggml-common.h, `block_q8_0`).
    """

    quants: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [..., N, K] of the weight."""
        *lead, n, blocks = self.scales.shape
        return (*lead, n, blocks * BLOCK)

    @property
    def nbytes(self) -> int:
        """Bytes on the device: 34 for every 32 values."""
        return self.quants.nbytes + self.scales.nbytes

    @classmethod
    def quantize(cls, weight: jax.Array | np.ndarray) -> Q8_0:
        """Quantise a float weight [..., N, K] with ggml's rule: d = amax/127 in float32, round half away from zero.

        Runs on the host. Raises ValueError when K is not a multiple of 32.
        """
        weight = np.asarray(weight, np.float32)
        if weight.ndim < 2 or weight.shape[-1] % BLOCK:
            raise ValueError(f"weight has shape {weight.shape}; Q8_0 needs [..., N, K] with K a multiple of {BLOCK}")
        blocks = weight.reshape(*weight.shape[:-1], -1, BLOCK)
        scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
        scaled = blocks * inverse
        quants = np.copysign(np.floor(np.abs(scaled) + np.float32(0.5)), scaled).astype(np.int8)
        return cls._from_blocks(quants, scale[..., 0].astype(np.float16))

    @classmethod
    def from_bytes(cls, raw: np.ndarray) -> Q8_0:
        """Take rows as a GGUF file stores them: uint8 [..., N, 34·K/32]."""
        blocks = raw.reshape(*raw.shape[:-1], -1, BLOCK_BYTES)
        scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
        return cls._from_blocks(np.ascontiguousarray(blocks[..., 2:]).view(np.int8), scales)

    @classmethod
    def _from_blocks(cls, quants: np.ndarray, scales: np.ndarray) -> Q8_0:
        words = np.ascontiguousarray(quants).view(np.int32)
        halves = np.moveaxis(words.reshape(*words.shape[:-1], 2, HALF), -2, -4)
        return cls(jnp.asarray(np.ascontiguousarray(halves)), jnp.asarray(np.ascontiguousarray(scales)))

    def to_bytes(self) -> np.ndarray:
        """Rows as a GGUF file stores them: uint8 [..., N, 34·K/32]."""
        words = np.ascontiguousarray(np.moveaxis(np.asarray(self.quants), -4, -2))
        words = words.reshape(*words.shape[:-2], WORDS)
        scales = np.asarray(self.scales)[..., None].view(np.uint8)
        blocks = np.concatenate([scales, words.view(np.uint8)], axis=-1)
        return blocks.reshape(*blocks.shape[:-2], -1)

    def dequantize(self, dtype: jnp.dtype = jnp.float32) -> jax.Array:
        """The weight [..., N, K]; exact in float32, which holds every product of a float16 and an int8."""
        scales = self.scales.astype(jnp.float32)[..., None]
        return (self.blocks().astype(jnp.float32) * scales).reshape(self.shape).astype(dtype)

    def blocks(self) -> jax.Array:
        """The quants in blocks, int8 [..., N, K/32, 32]."""
        words = jnp.moveaxis(self.quants, -4, -2)
        return jax.lax.bitcast_convert_type(words, jnp.int8).reshape(*self.scales.shape, BLOCK)

    def take(self, index: jax.Array) -> Q8_0:
        """The weights at `index` of the leading axis: experts of a stack [E, N, K], or rows of a matrix [N, K]."""
        if self.scales.ndim > 2:
            return Q8_0(self.quants[index], self.scales[index])
        return Q8_0(self.quants[:, index], self.scales[index])

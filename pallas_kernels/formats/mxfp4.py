"""MXFP4: E2M1 codes with one power of two for every 32."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.base import Quantized, Terms, as_bytes, words

# Twice the value of each E2M1 code, so that all are integers.
CODES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
# The largest exponent with which every code is a finite float32: 12 · 2^(252 - 128).
MOST_EXPONENT = 252


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MXFP4(Quantized):
    """A weight [..., N, K] of E2M1 codes in blocks of 32 along K: w = 2^(exponent − 128) · twice the code's value.

    Device layout: a lane owns a block of 16 bytes, contiguous over the lanes. The low halves of the bytes of word w hold codes
    4w .. 4w+3, the high halves those 16 further on. Same bytes as the file.

    Attributes:
        quants: int32 [..., N, K/32, 4].
        exponents: uint8 [..., N, K/32], at most 252.

    Source: GGUF block layout MXFP4 (ggml-common.h, `block_mxfp4`); OCP Microscaling Formats (MX) Specification 1.0.
    """

    BLOCK = 32
    BLOCK_BYTES = 17
    DEVICE_BYTES = 17
    FLOAT16 = ()

    quants: jax.Array
    exponents: jax.Array

    @classmethod
    def broken(cls, blocks: np.ndarray) -> np.ndarray:
        """Which blocks of a file have an exponent with which a code is not finite: bool [n]."""
        return blocks[:, 0] > MOST_EXPONENT

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [..., N, K] of the weight."""
        *lead, n, blocks = self.exponents.shape
        return (*lead, n, blocks * self.BLOCK)

    @classmethod
    def split(cls, blocks: jax.Array) -> MXFP4:
        """Blocks as a file stores them to planes."""
        return cls(words(blocks[..., 1:]), blocks[..., 0])

    def join(self) -> jax.Array:
        """The inverse of `split`."""
        return jnp.concatenate([self.exponents[..., None], as_bytes(self.quants)], axis=-1)

    def terms(self) -> Terms:
        """Integers and scales, in the order of K."""
        packed = as_bytes(self.quants)
        codes = jnp.concatenate([packed & 15, packed >> 4], axis=-1).astype(jnp.int32)
        # The bits of 2^(exponent − 128); the two smallest are below float32's normal range.
        exponent = self.exponents.astype(jnp.int32)
        bits = jnp.where(exponent < 2, 0x00200000 << exponent, (exponent - 1) << 23)
        return Terms(jnp.asarray(CODES)[codes][..., None, :], jax.lax.bitcast_convert_type(bits, jnp.float32))

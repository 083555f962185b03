"""MXFP4: E2M1 codes with one power-of-two scale for every 32."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.base import Quantized, Terms, as_bytes, words

# The value of each E2M1 code, and twice the value, which is an integer.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
TWICE_E2M1 = (2 * E2M1).astype(np.int8)
# The maximum exponent for which every code is a finite float32: 12 · 2^(252 - 128).
MAX_EXPONENT = 252
# The exponent from which on every code but 0 is a normal float32.
_NORMAL = 2
# Bits of the codes' values at the exponents 0, 1 and 2, int32 [3, 16].
_BITS = np.ldexp(TWICE_E2M1.astype(np.float32), np.arange(_NORMAL + 1)[:, None] - 128).view(np.int32)


def power_of_two(exponent: jax.Array) -> jax.Array:
    """2^(exponent − 128), float32, for uint8 exponents up to 254. Works in kernel bodies and outside."""
    exponent = exponent.astype(jnp.int32)
    # The two smallest results are subnormal.
    bits = jnp.where(exponent < 2, 0x00200000 << exponent, (exponent - 1) << 23)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MXFP4(Quantized):
    """A weight [..., N, K] of E2M1 codes in blocks of 32 along K: w = 2^(exponent − 128) · twice the code's value.

    Device layout: a lane owns a block of 16 bytes, contiguous over the lanes. The lower half of word w holds codes 4w .. 4w+3,
    the first in the lowest four bits, as a byte permutation takes its selectors; the upper half has the codes 16 positions later.
    In the file these are the low and the high halves of four bytes. Same bytes as the file.

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
        """Which blocks of a file have an exponent for which a code is not finite: bool [n]."""
        return blocks[:, 0] > MAX_EXPONENT

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [..., N, K] of the weight."""
        *lead, n, blocks = self.exponents.shape
        return (*lead, n, blocks * self.BLOCK)

    @classmethod
    def split(cls, blocks: jax.Array) -> MXFP4:
        """Convert blocks of a file to planes."""
        packed = jax.lax.bitcast_convert_type(words(blocks[..., 1:]), jnp.uint32)
        return cls(jax.lax.bitcast_convert_type(_close(packed) | (_close(packed >> 4) << 16), jnp.int32), blocks[..., 0])

    def join(self) -> jax.Array:
        """The inverse of `split`."""
        quants = jax.lax.bitcast_convert_type(self.quants, jnp.uint32)
        packed = _open(quants & 0xFFFF) | (_open(quants >> 16) << 4)
        return jnp.concatenate([self.exponents[..., None], as_bytes(packed)], axis=-1)

    def terms(self) -> Terms:
        """Integers and scales, in the order of K."""
        return Terms(jnp.asarray(TWICE_E2M1)[self._codes()][..., None, :], power_of_two(self.exponents))

    def dequantize(self, dtype: jnp.dtype = jnp.float32) -> jax.Array:
        """The weight [..., N, K]. In float32 it has the same bits as ggml's dequantisation.

        The values are put together from bits: a product with a scale below the normal range would be 0 on a CPU.
        """
        codes, exponents = self._codes(), self.exponents[..., None].astype(jnp.int32)
        above = jnp.where(codes & 7 == 0, 0, jnp.maximum(exponents - _NORMAL, 0) << 23)
        bits = jnp.asarray(_BITS)[jnp.minimum(exponents, _NORMAL), codes] + above
        return jax.lax.bitcast_convert_type(bits, jnp.float32).reshape(self.shape).astype(dtype)

    def _codes(self) -> jax.Array:
        """Codes in the order of K, int32 [..., N, K/32, 32]."""
        shifts = jnp.arange(0, 32, 4, dtype=jnp.int32)
        codes = ((self.quants[..., None] >> shifts) & 15).reshape(*self.quants.shape, 2, 4)
        return jnp.swapaxes(codes, -2, -3).reshape(*self.exponents.shape, self.BLOCK)


def _close(packed: jax.Array) -> jax.Array:
    """The low halves of the four bytes of each word, uint32, in the 16 lowest bits."""
    pairs = packed & 0x0F0F0F0F
    pairs = (pairs | (pairs >> 4)) & 0x00FF00FF
    return (pairs | (pairs >> 8)) & 0xFFFF


def _open(codes: jax.Array) -> jax.Array:
    """The inverse of `_close`, for words without higher bits."""
    pairs = (codes | (codes << 8)) & 0x00FF00FF
    return (pairs | (pairs << 4)) & 0x0F0F0F0F

"""Q2_K and Q4_K: blocks of 256 weights in groups, each with a small integer scale and minimum."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.formats.base import Quantized, Terms, as_bytes, halves, words

K_BLOCK = 256
# Weights per lane in the layouts below.
LANE = 64


def spread_groups(packed: jax.Array) -> jax.Array:
    """Factors and offsets of a block's eight groups, twelve bytes of a file, as the group words of four lanes: int32 [..., 4].

    Six bits each. The first four groups are contiguous. Of the last four, four bits are in the last bytes and two bits are above
    the first four groups.
    """
    first, second, last = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    factors = jnp.concatenate([first & 63, (last & 15) | ((first >> 6) << 4)], axis=-1)
    offsets = jnp.concatenate([second & 63, (last >> 4) | ((second >> 6) << 4)], axis=-1)
    pairs = (*packed.shape[:-1], 4, 2)
    return words(jnp.concatenate([factors.reshape(pairs), offsets.reshape(pairs)], axis=-1))[..., 0]


def factors_and_offsets(groups: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Factors and offsets in the order of K, uint8 [..., 8] each, from group words int32 [..., 4]."""
    pairs = as_bytes(groups[..., None]).reshape(*groups.shape, 2, 2)
    return pairs[..., 0, :].reshape(*groups.shape[:-1], 8), pairs[..., 1, :].reshape(*groups.shape[:-1], 8)


def gather_groups(numbers: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The twelve bytes of a file, uint8 [..., 12], from factors and offsets [..., 8]."""
    factors, offsets = numbers
    first = (factors[..., :4]) | ((factors[..., 4:] >> 4) << 6)
    second = (offsets[..., :4]) | ((offsets[..., 4:] >> 4) << 6)
    last = (factors[..., 4:] & 15) | ((offsets[..., 4:] & 15) << 4)
    return jnp.concatenate([first, second, last], axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Q2_K(Quantized):
    """A weight [..., N, K] in two bits: w = scale · factor · quant − minimum · offset, factor and offset for every 16.

    Device layout: a lane owns the 64 weights of 16 bytes. With lane 4b + 2h + p, plane s = (word w >> 2s) & 0x03030303 of its
    four words holds weights 256b + 128h + 32s + 16p + 4w .. + 3, and byte s of its group word their factor (low half) and
    offset (high half). Quants and group words are contiguous over the lanes. Same bytes as the file.

    Attributes:
        quants: int32 [..., N, K/64, 4].
        groups: int32 [..., N, K/64].
        scales, minima: float16 [..., N, K/256].

    Source: GGUF block layout Q2_K (ggml-common.h, `block_q2_K`).
    """

    BLOCK = K_BLOCK
    BLOCK_BYTES = 84
    DEVICE_BYTES = 84
    FLOAT16 = (80, 82)

    quants: jax.Array
    groups: jax.Array
    scales: jax.Array
    minima: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [..., N, K] of the weight."""
        *lead, n, blocks = self.scales.shape
        return (*lead, n, blocks * K_BLOCK)

    @classmethod
    def split(cls, blocks: jax.Array) -> Q2_K:
        """Convert blocks of a file to planes."""
        lead = blocks.shape[:-2]
        quants = words(blocks[..., 16:80]).reshape(*lead, -1, 4)
        # In the file, the groups of a half are ordered by plane, two per plane.
        groups = blocks[..., :16].reshape(*blocks.shape[:-1], 2, 4, 2)
        groups = words(jnp.swapaxes(groups, -1, -2)).reshape(*lead, -1)
        numbers = halves(blocks[..., 80:84])
        return cls(quants, groups, numbers[..., 0], numbers[..., 1])

    def join(self) -> jax.Array:
        """The inverse of `split`."""
        lead = self.scales.shape
        numbers = as_bytes(jnp.stack([self.scales, self.minima], axis=-1))
        quants = as_bytes(self.quants.reshape(*lead, 16))
        return jnp.concatenate([self._groups().reshape(*lead, 16), quants, numbers], axis=-1)

    def _groups(self) -> jax.Array:
        """Factors and offsets in the order of K, uint8 [..., B, 2, 4, 2]."""
        groups = as_bytes(self.groups.reshape(*self.scales.shape, 2, 2, 1))
        return jnp.swapaxes(groups, -1, -2)

    def terms(self) -> Terms:
        """Integers and scales, in the order of K."""
        lead = self.scales.shape
        packed = as_bytes(self.quants).reshape(*lead, 2, 1, 2, 16)
        shifts = jnp.arange(0, 8, 2, dtype=jnp.uint8)[:, None, None]
        values = ((packed >> shifts) & 3).astype(jnp.int8).reshape(*lead, 16, 16)
        groups = self._groups().reshape(*lead, 16).astype(jnp.int32)
        scale, minimum = self.scales.astype(jnp.float32), self.minima.astype(jnp.float32)
        return Terms(values, scale, groups & 15, minimum, groups >> 4)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Q4_K(Quantized):
    """A weight [..., N, K] in four bits: w = scale · factor · quant − minimum · offset, factor and offset for every 32.

    Device layout: a lane owns the 64 weights of 32 bytes, in two halves of 16 that are each contiguous over the lanes. Lane i
    has weights 64i + 16h + 4w .. + 3 in the low halves of the bytes of word w of half h, and the weights 32 positions later in
    the high halves. The bytes of its group word: factor of the lower 32 weights, of the upper, offset of the lower, of the upper.
    148 bytes instead of 144 in the file.

    Attributes:
        quants: int32 [..., 2, N, K/64, 4].
        groups: int32 [..., N, K/64].
        scales, minima: float16 [..., N, K/256].

    Source: GGUF block layout Q4_K (ggml-common.h, `block_q4_K`).
    """

    BLOCK = K_BLOCK
    BLOCK_BYTES = 144
    DEVICE_BYTES = 148
    FLOAT16 = (0, 2)

    quants: jax.Array
    groups: jax.Array
    scales: jax.Array
    minima: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [..., N, K] of the weight."""
        *lead, n, blocks = self.scales.shape
        return (*lead, n, blocks * K_BLOCK)

    @classmethod
    def split(cls, blocks: jax.Array) -> Q4_K:
        """Convert blocks of a file to planes."""
        lead = blocks.shape[:-2]
        numbers = halves(blocks[..., :4])
        groups = spread_groups(blocks[..., 4:16]).reshape(*lead, -1)
        quants = words(blocks[..., 16:]).reshape(*lead, -1, 2, 4)
        return cls(jnp.moveaxis(quants, -2, -4), groups, numbers[..., 0], numbers[..., 1])

    def join(self) -> jax.Array:
        """The inverse of `split`."""
        lead = self.scales.shape
        numbers = as_bytes(jnp.stack([self.scales, self.minima], axis=-1))
        return jnp.concatenate([numbers, gather_groups(self._groups()), self._packed().reshape(*lead, 128)], axis=-1)

    def _groups(self) -> tuple[jax.Array, jax.Array]:
        """Factors and offsets in the order of K, uint8 [..., B, 8] each."""
        return factors_and_offsets(self.groups.reshape(*self.scales.shape, 4))

    def _packed(self) -> jax.Array:
        """The bytes of the quants in the order of the file, uint8 [..., B, 4, 32]."""
        quants = jnp.moveaxis(self.quants, -4, -2)
        return as_bytes(quants).reshape(*self.scales.shape, K_BLOCK // LANE, LANE // 2)

    def terms(self) -> Terms:
        """Integers and scales, in the order of K."""
        packed = self._packed()
        values = jnp.stack([packed & 15, packed >> 4], axis=-2).astype(jnp.int8).reshape(*self.scales.shape, 8, 32)
        factors, offsets = self._groups()
        scale, minimum = self.scales.astype(jnp.float32), self.minima.astype(jnp.float32)
        return Terms(values, scale, factors.astype(jnp.int32), minimum, offsets.astype(jnp.int32))

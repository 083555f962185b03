"""The base class of formats without a kernel: the device holds the blocks of the file, and XLA decodes them when needed."""

from __future__ import annotations

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from pallas_kernels.formats.base import Quantized, halves


@dataclasses.dataclass(frozen=True)
class Stored(Quantized):
    """A weight [..., N, K] as its file has it, without a layout for kernels. A subclass says in `terms` how bytes become values.

    Attributes:
        blocks: uint8 [..., N, B, BLOCK_BYTES].
    """

    blocks: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [..., N, K] of the weight."""
        *lead, n, blocks, _ = self.blocks.shape
        return (*lead, n, blocks * self.BLOCK)

    @classmethod
    def split(cls, blocks: jax.Array) -> Self:
        """Take blocks of a file as they are."""
        return cls(blocks)

    def join(self) -> jax.Array:
        """The inverse of `split`."""
        return self.blocks

    def number(self, first: int) -> jax.Array:
        """The float16 number at byte `first` of each block, float32 [..., N, B]."""
        return halves(self.blocks[..., first : first + 2])[..., 0].astype(jnp.float32)


def pairs(raw: jax.Array) -> jax.Array:
    """Words of two bytes, lowest first: uint8 [..., 2n] → int32 [..., n]."""
    two = raw.reshape(*raw.shape[:-1], -1, 2).astype(jnp.int32)
    return two[..., 0] | (two[..., 1] << 8)


def fields(packed: jax.Array, width: int, count: int) -> jax.Array:
    """The lowest `count` fields of `width` bits of each integer: [..., n] → [..., n, count] of the same type."""
    shifts = jnp.arange(0, width * count, width, dtype=packed.dtype)
    return (packed[..., None] >> shifts) & ((1 << width) - 1)


def planes(packed: jax.Array, width: int, count: int) -> jax.Array:
    """As `fields`, with the lowest field of all integers first: [..., n] → [..., count, n]."""
    return jnp.swapaxes(fields(packed, width, count), -1, -2)


def signed(magnitudes: jax.Array, signs: jax.Array) -> jax.Array:
    """Negate int8 magnitudes [..., n, 8] where the bit of the weight is set in signs [..., n], integers."""
    return jnp.where(fields(signs, 1, 8) == 1, -magnitudes, magnitudes)

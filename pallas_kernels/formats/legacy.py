"""Q4_0, Q4_1, Q5_0 and Q5_1: blocks of 32 weights with one scale, and with a minimum where the name ends in 1."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.formats.base import Terms
from pallas_kernels.formats.stored import Stored, fields, planes


def _four_bits(raw: jax.Array) -> jax.Array:
    """Quants of 16 bytes [..., 16], int8 [..., 1, 32]: the low halves of the bytes, then the high halves."""
    return planes(raw, 4, 2).astype(jnp.int8).reshape(*raw.shape[:-1], 1, 32)


def _five_bits(raw: jax.Array) -> jax.Array:
    """Quants of 20 bytes [..., 20], int8 [..., 1, 32]: their high bits in the order of K, then the rest as `_four_bits`."""
    high = fields(raw[..., :4], 1, 8).astype(jnp.int8).reshape(*raw.shape[:-1], 1, 32)
    return _four_bits(raw[..., 4:]) | (high << 4)


def _above_a_minimum(values: jax.Array, scale: jax.Array, minimum: jax.Array) -> Terms:
    """Terms of w = scale · value + minimum."""
    return Terms(values, scale, None, minimum, jnp.full((*scale.shape, 1), -1, jnp.int32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Q4_0(Stored):
    """A weight [..., N, K] in four bits: w = scale · quant, quant from −8 to 7.

    Source: GGUF block layout Q4_0 (ggml-common.h, `block_q4_0`).
    """

    BLOCK = 32
    BLOCK_BYTES = 18
    DEVICE_BYTES = 18
    FLOAT16 = (0,)

    def terms(self) -> Terms:
        """Integers and scales, in the order of K."""
        return Terms(_four_bits(self.blocks[..., 2:]) - 8, self.number(0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Q4_1(Stored):
    """A weight [..., N, K] in four bits: w = scale · quant + minimum, quant from 0 to 15.

    Source: GGUF block layout Q4_1 (ggml-common.h, `block_q4_1`).
    """

    BLOCK = 32
    BLOCK_BYTES = 20
    DEVICE_BYTES = 20
    FLOAT16 = (0, 2)

    def terms(self) -> Terms:
        """Integers and scales, in the order of K."""
        return _above_a_minimum(_four_bits(self.blocks[..., 4:]), self.number(0), self.number(2))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Q5_0(Stored):
    """A weight [..., N, K] in five bits: w = scale · quant, quant from −16 to 15.

    Source: GGUF block layout Q5_0 (ggml-common.h, `block_q5_0`).
    """

    BLOCK = 32
    BLOCK_BYTES = 22
    DEVICE_BYTES = 22
    FLOAT16 = (0,)

    def terms(self) -> Terms:
        """Integers and scales, in the order of K."""
        return Terms(_five_bits(self.blocks[..., 2:]) - 16, self.number(0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Q5_1(Stored):
    """A weight [..., N, K] in five bits: w = scale · quant + minimum, quant from 0 to 31.

    Source: GGUF block layout Q5_1 (ggml-common.h, `block_q5_1`).
    """

    BLOCK = 32
    BLOCK_BYTES = 24
    DEVICE_BYTES = 24
    FLOAT16 = (0, 2)

    def terms(self) -> Terms:
        """Integers and scales, in the order of K."""
        return _above_a_minimum(_five_bits(self.blocks[..., 4:]), self.number(0), self.number(2))

"""Compressed rows and indexer keys in the types that they were rounded to: E4M3 and E2M1 codes, and a power of two a block.

A code is made from a value that `rounding` has left, so that reading it back gives the same bits. Everything is integer
arithmetic, alike in kernel bodies and outside them. A block that holds a NaN or an infinity, for which there are no codes, is
read back as NaN throughout: the exponent says so.

Source: OCP Microscaling Formats (MX) v1.0 for E2M1 and E4M3; DeepSeek-V4's reference inference code for what is rounded.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.core.rounding import (
    FP4_BLOCK,
    FP4_FLOOR,
    FP4_LIMIT,
    FP8_BLOCK,
    FP8_FLOOR,
    FP8_LIMIT,
    power_of_two,
    scale_exponents,
)

# Exponent of a block that is not finite.
NOT_FINITE = -128
MAGNITUDE = (1 << 31) - 1
INFINITE = 0x7F800000


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NarrowRows:
    """Rows [..., Q] of which the last R channels rotate and the others were rounded to FP8.

    Attributes:
        codes: uint8 [..., Q - R], E4M3.
        exponents: int8 [..., (Q - R) / 64], of each block's scale.
        turning: float32 [..., R], those that rotate, as they are; saved sessions have this name.
    """

    codes: Any
    exponents: Any
    turning: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the rows as float32."""
        return (*self.codes.shape[:-1], self.codes.shape[-1] + self.turning.shape[-1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NarrowKeys:
    """Keys [..., w] that were rounded to FP4.

    Attributes:
        codes: uint8 [..., w/2], E2M1: channel c in the low half of byte c, channel w/2 + c in the high half.
        exponents: int8 [..., w/32], of each block's scale.
    """

    codes: Any
    exponents: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the keys as float32."""
        return (*self.codes.shape[:-1], 2 * self.codes.shape[-1])


Stored = jax.Array | NarrowRows | NarrowKeys


def fp8_codes(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """E4M3 codes int32 [..., 64] and exponents int32 [...] of what `rounding.fp8` left of blocks of 64."""
    bits, scaled, exponents = _scaled(blocks, FP8_FLOOR, FP8_LIMIT)
    below = (scaled * jnp.float32(2.0**9)).astype(jnp.int32)
    above = (jax.lax.bitcast_convert_type(scaled, jnp.int32) >> 20) - ((127 - 7) << 3)
    code = jnp.where(scaled < jnp.float32(2.0**-6), below, above) & 0x7F
    return code | ((bits >> 24) & 0x80), exponents


def fp4_codes(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """E2M1 codes int32 [..., 32] and exponents int32 [...] of what `rounding.fp4` left of blocks of 32."""
    bits, scaled, exponents = _scaled(blocks, FP4_FLOOR, FP4_LIMIT)
    below = (scaled * jnp.float32(2.0)).astype(jnp.int32)
    above = (jax.lax.bitcast_convert_type(scaled, jnp.int32) >> 22) - ((127 - 1) << 1)
    code = jnp.where(scaled < jnp.float32(1.0), below, above) & 0x7
    return code | ((bits >> 28) & 0x8), exponents


def _scaled(blocks: jax.Array, floor: float, limit: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Bits of the values, magnitudes over their block's scale, and its exponents."""
    bits = jax.lax.bitcast_convert_type(blocks, jnp.int32)
    # Magnitudes are ordered as integers, NaN above all.
    top = jnp.max(bits & MAGNITUDE, axis=-1)
    exponents = scale_exponents(jnp.maximum(jax.lax.bitcast_convert_type(top, jnp.float32), jnp.float32(floor)), limit)
    scaled = jnp.abs(blocks) * power_of_two(-exponents)[..., None]
    finite = top < INFINITE
    return bits, jnp.where(finite[..., None], scaled, jnp.zeros_like(scaled)), jnp.where(finite, exponents, NOT_FINITE)


def scales(exponents: jax.Array) -> jax.Array:
    """Powers of two float32 of stored exponents, NaN of a block that is not finite."""
    wide = exponents.astype(jnp.int32)
    return jnp.where(wide == NOT_FINITE, jnp.float32(jnp.nan), power_of_two(wide))


def fp8_values(codes: jax.Array) -> jax.Array:
    """float32 values of E4M3 codes, before their block's scale."""
    wide = codes.astype(jnp.int32)
    # A float16 has the same fields with a bias that is 8 larger, numbers below the normal ones included.
    half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).astype(jnp.int16)
    return jax.lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32) * jnp.float32(2.0**8)


def fp4_values(codes: jax.Array) -> jax.Array:
    """bfloat16 values of E2M1 codes int32, before their block's scale; bits above the fourth do not matter."""
    magnitude = codes & 0x7
    half = 126 << 7
    bits = jnp.where(magnitude < 2, magnitude * half, (magnitude << 6) + half) | ((codes & 0x8) << 12)
    return jax.lax.bitcast_convert_type(bits.astype(jnp.int16), jnp.bfloat16)


def narrow_rows(x: jax.Array, rope: int) -> NarrowRows:
    """Rows [..., Q] whose first Q - `rope` channels `rounding.fp8` left, a multiple of 64."""
    plain = x.shape[-1] - rope
    codes, exponents = fp8_codes(x[..., :plain].reshape(*x.shape[:-1], plain // FP8_BLOCK, FP8_BLOCK))
    codes = codes.reshape(*x.shape[:-1], plain).astype(jnp.uint8)
    return NarrowRows(codes, exponents.astype(jnp.int8), x[..., plain:])


def narrow_keys(x: jax.Array) -> NarrowKeys:
    """Keys [..., w] that `rounding.fp4` left, w a multiple of 32."""
    codes, exponents = fp4_codes(x.reshape(*x.shape[:-1], x.shape[-1] // FP4_BLOCK, FP4_BLOCK))
    low, high = jnp.split(codes.reshape(x.shape), 2, axis=-1)
    return NarrowKeys((low | (high << 4)).astype(jnp.uint8), exponents.astype(jnp.int8))


def widen(rows: Stored) -> jax.Array:
    """Stored rows or keys as float32, with the bits that they were made from."""
    if isinstance(rows, NarrowRows):
        plain = _times_scales(fp8_values(rows.codes), rows.exponents, FP8_BLOCK)
        return jnp.concatenate([plain, rows.turning], axis=-1)
    if isinstance(rows, NarrowKeys):
        wide = rows.codes.astype(jnp.int32)
        values = fp4_values(jnp.concatenate([wide, wide >> 4], axis=-1)).astype(jnp.float32)
        return _times_scales(values, rows.exponents, FP4_BLOCK)
    return rows


def _times_scales(values: jax.Array, exponents: jax.Array, block: int) -> jax.Array:
    blocks = values.reshape(*exponents.shape, block) * scales(exponents)[..., None]
    return blocks.reshape(values.shape)

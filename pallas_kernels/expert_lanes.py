"""What one lane does with its part of a weight row, for each format that experts are stored in.

A lane owns as many weights of a row as 16 bytes or two times 16 hold. It multiplies them with activations that lie in the same
order and adds the product of the integers and the scales to its accumulator. Source of the arithmetic: gguf.md §6.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import lanes
from pallas_kernels.activation_k import K_BLOCK
from pallas_kernels.arithmetic import LANES, dp4a, fma, multiply, pick_bytes
from pallas_kernels.formats import IQ2_XXS, MXFP4, Q2_K, Q4_K, Q8_0, Quantized

# Magnitudes of IQ2_XXS by their number, and below zero four further on.
POSITIVE, NEGATIVE = 0x002B1908, 0x00D5E7F8
# Twice the magnitudes of E2M1 by code.
_SMALL, _LARGE = 0x03020100, 0x0C080604
_BYTES = 0x01010101

Loaded = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where 32 lanes stand: columns from `first` lane on of one row; `real` marks those that there are, None for all."""

    index: tuple[Any, ...]
    first: jax.Array
    real: jax.Array | None

    @property
    def span(self) -> Any:
        """The lanes' own columns."""
        return pl.ds(self.first, LANES)

    def block(self, lanes_a_block: int) -> jax.Array:
        """The column of each lane's block, int32 [32]."""
        return (self.first + lanes.numbers()) // lanes_a_block


class Format(abc.ABC):
    """How a lane reads and multiplies one format.

    Attributes:
        width: weights of a lane.
    """

    width: ClassVar[int]

    def __init__(self, interpret: bool):
        self.interpret = interpret

    @abc.abstractmethod
    def weights(self, refs: Any, place: Place) -> Loaded:
        """Load a lane's part of one weight row."""

    def looked_up(self, w: Loaded, table: Any) -> Loaded:
        """What was loaded, with what a table adds to it."""
        return w

    @abc.abstractmethod
    def activations(self, refs: Any, place: Place) -> Loaded:
        """Load a lane's part of one row of activations."""

    @abc.abstractmethod
    def add(self, w: Loaded, x: Loaded, acc: jax.Array) -> jax.Array:
        """The accumulator float32 [32] and the product."""

    def _dot(self, words: Sequence[jax.Array], x: Sequence[jax.Array]) -> jax.Array:
        total = jnp.zeros_like(words[0])
        for word, part in zip(words, x, strict=True):
            total = dp4a(word, part, total, interpret=self.interpret)
        return total

    def _fma(self, integers: jax.Array, scale: jax.Array, acc: jax.Array) -> jax.Array:
        return fma(integers.astype(jnp.float32), scale, acc, interpret=self.interpret)

    def _times(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return multiply(a.astype(jnp.float32), b, interpret=self.interpret)


def _once(ref: Any, place: Place, *index: Any, width: int = 1) -> jax.Array:
    """A weight is used once, so it leaves the cache first."""
    return lanes.load(ref, *place.index, *index, real=place.real, width=width, eviction_policy="evict_first")


class _K(Format):
    """Formats that meet activations in blocks of 256."""

    planes: ClassVar[int]
    sums: ClassVar[bool]

    def activations(self, refs: Any, place: Place) -> Loaded:
        quants, scales, sums = refs
        [row] = place.index
        planes = [
            lanes.load(quants, row, plane, place.span, slice(None), real=place.real, width=4) for plane in range(self.planes)
        ]
        scale = lanes.load(scales, row, place.block(K_BLOCK // self.width), real=place.real)
        totals = [lanes.load(sums, row, place.span, slice(None), real=place.real, width=4)] if self.sums else []
        return (*planes, scale, *totals)


class _IQ2(_K):
    width, planes, sums = 128, 8, False

    def weights(self, refs: Any, place: Place) -> Loaded:
        indices, signs, factors, scales = refs
        words = (_once(plane, place, place.span, slice(None), width=4) for plane in (indices, signs))
        return (*words, _once(factors, place, place.span), _once(scales, place, place.block(2)))

    def looked_up(self, w: Loaded, table: Any) -> Loaded:
        index, *rest = w
        return (*(lanes.load(table, (index >> (8 * group)) & 255, real=None) for group in range(4)), *rest)

    def add(self, w: Loaded, x: Loaded, acc: jax.Array) -> jax.Array:
        *selectors, sign, factor, scale = w
        *planes, x_scale = x
        words = []
        for group, selector in enumerate(selectors):
            # The sign of a weight becomes the bit of its selector that chooses among the constants below zero.
            moved = sign << (2 - group) if group < 2 else sign >> (group - 2)
            selector = selector | (moved & 0x44444444)
            words += [pick_bytes(POSITIVE, NEGATIVE, half, interpret=self.interpret) for half in (selector, selector >> 16)]
        shift = 4 * jax.lax.broadcasted_iota(jnp.int32, (LANES, 4), 1)
        factors = ((factor.astype(jnp.int32)[:, None] >> shift) & 15) * 2 + 1
        total = jnp.sum(self._dot(words, planes) * factors, axis=-1)
        return self._fma(total, self._times(scale, x_scale * 0.125), acc)


class _Q2(_K):
    width, planes, sums = 64, 4, True

    def weights(self, refs: Any, place: Place) -> Loaded:
        quants, groups, scales, minima = refs
        block = place.block(4)
        quant = _once(quants, place, place.span, slice(None), width=4)
        return quant, _once(groups, place, place.span), _once(scales, place, block), _once(minima, place, block)

    def add(self, w: Loaded, x: Loaded, acc: jax.Array) -> jax.Array:
        quant, group, scale, minimum = w
        *planes, x_scale, sums = x
        total = jnp.zeros_like(quant)
        for s, plane in enumerate(planes):
            dot = self._dot([(quant >> (2 * s)) & (3 * _BYTES)], [plane])
            total += dot * ((group >> (8 * s)) & 15)[:, None]
        shift = 8 * jax.lax.broadcasted_iota(jnp.int32, (LANES, 4), 1) + 4
        offset = jnp.sum(((group[:, None] >> shift) & 15) * sums, axis=-1)
        acc = self._fma(jnp.sum(total, axis=-1), self._times(scale, x_scale), acc)
        return self._fma(-offset, self._times(minimum, x_scale), acc)


class _Q4(_K):
    width, planes, sums = 64, 4, True

    def weights(self, refs: Any, place: Place) -> Loaded:
        quants, groups, scales, minima = refs
        matrix, row = place.index
        block = place.block(4)
        halves = [
            lanes.load(
                quants, matrix, half, row, place.span, slice(None), real=place.real, width=4, eviction_policy="evict_first"
            )
            for half in range(2)
        ]
        return (*halves, _once(groups, place, place.span), _once(scales, place, block), _once(minima, place, block))

    def add(self, w: Loaded, x: Loaded, acc: jax.Array) -> jax.Array:
        first, second, group, scale, minimum = w
        *planes, x_scale, sums = x
        total = jnp.zeros_like(first)
        for n in range(2):
            words = [(half >> (4 * n)) & (15 * _BYTES) for half in (first, second)]
            total += self._dot(words, planes[2 * n : 2 * n + 2]) * ((group >> (8 * n)) & 63)[:, None]
        # Planes 0 and 1 are the lower 32 weights of the lane, whose offset is the third byte of its group word.
        shift = 8 * (jax.lax.broadcasted_iota(jnp.int32, (LANES, 4), 1) // 2) + 16
        offset = jnp.sum(((group[:, None] >> shift) & 63) * sums, axis=-1)
        acc = self._fma(jnp.sum(total, axis=-1), self._times(scale, x_scale), acc)
        return self._fma(-offset, self._times(minimum, x_scale), acc)


class _Blocks(Format):
    """Formats that meet activations in blocks of 32."""

    width = 32

    def activations(self, refs: Any, place: Place) -> Loaded:
        quants, scales = refs
        [row] = place.index
        halves = [lanes.load(quants, row, 0, half, place.span, slice(None), real=place.real, width=4) for half in range(2)]
        return (*halves, lanes.load(scales, row, 0, place.span, real=place.real))


class _MX(_Blocks):
    def weights(self, refs: Any, place: Place) -> Loaded:
        quants, exponents = refs
        return _once(quants, place, place.span, slice(None), width=4), _once(exponents, place, place.span)

    def add(self, w: Loaded, x: Loaded, acc: jax.Array) -> jax.Array:
        quant, exponent = w
        *halves, x_scale = x
        words = [twice_e2m1((quant >> shift) & (15 * _BYTES), interpret=self.interpret) for shift in (0, 4)]
        scale = power_of_two(exponent)
        return self._fma(jnp.sum(self._dot(words, halves), axis=-1), self._times(scale, x_scale), acc)


def power_of_two(exponent: jax.Array) -> jax.Array:
    """2^(exponent − 128) of uint8 up to 254, float32."""
    exponent = exponent.astype(jnp.int32)
    # The two smallest are below float32's normal range.
    bits = jnp.where(exponent < 2, 0x00200000 << exponent, (exponent - 1) << 23)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def twice_e2m1(codes: jax.Array, *, interpret: bool) -> jax.Array:
    """Twice the values of four codes, one a byte, as int8."""
    close = codes | (codes >> 4)
    close = (close & 255) | ((close >> 8) & 0xFF00)
    magnitudes = pick_bytes(_SMALL, _LARGE, close & 0x7777, interpret=interpret)
    negative = (codes >> 3) & _BYTES
    # Bytes below zero are inverted and get one more; none overflows, and 0 stays 0 only by the carry being cut off.
    mask = negative * 255
    return _add_bytes(magnitudes ^ mask, negative)


def _add_bytes(a: jax.Array, b: jax.Array) -> jax.Array:
    """Sums of the four bytes of each word, without carries between them."""
    low = (a & 0x7F7F7F7F) + (b & 0x7F7F7F7F)
    return low ^ ((a ^ b) & -0x7F7F7F80)


class _Q8(_Blocks):
    def weights(self, refs: Any, place: Place) -> Loaded:
        quants, scales = refs
        matrix, row = place.index
        halves = [
            lanes.load(
                quants, matrix, half, row, place.span, slice(None), real=place.real, width=4, eviction_policy="evict_first"
            )
            for half in range(2)
        ]
        return (*halves, _once(scales, place, place.span))

    def add(self, w: Loaded, x: Loaded, acc: jax.Array) -> jax.Array:
        *words, scale = w
        *halves, x_scale = x
        return self._fma(jnp.sum(self._dot(words, halves), axis=-1), self._times(scale, x_scale), acc)


OF: dict[type[Quantized], type[Format]] = {IQ2_XXS: _IQ2, Q2_K: _Q2, Q4_K: _Q4, MXFP4: _MX, Q8_0: _Q8}

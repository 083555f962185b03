"""How a lane loads and multiplies its part of a weight row, for each format that has kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.core.arithmetic import dot_of_halves, pick_bytes, signed
from pallas_kernels.formats import IQ2_S, IQ2_XXS, IQ3_XXS, MXFP4, Q2_K, Q4_K, Q5_K, Q6_K, Q8_0, Quantized
from pallas_kernels.formats.mxfp4 import TWICE_E2M1, power_of_two
from pallas_kernels.formats.q6_k import BIAS
from pallas_kernels.linear.lane_codebooks import IQ2Lanes, IQ2SLanes, IQ3Lanes
from pallas_kernels.linear.lanes import BlockFormat, Format, KFormat, Loaded, Place, between, columns, half_once, moved, once

# Twice the magnitudes of E2M1, one byte for each code: the first four and the last four.
_SMALL, _LARGE = (int(word) for word in TWICE_E2M1[:8].view("<u4"))
# The signs of the eight codes of a word.
_CODE_SIGNS = 0x88888888 - (1 << 32)
_BYTES = 0x01010101


class _Q2(KFormat):
    width, planes, sums = 64, 4, True

    def weights(self, refs: Any, place: Place) -> Loaded:
        quants, groups, scales, minima = refs
        block = place.block(4)
        quant = once(quants, place, place.span, slice(None), width=4)
        return quant, once(groups, place, place.span), once(scales, place, block), once(minima, place, block)

    def add(self, w: Loaded, x: Loaded, acc: jax.Array) -> jax.Array:
        quant, group, scale, minimum = w
        *planes, x_scale, sums = x
        total = jnp.zeros_like(quant)
        for s, plane in enumerate(planes):
            # The codes stay at their places in a byte. The factors make up for it: every product is 64 times as large.
            dot = self.dot([quant & signed((3 * _BYTES) << (2 * s))], [plane], unsigned=True)
            total += dot * (moved(group, 6 - 10 * s) & (15 << (6 - 2 * s)))[:, None]
        offset = dot_of_halves(sums, (group >> 4) & (15 * _BYTES), interpret=self.interpret)
        acc = self.fma(jnp.sum(total, axis=-1) >> 6, self.times(scale, x_scale), acc)
        return self.fma(-offset, self.times(minimum, x_scale), acc)


class _Pairs(KFormat):
    """Formats with pairs of 32 weights that have a factor and an offset."""

    width, planes, sums = 64, 4, True

    def _add_pair(self, words: list[jax.Array], numbers: Loaded, x: Loaded, acc: jax.Array) -> jax.Array:
        """Add the product of four planes of weights, with the lane's group word, scale and minimum."""
        group, scale, minimum = numbers
        *planes, x_scale, sums = x
        total = jnp.zeros_like(words[0])
        for n in range(2):
            pair = slice(2 * n, 2 * n + 2)
            total += self.dot(words[pair], planes[pair]) * ((group >> (8 * n)) & 63)[:, None]
        # Planes 0 and 1 are the lower 32 weights of the lane. Their offset is the third byte of its group word.
        offset = jnp.sum(((group[:, None] >> (8 * (columns() // 2) + 16)) & 63) * sums, axis=-1)
        acc = self.fma(jnp.sum(total, axis=-1), self.times(scale, x_scale), acc)
        return self.fma(-offset, self.times(minimum, x_scale), acc)

    @staticmethod
    def _numbers(planes: Sequence[Any], place: Place) -> Loaded:
        """Load the lane's group word, scale and minimum."""
        (groups, scales, minima), block = planes, place.block(4)
        return once(groups, place, place.span), once(scales, place, block), once(minima, place, block)


class _Q4(_Pairs):
    def weights(self, refs: Any, place: Place) -> Loaded:
        quants, *numbers = refs
        halves = (half_once(quants, place, half, slice(None), width=4) for half in range(2))
        return (*halves, *self._numbers(numbers, place))

    def add(self, w: Loaded, x: Loaded, acc: jax.Array) -> jax.Array:
        *halves, group, scale, minimum = w
        words = [(half >> (4 * n)) & (15 * _BYTES) for n in range(2) for half in halves]
        return self._add_pair(words, (group, scale, minimum), x, acc)


class _Q5(_Pairs):
    def weights(self, refs: Any, place: Place) -> Loaded:
        quants, fifths, *numbers = refs
        halves = (half_once(quants, place, half, slice(None), width=4) for half in range(2))
        bits = (half_once(fifths, place, half) for half in range(2))
        return (*halves, *bits, *self._numbers(numbers, place))

    def add(self, w: Loaded, x: Loaded, acc: jax.Array) -> jax.Array:
        *halves, first, second, group, scale, minimum = w
        bits = between((first, second))
        # The bit of plane 0 moves to the fifth place of its byte; that of plane p is p places above it.
        bits = jnp.where(columns() & 1 == 1, bits, bits << 4)
        words = [
            ((half >> (4 * n)) & (15 * _BYTES)) | ((bits >> (2 * n + h)) & (16 * _BYTES))
            for n in range(2)
            for h, half in enumerate(halves)
        ]
        return self._add_pair(words, (group, scale, minimum), x, acc)


class _Q6(KFormat):
    width, planes, sums = 64, 4, True

    def weights(self, refs: Any, place: Place) -> Loaded:
        low, high, factors, scales = refs
        parts = (half_once(low, place, part, slice(None), width=4) for part in range(2))
        bits = once(high, place, place.span, slice(None), width=4)
        return (*parts, bits, once(factors, place, place.span), once(scales, place, place.block(4)))

    def add(self, w: Loaded, x: Loaded, acc: jax.Array) -> jax.Array:
        *parts, high, factor, scale = w
        *planes, x_scale, sums = x
        total = jnp.zeros_like(high)
        for s, plane in enumerate(planes):
            word = ((parts[s % 2] >> (4 * (s // 2))) & (15 * _BYTES)) | (moved(high, 4 - 2 * s) & (48 * _BYTES))
            total += self.dot([word], [plane]) * ((factor << (24 - 8 * s)) >> 24)[:, None]
        factors = (factor[:, None] << (24 - 8 * columns())) >> 24
        integers = jnp.sum(total, axis=-1) - BIAS * jnp.sum(factors * sums, axis=-1)
        return self.fma(integers, self.times(scale, x_scale), acc)


class _MX(BlockFormat):
    def weights(self, refs: Any, place: Place) -> Loaded:
        quants, exponents = refs
        return once(quants, place, place.span, slice(None), width=4), once(exponents, place, place.span)

    def add(self, w: Loaded, x: Loaded, acc: jax.Array) -> jax.Array:
        quant, exponent = w
        *halves, x_scale = x
        above, below = zip(*twice_e2m1(quant, interpret=self.interpret), strict=True)
        total = jnp.sum(self.dot(above, halves) - self.dot(below, halves), axis=-1)
        return self.fma(total, self.times(power_of_two(exponent), x_scale), acc)


def twice_e2m1(quants: jax.Array, *, interpret: bool) -> list[tuple[jax.Array, jax.Array]]:
    """Twice the values of the eight E2M1 codes of each word, in two halves of four.

    A half is two words of int8: the positive values and 0 elsewhere, and the magnitudes of the negative ones and 0 elsewhere. A
    byte permutation gives both, since a code's sign is the bit that selects the highest bit of a magnitude, which is 0.
    """
    words = quants, quants ^ _CODE_SIGNS
    return [
        tuple(pick_bytes(_SMALL, _LARGE, word >> shift, interpret=interpret) for word in words)  # type: ignore[misc]
        for shift in (0, 16)
    ]


class _Q8(BlockFormat):
    def weights(self, refs: Any, place: Place) -> Loaded:
        quants, scales = refs
        halves = (half_once(quants, place, half, slice(None), width=4) for half in range(2))
        return (*halves, once(scales, place, place.span))

    def add(self, w: Loaded, x: Loaded, acc: jax.Array) -> jax.Array:
        *words, scale = w
        *halves, x_scale = x
        return self.fma(jnp.sum(self.dot(words, halves), axis=-1), self.times(scale, x_scale), acc)


LANE_FORMATS: dict[type[Quantized], type[Format]] = {
    IQ2_XXS: IQ2Lanes,
    IQ2_S: IQ2SLanes,
    IQ3_XXS: IQ3Lanes,
    Q2_K: _Q2,
    Q4_K: _Q4,
    Q5_K: _Q5,
    Q6_K: _Q6,
    MXFP4: _MX,
    Q8_0: _Q8,
}

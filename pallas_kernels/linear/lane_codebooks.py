"""The lane formats with a codebook. A lane looks the patterns of its weights up and applies their signs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.core import loads
from pallas_kernels.core.arithmetic import LANES, mask_bytes, pick_bytes
from pallas_kernels.formats import iq2_s, iq2_xxs, iq3_xxs
from pallas_kernels.linear.lanes import KFormat, Loaded, Place, between, columns, half_once, moved, once

# Values of IQ2_XXS and IQ2_S as int8, one byte for each magnitude: the positive ones (numbers 0 to 3) and the negative (4 to 7).
POSITIVE, NEGATIVE = 0x002B1908, 0x00D5E7F8


class _Patterns(KFormat):
    """Formats with patterns of eight weights of the three magnitudes."""

    width, planes, sums = 128, 8, False
    selectors: ClassVar[Callable[[], np.ndarray]]

    @classmethod
    def codebook(cls) -> np.ndarray:
        """The selectors of the patterns, and behind them the positive constants for each lane.

        Every lane loads its own copy. The compiler would move a value that it knows to be the same in all lanes to a register
        before each use: a tenth of the instructions.
        """
        return np.append(cls.selectors(), np.full(LANES, POSITIVE, np.int32))

    def _looked_up(self, codes: Sequence[jax.Array], table: Any) -> Loaded:
        """The selectors of pattern numbers, int32 [32, 4] each, and the positive constants."""
        constants = loads.load(table, table.shape[0] - LANES + loads.numbers(), real=None)
        return (*(loads.load(table, code, real=None) for code in codes), constants[:, None])

    def _group(self, selector: jax.Array, constants: jax.Array, sign: jax.Array, group: int) -> list[jax.Array]:
        """Eight weights of every word of a lane, int8 in two int32 [32, 4]."""
        # The sign bit is inserted into the selector, where it selects the negative constants.
        selector = selector | (moved(sign, 2 - group) & 0x44444444)
        return [pick_bytes(constants, NEGATIVE, half, interpret=self.interpret) for half in (selector, selector >> 16)]


class IQ2Lanes(_Patterns):
    """IQ2_XXS: a byte of an index word is a pattern."""

    selectors = staticmethod(iq2_xxs.selectors)

    def weights(self, refs: Any, place: Place) -> Loaded:
        indices, signs, factors, scales = refs
        words = (once(plane, place, place.span, slice(None), width=4) for plane in (indices, signs))
        return (*words, once(factors, place, place.span), once(scales, place, place.block(2)))

    def apply_codebook(self, w: Loaded, table: Any) -> Loaded:
        index, *rest = w
        return (*self._looked_up([(index >> (8 * group)) & 255 for group in range(4)], table), *rest)

    def add(self, w: Loaded, x: Loaded, acc: jax.Array) -> jax.Array:
        *selectors, constants, sign, factor, scale = w
        *planes, x_scale = x
        words = [word for group, selector in enumerate(selectors) for word in self._group(selector, constants, sign, group)]
        factors = ((factor.astype(jnp.int32)[:, None] >> (4 * columns())) & 15) * 2 + 1
        total = jnp.sum(self.dot(words, planes) * factors, axis=-1)
        return self.fma(total, self.times(scale, x_scale * 0.125), acc)


class IQ2SLanes(_Patterns):
    """IQ2_S: ten bits are a pattern, three patterns in an index word."""

    selectors = staticmethod(iq2_s.selectors)

    def weights(self, refs: Any, place: Place) -> Loaded:
        indices, rest, signs, factors, scales = refs
        words = (once(plane, place, place.span, slice(None), width=4) for plane in (indices, signs))
        numbers = (once(plane, place, place.span) for plane in (rest, factors))
        return (*words, *numbers, once(scales, place, place.block(2)))

    def apply_codebook(self, w: Loaded, table: Any) -> Loaded:
        index, sign, rest, *others = w
        codes = [(index >> (iq2_s.CODE * group)) & ((1 << iq2_s.CODE) - 1) for group in range(3)]
        last = ((rest[:, None] >> (8 * columns())) & 255) << 2
        codes.append(last | jax.lax.shift_right_logical(index, jnp.full_like(index, 3 * iq2_s.CODE)))
        return (*self._looked_up(codes, table), sign, *others)

    def add(self, w: Loaded, x: Loaded, acc: jax.Array) -> jax.Array:
        *selectors, constants, sign, factor, scale = w
        *planes, x_scale = x
        total = jnp.zeros_like(sign)
        for pair in range(2):
            groups = range(2 * pair, 2 * pair + 2)
            words = [word for group in groups for word in self._group(selectors[group], constants, sign, group)]
            # 2 · factor + 1 of four factors, one in each byte.
            odd = (moved(factor, 1 - 4 * pair) & 0x1E1E1E1E) | 0x01010101
            total += self.dot(words, planes[4 * pair : 4 * pair + 4]) * ((odd[:, None] >> (8 * columns())) & 255)
        return self.fma(jnp.sum(total, axis=-1), self.times(scale, x_scale * 0.125), acc)


class IQ3Lanes(KFormat):
    """IQ3_XXS: a byte of an index word is a pattern of four weights, whose signs are applied apart."""

    width, planes, sums = 64, 4, False

    @classmethod
    def codebook(cls) -> np.ndarray:
        return iq3_xxs.patterns()

    def weights(self, refs: Any, place: Place) -> Loaded:
        indices, signs, factors, scales = refs
        index = once(indices, place, place.span, slice(None), width=4)
        halves = (half_once(signs, place, half) for half in range(2))
        return (index, *halves, once(factors, place, place.span), once(scales, place, place.block(4)))

    def apply_codebook(self, w: Loaded, table: Any) -> Loaded:
        index, *rest = w
        return (*(loads.load(table, (index >> (8 * byte)) & 255, real=None) for byte in range(4)), *rest)

    def add(self, w: Loaded, x: Loaded, acc: jax.Array) -> jax.Array:
        *patterns, first, second, factor, scale = w
        *planes, x_scale = x
        column = columns()
        sign = between((first, second)) << (4 * (column & 1))
        # −m is ~m + 1: negative bytes are inverted, and a second product adds their activations.
        masks = [mask_bytes(sign << byte, interpret=self.interpret) for byte in range(4)]
        inverted = [pattern ^ mask for pattern, mask in zip(patterns, masks, strict=True)]
        factors = ((factor.astype(jnp.int32)[:, None] >> (4 * (column >> 1))) & 15) * 2 + 1
        total = (self.dot(inverted, planes) - self.dot(masks, planes)) * factors
        return self.fma(jnp.sum(total, axis=-1), self.times(scale, x_scale * 0.25), acc)

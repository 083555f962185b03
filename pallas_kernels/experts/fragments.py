"""Decodes stored weights into the left operand of wgmma, in the registers of a warpgroup (Pallas Mosaic GPU, Hopper).

A block of 256 weights of a row is 16 steps of 16. In each step a thread of a quad supplies four weights of a row. The order of K
within a block is free if the activations have the same order, so a thread decodes neighbouring weights, which share their scale
and their words. Each value equals `Quantized.dequantize`, rounded to bfloat16.

A row's group of weights has at most eight different values. They are computed once, and byte permutations select among their
high and low bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pallas_kernels.core.thread_code import THREADS, Code, Words
from pallas_kernels.formats import IQ2_S, IQ2_XXS, IQ3_XXS, MXFP4, Q2_K, Q4_K, Quantized, iq2_s, iq3_xxs
from pallas_kernels.formats.iq2_s import CODE
from pallas_kernels.formats.iq2_xxs import MAGNITUDES, selectors

# Weights of a row per block, steps of a block, and weights of a step.
BLOCK, STEPS, STEP = 256, 16, 16
# Threads of a quad, which share the rows of a fragment.
QUAD = 4


@dataclasses.dataclass(frozen=True)
class Load:
    """What a thread loads of one plane for a block of a row.

    Attributes:
        plane: number of the format's plane.
        bits: 16, 32, 64, 128 or 256.
        block: bytes of a block of 256 weights.
        thread: bytes from one thread of a quad to the next; 0 if they load the same.
        part: which of the plane's matrices, where it has two.
    """

    plane: int
    bits: int
    block: int
    thread: int
    part: int = 0


@dataclasses.dataclass(frozen=True)
class Decoder:
    """How a format is decoded.

    Attributes:
        loads: of a thread for a row.
        decode: from `Code`, the loaded words of a row, the thread's number in its quad, the table's address and the number of a
            quarter block: the eight registers of its four steps, two for each.
        order: int [256], the weight's number in a block for each position.
        table: int32 [n] in shared memory, n a multiple of 128.
    """

    loads: tuple[Load, ...]
    decode: Callable[[Code, Words, Any, Any, int], list[Any]]
    order: np.ndarray
    table: Callable[[], np.ndarray] = lambda: np.zeros(THREADS, np.int32)

    @property
    def words(self) -> int:
        """Registers of a row's loaded words."""
        return sum(max(1, load.bits // 32) for load in self.loads)


def _order(of: Callable[[Any, Any, Any], Any]) -> np.ndarray:
    """The weight at each position: position 16 t + 2 q + (i & 1) + 8 (i >> 1) belongs to step t, thread q and its weight i."""
    position = np.arange(BLOCK)
    step, rest = position // STEP, position % STEP
    return of(step, (rest % 8) // 2, rest % 2 + 2 * (rest // 8))


def _halves(code: Code, values: Sequence[Any]) -> tuple[Any, Any]:
    """High and low bytes of up to four float32 values after rounding to bfloat16."""
    zero = [code.constant(0)] * (4 - len(values))
    a, b, c, d = [*values, *zero]
    first, second = code.narrowed(a, b), code.narrowed(c, d)
    return code.permuted(first, second, 0x7531), code.permuted(first, second, 0x6420)


def _patterns(code: Code, scale: Any, factor: Any, shifted: Sequence[Any], signs: Sequence[Any], table: Any) -> list[Any]:
    """Two patterns of eight weights of three magnitudes.

    Args:
        scale: float16 of the block; factor: the integer of its group in the lowest four bits.
        shifted: of each pattern, four times its number.
        signs: of each pattern, bit 4 i + 2 is set if weight i is negative.
    """
    odd = code.product_plus(code.small_float(factor, 15), 2.0, 1.0)
    step = code.product(code.product(code.half(scale), 0.125), odd)
    high, low = _halves(code, [code.product(step, float(magnitude)) for magnitude in MAGNITUDES])
    negative = code.flipped(high, 0x80808080)
    out = []
    for place, sign in zip(shifted, signs, strict=True):
        selector = code.masked_or(sign, 0x44444444, code.looked_up(table, place))
        for half in (selector, code.shift_right(selector, 16)):
            above, below = code.permuted(high, negative, half), code.permuted(low, low, half)
            out += [code.permuted(below, above, 0x5140), code.permuted(below, above, 0x7362)]
    return out


def _moved(code: Code, a: Any, by: int) -> Any:
    """a shifted to the right by a number of bits that may be negative."""
    return code.shift_right(a, by) if by > 0 else code.shift_left(a, -by)


def _iq2(code: Code, words: Words, q: Any, table: Any, quarter: int) -> list[Any]:
    """A thread owns two index words: 64 neighbouring weights in two groups. A quarter is two patterns of eight."""
    word, index, sign, factors, scale = quarter >> 1, words[0:2], words[2:4], words[4], words[5]
    both = 2 * (quarter & 1), 2 * (quarter & 1) + 1
    factor = code.shift_right(code.shift_right(factors, code.shift_left(q, 3)), 4 * word)
    shifted = [code.masked(_moved(code, index[word], 8 * pattern - 2), 0x3FC) for pattern in both]
    return _patterns(code, scale, factor, shifted, [_moved(code, sign[word], pattern - 2) for pattern in both], table)


def _iq2s(code: Code, words: Words, q: Any, table: Any, quarter: int) -> list[Any]:
    """As `_iq2`. The fourth pattern of a word has two of its bits there and eight in a plane of their own."""
    word, index, rest, sign, factors, scale = quarter >> 1, words[0:2], words[2], words[3:5], words[5], words[6]
    both = 2 * (quarter & 1), 2 * (quarter & 1) + 1
    shifted = [code.masked(_moved(code, index[word], CODE * pattern - 2), 0xFFC) for pattern in both]
    if both[1] == 3:
        upper = code.shift_left(code.masked(code.shift_right(rest, 8 * word), 255), 4)
        shifted[1] = code.masked_or(code.shift_right(index[word], 28), 0xC, upper)
    factor = code.shift_right(factors, 4 * quarter)
    return _patterns(code, scale, factor, shifted, [_moved(code, sign[word], pattern - 2) for pattern in both], table)


# The magnitudes of IQ3_XXS.
_EIGHT = (4, 12, 20, 28, 36, 44, 52, 62)


def _iq3_selectors() -> np.ndarray:
    """The patterns of IQ3_XXS as int32 [256]: four bits per weight, the first in the lowest, with the number of its magnitude."""
    numbers = np.searchsorted(_EIGHT, iq3_xxs.patterns().view(np.int8).reshape(-1, 4))
    return (numbers << np.arange(0, 16, 4)).sum(1).astype(np.int32)


def _iq3(code: Code, words: Words, q: Any, table: Any, quarter: int) -> list[Any]:
    """A thread owns a lane of 64 weights. A quarter is four patterns of four; two quarters share signs and scale."""
    index, sign, factors, scale = words[quarter], words[4 + (quarter >> 1)], words[6], words[7]
    factor = code.shift_right(code.shift_right(factors, code.shift_left(q, 3)), 4 * (quarter >> 1))
    odd = code.product_plus(code.small_float(factor, 15), 2.0, 1.0)
    step = code.product(code.product(code.half(scale), 0.25), odd)
    values = [code.product(step, float(magnitude)) for magnitude in _EIGHT]
    (high_a, low_a), (high_b, low_b) = _halves(code, values[:4]), _halves(code, values[4:])
    out = []
    for pattern in range(4):
        selector = code.looked_up(table, code.masked(_moved(code, index, 8 * pattern - 2), 0x3FC))
        signs = code.shift_left(sign, 4 * (quarter & 1) + pattern)
        above = code.masked_flipped(signs, 0x80808080, code.permuted(high_a, high_b, selector))
        below = code.permuted(low_a, low_b, selector)
        out += [code.permuted(below, above, 0x5140), code.permuted(below, above, 0x7362)]
    return out


def _q2(code: Code, words: Words, q: Any, table: Any, quarter: int) -> list[Any]:
    """A thread owns a lane of 64 weights: four words whose bytes hold a weight of each of four groups."""
    first, (groups, scale, minimum) = quarter >> 1, words[4:7]
    scale, minimum = code.half(scale), code.half(minimum)
    tables = []
    for plane in (first, first + 2):
        factor, offset = code.shift_right(groups, 8 * plane), code.shift_right(groups, 8 * plane + 4)
        step = code.product(scale, code.small_float(factor, 15))
        below = code.flipped(code.product(minimum, code.small_float(offset, 15)), 0x80000000)
        tables.append(_halves(code, [below, *(code.product_plus(step, float(n), below) for n in (1, 2, 3))]))
    (high_a, low_a), (high_b, low_b) = tables
    out = []
    for word in (2 * (quarter & 1), 2 * (quarter & 1) + 1):
        # Even nibbles are weights of the first plane, odd ones of the second, which is selected by the third bit.
        selector = code.masked_or(code.shift_right(words[word], 2 * first), 0x33333333, 0x40404040)
        for half in (selector, code.shift_right(selector, 16)):
            above, below = code.permuted(high_a, high_b, half), code.permuted(low_a, low_b, half)
            out += [code.permuted(below, above, 0x6240), code.permuted(below, above, 0x7351)]
    return out


def _q2_weight(t: Any, q: Any, i: Any) -> Any:
    """Step t of a thread's lane: word (t >> 1) & 3, bytes 2 (t & 1) and the next, planes t >> 3 and two further."""
    half, part, plane = q >> 1, q & 1, (t >> 3) + 2 * (i >> 1)
    return 128 * half + 32 * plane + 16 * part + 4 * ((t >> 1) & 3) + 2 * (t & 1) + (i & 1)


def _q4(code: Code, words: Words, q: Any, table: Any, quarter: int) -> list[Any]:
    """A thread owns a lane of 64 weights in two groups, in the low and in the high halves of its bytes."""
    groups, scale, minimum = words[8], code.half(words[9]), code.half(words[10])
    out, numbers = [], []
    for group in range(2):
        factor, offset = (code.small_float(code.shift_right(groups, 8 * i), 63) for i in (group, group + 2))
        numbers.append((code.product(scale, factor), code.flipped(code.product(minimum, offset), 0x80000000)))
    for word in (2 * quarter, 2 * quarter + 1):
        for group, (step, below) in enumerate(numbers):
            bytes_ = code.masked(code.shift_right(words[word], 4 * group), 0x0F0F0F0F)
            a, b, c, d = (code.product_plus(code.float_of_byte(bytes_, i), step, below) for i in range(4))
            out += [code.narrowed(a, b), code.narrowed(c, d)]
    return out


# High and low bytes of the bfloat16 magnitudes of E2M1 codes: 0, 0.5, 1, 1.5; 2, 3, 4, 6.
_E2M1_HIGH, _E2M1_LOW = (0x3F3F3F00, 0x40404040), (0xC0800000, 0xC0804000)


def _mx(code: Code, words: Words, q: Any, table: Any, quarter: int) -> list[Any]:
    """A thread owns two blocks of 32 weights, a word of eight codes after another. Powers of two are exact in bfloat16."""
    exponent = code.masked(code.shift_right(words[8], 8 * (quarter >> 1)), 255)
    # The smallest power of two is subnormal.
    power = code.larger(code.shift_left(exponent, 7), 0x40)
    scale = code.permuted(power, power, 0x1010)
    (high_a, high_b), (low_a, low_b) = ([code.constant(half) for half in halves] for halves in (_E2M1_HIGH, _E2M1_LOW))
    out = []
    for word in (words[2 * quarter], words[2 * quarter + 1]):
        codes, signs = code.masked(word, 0x77777777), code.shift_left(word, 4)
        for half in range(2):
            selector = code.shift_right(codes, 16 * half)
            sign = code.permuted(signs, word, 0x7362 if half else 0x5140)
            above = code.masked_flipped(sign, 0x80808080, code.permuted(high_a, high_b, selector))
            below = code.permuted(low_a, low_b, selector)
            out += [code.narrow_product(code.permuted(below, above, order), scale) for order in (0x5140, 0x7362)]
    return out


def _neighbours(t: Any, q: Any, i: Any) -> Any:
    """A thread's 64 weights follow each other."""
    return 64 * q + 4 * t + i


DECODERS: dict[type[Quantized], Decoder] = {
    IQ2_XXS: Decoder(
        (Load(0, 64, 32, 8), Load(1, 64, 32, 8), Load(2, 32, 4, 0), Load(3, 16, 2, 0)),
        _iq2, _order(_neighbours), selectors,
    ),
    IQ2_S: Decoder(
        (Load(0, 64, 32, 8), Load(1, 16, 8, 2), Load(2, 64, 32, 8), Load(3, 16, 8, 2), Load(4, 16, 2, 0)),
        _iq2s, _order(_neighbours), iq2_s.selectors,
    ),
    IQ3_XXS: Decoder(
        (Load(0, 128, 64, 16), Load(1, 32, 16, 4), Load(1, 32, 16, 4, part=1), Load(2, 32, 4, 0), Load(3, 16, 2, 0)),
        _iq3, _order(_neighbours), _iq3_selectors,
    ),
    Q2_K: Decoder((Load(0, 128, 64, 16), Load(1, 32, 16, 4), Load(2, 16, 2, 0), Load(3, 16, 2, 0)), _q2, _order(_q2_weight)),
    Q4_K: Decoder(
        (Load(0, 128, 64, 16), Load(0, 128, 64, 16, part=1), Load(1, 32, 16, 4), Load(2, 16, 2, 0), Load(3, 16, 2, 0)),
        _q4, _order(lambda t, q, i: 64 * q + 32 * (t & 1) + 16 * (t >> 3) + 4 * ((t >> 1) & 3) + i),
    ),
    MXFP4: Decoder(
        (Load(0, 256, 128, 32), Load(1, 16, 8, 2)),
        _mx, _order(lambda t, q, i: 64 * q + 32 * (t >> 3) + 16 * (t & 1) + 4 * ((t >> 1) & 3) + i),
    ),
}  # fmt: skip

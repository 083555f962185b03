"""The instructions of `thread_code` in NumPy, and the weights that a warpgroup decodes with them."""

from __future__ import annotations

import jax
import ml_dtypes
import numpy as np

from pallas_kernels.core.thread_code import Code
from pallas_kernels.experts.fragments import BLOCK, DECODERS, QUAD, STEPS, Decoder
from pallas_kernels.formats import Quantized


class Emulated(Code):
    """The instructions of `Code` on uint32 arrays, one element for a row."""

    def __init__(self) -> None:
        pass

    def constant(self, value):
        return np.uint32(value & 0xFFFFFFFF)

    def shift_left(self, a, by):
        return (a << np.uint32(by)).astype(np.uint32)

    def shift_right(self, a, by):
        return (a >> np.uint32(by)).astype(np.uint32)

    def masked(self, a, mask):
        return a & self.constant(mask)

    def masked_or(self, a, mask, b):
        return (a & self.constant(mask)) | (self.constant(b) if isinstance(b, int) else b)

    def flipped(self, a, mask):
        return a ^ self.constant(mask)

    def permuted(self, a, b, selector):
        a, b, selector = np.broadcast_arrays(a, b, np.asarray(selector, np.uint32))
        source = np.stack([a, b], -1).astype("<u4").view(np.uint8)
        nibbles = (selector[..., None] >> np.arange(0, 16, 4, dtype=np.uint32)) & 15
        assert (nibbles < 8).all()
        return np.ascontiguousarray(np.take_along_axis(source, nibbles.astype(np.int64), -1)).view("<u4")[..., 0]

    def small_float(self, a, mask):
        return (a & np.uint32(mask)).astype(np.float32).view(np.uint32)

    def float_of_byte(self, a, i):
        return self.small_float(a >> np.uint32(8 * i), 255)

    def half(self, a):
        return a.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)

    def product(self, a, b):
        return (as_f32(a) * (np.float32(b) if isinstance(b, float) else as_f32(b))).view(np.uint32)

    def product_plus(self, a, b, c):
        b, c = (np.float32(x) if isinstance(x, float) else as_f32(x) for x in (b, c))
        return (as_f32(a).astype(np.float64) * b + c.astype(np.float64)).astype(np.float32).view(np.uint32)

    def narrow_product(self, a, b):
        a, b = (np.stack([x & np.uint32(0xFFFF), x >> np.uint32(16)]).astype(np.uint16).view(ml_dtypes.bfloat16) for x in (a, b))
        low, high = (a.astype(np.float32) * b.astype(np.float32)).astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint32)
        return low | (high << np.uint32(16))

    def masked_flipped(self, a, mask, b):
        return (a & self.constant(mask)) ^ b

    def larger(self, a, b):
        return np.maximum(a, self.constant(b))

    def looked_up(self, table, offset):
        return table[offset >> 2]

    def narrowed(self, low, high):
        low, high = (as_f32(x).astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint32) for x in (low, high))
        return low | (high << np.uint32(16))


def as_f32(bits):
    return np.asarray(bits, np.uint32).view(np.float32)


def loaded(weight: Quantized, decoder: Decoder, block: int, q: int) -> list[np.ndarray]:
    """The words that thread q loads of every row of a matrix [N, K]."""
    words, planes = [], jax.tree.leaves(weight)
    for load in decoder.loads:
        raw = np.asarray(planes[load.plane]).view(np.uint8).reshape(-1, weight.shape[0], load.block * (weight.shape[1] // BLOCK))
        first = block * load.block + q * load.thread
        some = np.ascontiguousarray(raw[load.part, :, first : first + load.bits // 8])
        words += [word.astype(np.uint32) for word in some.view("<u2" if load.bits == 16 else "<u4").T]
    return words


def decoded(weight: Quantized) -> np.ndarray:
    """A matrix [N, K] as the threads decode it, bfloat16 bits [N, K/256, 256] in the order of positions."""
    decoder, code, (n, k) = DECODERS[type(weight)], Emulated(), weight.shape
    found = np.zeros((n, k // BLOCK, BLOCK), np.uint16)
    for block in range(k // BLOCK):
        for q in range(QUAD):
            words = loaded(weight, decoder, block, q)
            table = decoder.table().view(np.uint32)
            pairs = [pair for quarter in range(4) for pair in decoder.decode(code, words, np.uint32(q), table, quarter)]
            assert len(pairs) == 2 * STEPS
            for i, pair in enumerate(pairs):
                for half in range(2):
                    found[:, block, 16 * (i // 2) + 8 * (i % 2) + 2 * q + half] = pair >> np.uint32(16 * half)
    return found

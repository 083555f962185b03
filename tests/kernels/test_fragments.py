"""The decoders of wgmma's left operand, with an emulation of their instructions in NumPy."""

from __future__ import annotations

import jax
import ml_dtypes
import numpy as np
import pytest
from quantized import as_float, random_blocks

from pallas_kernels.core.thread_code import Code
from pallas_kernels.experts.fragments import BLOCK, DECODERS, QUAD, STEPS

N, K = 24, 512


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
        a, b = np.broadcast_arrays(a, b)
        source = np.stack([a, b], -1).astype("<u4").view(np.uint8)
        nibbles = (np.asarray(selector, np.uint32)[..., None] >> np.arange(0, 16, 4, dtype=np.uint32)) & 15
        assert (nibbles < 8).all()
        nibbles = np.broadcast_to(nibbles, (*a.shape, 4)).astype(np.int64)
        return np.ascontiguousarray(np.take_along_axis(source, nibbles, -1)).view("<u4")[..., 0]

    def nibble(self, a):
        return (a & np.uint32(15)).astype(np.float32).view(np.uint32)

    def half(self, a):
        return a.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)

    def product(self, a, b):
        return (as_f32(a) * (np.float32(b) if isinstance(b, float) else as_f32(b))).view(np.uint32)

    def product_plus(self, a, b, c):
        exact = as_f32(a).astype(np.float64) * b + (c if isinstance(c, float) else as_f32(c).astype(np.float64))
        return exact.astype(np.float32).view(np.uint32)

    def looked_up(self, table, offset):
        return table[offset >> 2]

    def narrowed(self, low, high):
        low, high = (as_f32(x).astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint32) for x in (low, high))
        return low | (high << np.uint32(16))


def as_f32(bits):
    return np.asarray(bits, np.uint32).view(np.float32)


def loaded(weight, decoder, block: int, q: int) -> list[np.ndarray]:
    """The words that thread q loads of every row."""
    words = []
    for plane, load in zip(jax.tree.leaves(weight), decoder.loads, strict=True):
        raw = np.asarray(plane).reshape(N, -1).view(np.uint8)
        first = block * load.block + q * load.thread
        if load.bits == 16:
            words.append(np.ascontiguousarray(raw[:, first : first + 2]).view("<u2")[:, 0].astype(np.uint32))
        else:
            some = np.ascontiguousarray(raw[:, first : first + load.bits // 8]).view("<u4")
            words += list(some.T)
    return words


@pytest.mark.parametrize("format", DECODERS, ids=lambda format: format.__name__)
def test_a_quad_decodes_every_weight_with_one_rounding(format):
    weight, decoder = format.from_bytes(random_blocks(format, (N, K), 1, least=-7, most=0)), DECODERS[format]
    wanted = np.asarray(as_float(weight, "bfloat16")).view(np.uint16).reshape(N, K // BLOCK, BLOCK)[..., decoder.order]
    assert sorted(decoder.order) == list(range(BLOCK))
    table = decoder.table.view(np.uint32)
    found, code = np.zeros_like(wanted), Emulated()
    for block in range(K // BLOCK):
        for q in range(QUAD):
            words = loaded(weight, decoder, block, q)
            pairs = [pair for quarter in range(4) for pair in decoder.decode(code, words, np.uint32(q), table, quarter)]
            assert len(pairs) == 2 * STEPS
            for i, pair in enumerate(pairs):
                for half in range(2):
                    found[:, block, 16 * (i // 2) + 8 * (i % 2) + 2 * q + half] = pair >> np.uint32(16 * half)
    zero = (found & 0x7FFF) == 0
    assert ((found == wanted) | (zero & ((wanted & 0x7FFF) == 0))).all()

"""Exact values of the storage types in published checkpoints: E4M3 with block scales, packed E2M1, bfloat16.

Source: the `.weight` / `.scale` pairs of the V4-Flash checkpoint; OCP Microscaling Formats (MX) Specification 1.0 for the codes.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.mxfp4 import E2M1

FP8_BLOCK = 128
FP4_GROUP = 32

# float32 holds every product of a code and a power of two down to the smallest, 2^-127 · 2^-9. The last scale code is NaN.
POWERS = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32(np.nan)).astype(np.float32)
E4M3 = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float32)
E2M1_PAIRS = np.stack([np.tile(E2M1, 16), np.repeat(E2M1, 16)], axis=-1)


def fp8_scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of an E4M3 matrix: one for every 128×128 block, the last ones cut short."""
    return tuple(-(-size // FP8_BLOCK) for size in shape)


def from_fp8(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """E4M3 codes uint8 [N, K] and E8M0 scales uint8 [ceil(N/128), ceil(K/128)] → float32 [N, K]."""
    values = E4M3[codes]
    factors = POWERS[scales]
    for block in range(len(scales)):
        rows = slice(block * FP8_BLOCK, (block + 1) * FP8_BLOCK)
        values[rows] *= np.repeat(factors[block], FP8_BLOCK)[: values.shape[1]]
    return values


def from_fp4(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """E2M1 codes uint8 [N, K/2], the even column in the low half, and E8M0 scales uint8 [N, K/32] → float32 [N, K]."""
    rows = len(codes)
    values = E2M1_PAIRS[codes].reshape(rows, -1, FP4_GROUP)
    values *= POWERS[scales][..., None]
    return values.reshape(rows, -1)


def from_mxfp4(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `to_mxfp4`: codes uint8 [N, K/2] and scales uint8 [N, K/32] from rows uint8 [N, 17·K/32]."""
    parts = blocks.reshape(len(blocks), -1, 1 + FP4_GROUP // 2)
    low, high = parts[..., 1:] & 15, parts[..., 1:] >> 4
    # The first half of a block's codes is low, the second high; neighbours make a byte.
    codes = np.concatenate([low[..., ::2] | (low[..., 1::2] << 4), high[..., ::2] | (high[..., 1::2] << 4)], axis=-1)
    return codes.reshape(len(blocks), -1), np.ascontiguousarray(parts[..., 0])


def from_bf16(raw: np.ndarray) -> np.ndarray:
    """bfloat16 as bits, uint16 [...] → float32 [...]."""
    return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_mxfp4(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The same matrix in blocks as a GGUF file stores MXFP4: uint8 [N, 17·K/32] of the arguments of `from_fp4`.

    Nothing is computed: both formats have a power of two for every 32 codes. The file pairs code j of a block with code j + 16,
    the checkpoint code 2j with code 2j + 1.
    """
    rows, groups = scales.shape
    pairs = codes.reshape(rows, groups, FP4_GROUP // 2)
    first, second = pairs[..., : FP4_GROUP // 4], pairs[..., FP4_GROUP // 4 :]
    blocks = np.empty((rows, groups, 1 + FP4_GROUP // 2), np.uint8)
    blocks[..., 0] = scales
    blocks[..., 1::2] = (first & 15) | (second << 4)
    blocks[..., 2::2] = (first >> 4) | (second & 0xF0)
    return blocks.reshape(rows, -1)

"""IQ2_XXS: groups of eight weights from a codebook of 256 patterns, with signs and a four-bit scale for every 32 weights."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats import signs
from pallas_kernels.formats.base import Quantized, Terms, as_bytes, halves, words

# Each pattern has eight digits of two bits, the first weight in the lowest: 0, 1, 2 for magnitudes 8, 25, 43.
_PATTERNS = """
    0000 0002 0005 0008 000a 0011 0014 0020 0022 0028 002a 0041 0044 0050 0058 0061
    0064 0080 0082 008a 00a2 0101 0104 0110 0115 0140 0184 0198 0200 0202 0222 0282
    0401 0404 0410 0421 0424 0440 0442 0448 0460 0481 0484 0490 04a4 0500 0502 0508
    0520 0546 0569 0580 0591 0609 0610 0640 0684 06a4 0800 0805 0808 0814 0828 0841
    0844 0850 0852 0888 0904 0940 0a02 0a14 1001 1004 1010 1021 1040 1060 1084 1090
    1095 1100 1108 1120 1150 115a 1180 1224 1245 1400 1408 1420 1425 1449 1480 1518
    1562 1600 1616 1801 1804 1810 1840 1881 1900 1905 19a0 1a51 2000 2002 200a 2044
    2061 2080 2082 2129 2148 2200 2202 2401 2404 2410 2440 2456 2500 2541 2564 2690
    2808 2820 2894 2a44 4001 4004 4010 4018 4021 4024 4040 4048 4056 4060 4081 4084
    4090 4100 4120 4161 4180 4185 4201 4210 4248 4256 4268 4400 4408 4420 4480 4499
    4512 4524 4600 4801 4804 4810 4840 4845 4900 4958 4961 4982 4a45 4a90 5000 5008
    5011 5019 5020 5080 5088 5104 5142 51a4 5291 5490 5492 550a 5601 5654 5800 5811
    5819 5864 5940 5a08 6004 6010 6040 6068 6100 6155 6218 6260 6400 6405 6510 6512
    6584 6842 8000 8002 800a 8041 8082 8104 8118 8140 8211 8401 8404 8410 8415 8440
    8460 8500 8546 8594 8609 8640 8660 8802 8904 8a11 9004 9010 9024 9040 90a1 9116
    9180 9245 9400 9422 9444 9551 9881 9920 a002 a050 a085 a109 a200 a418 a850 a904
"""
MAGNITUDES = np.array([8, 25, 43], np.int8)
# Bit positions in a sign word of the signs of each group of eight weights.
SIGN_PLACES = np.arange(4, dtype=np.int32)[:, None] + np.arange(0, 32, 4, dtype=np.int32)


def _grid() -> np.ndarray:
    patterns = np.array([int(pattern, 16) for pattern in _PATTERNS.split()], np.int32)
    return MAGNITUDES[(patterns[:, None] >> np.arange(0, 16, 2)) & 3]


# Magnitudes of the patterns, int8 [256, 8].
GRID = _grid()


def selectors(grid: np.ndarray = GRID) -> np.ndarray:
    """Patterns [n, 8] as int32 [n]: four bits per weight, the first weight in the lowest, with the number of its magnitude."""
    return (
        (np.searchsorted(MAGNITUDES, grid).astype(np.uint32) << np.arange(0, 32, 4, dtype=np.uint32))
        .sum(1, dtype=np.uint32)
        .view(np.int32)
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IQ2_XXS(Quantized):
    """A weight [..., N, K] in two bits: w = scale · (2 · factor + 1) / 8 · sign · magnitude.

    Device layout: a lane owns 128 weights, 16 bytes of pattern indices and 16 of signs, each contiguous over the lanes. Word j
    of a lane serves weights 32j .. 32j+31: byte i of its index word is the pattern of weights 8i .. 8i+7, and
    (signs >> i) & 0x11111111 holds their signs, four bits apart as in `selectors`. Bits 4j .. 4j+3 of the lane's factors belong
    to word j. The file has seven of eight signs, the last follows from parity. Here all are stored: 70 bytes instead of 66.

    Attributes:
        indices, signs: int32 [..., N, K/128, 4].
        factors: uint16 [..., N, K/128].
        scales: float16 [..., N, K/256].

    Source: GGUF block layout IQ2_XXS (ggml-common.h, `block_iq2_xxs` and its tables).
    """

    BLOCK = 256
    BLOCK_BYTES = 66
    DEVICE_BYTES = 70
    FLOAT16 = (0,)

    indices: jax.Array
    signs: jax.Array
    factors: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [..., N, K] of the weight."""
        *lead, n, blocks = self.scales.shape
        return (*lead, n, blocks * self.BLOCK)

    @classmethod
    def split(cls, blocks: jax.Array) -> IQ2_XXS:
        """Convert blocks of a file to planes."""
        lead = blocks.shape[:-2]
        # Slicing bytes before they become words lets the compiler copy each plane once.
        pairs = blocks[..., 2:].reshape(*lead, -1, 4, 8)
        indices = words(pairs[..., :4])[..., 0]
        packed = jax.lax.bitcast_convert_type(words(pairs[..., 4:])[..., 0], jnp.uint32)
        shifts = jnp.arange(0, 16, 4, dtype=jnp.uint32)
        factors = jnp.sum((packed >> 28) << shifts, axis=-1, dtype=jnp.uint32).astype(jnp.uint16)
        return cls(indices, signs.spread(signs.with_parity(packed), SIGN_PLACES), factors, halves(blocks[..., :2])[..., 0])

    def join(self) -> jax.Array:
        """The inverse of `split`."""
        packed = signs.without_parity(signs.gather(self.signs, SIGN_PLACES)) | (self._factors().astype(jnp.uint32) << 28)
        pairs = jnp.stack([self.indices, jax.lax.bitcast_convert_type(packed, jnp.int32)], axis=-1)
        rest = as_bytes(pairs.reshape(*self.scales.shape, 16))
        return jnp.concatenate([as_bytes(self.scales[..., None]), rest], axis=-1)

    def _factors(self) -> jax.Array:
        """The four-bit scale of every 32 weights, int32 [..., N, K/128, 4]."""
        return (self.factors[..., None].astype(jnp.int32) >> jnp.arange(0, 16, 4, dtype=jnp.int32)) & 15

    def terms(self) -> Terms:
        """Integers and scales, in the order of K."""
        lead = (*self.scales.shape, 8)
        patterns = as_bytes(self.indices[..., None]).reshape(*lead, 4).astype(jnp.int32)
        magnitudes = jnp.asarray(GRID)[patterns]
        negative = (self.signs.reshape(*lead, 1, 1) >> SIGN_PLACES) & 1
        values = jnp.where(negative == 1, -magnitudes, magnitudes).reshape(*lead, 32)
        return Terms(values, self.scales.astype(jnp.float32) * 0.125, 2 * self._factors().reshape(lead) + 1)

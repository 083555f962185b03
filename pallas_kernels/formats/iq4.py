"""IQ4_NL and IQ4_XS: four bits that choose one of 16 unevenly spaced values."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.base import Terms
from pallas_kernels.formats.stored import Stored, fields, planes

# The value of each code.
VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)


def _values(raw: jax.Array) -> jax.Array:
    """Values of 16 bytes [..., 16], int8 [..., 32]: of the low halves of the bytes, then of the high halves."""
    return jnp.asarray(VALUES)[planes(raw, 4, 2).astype(jnp.int32)].reshape(*raw.shape[:-1], 32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IQ4_NL(Stored):
    """A weight [..., N, K] in four bits, blocks of 32: w = scale · value.

    Source: GGUF block layout IQ4_NL (ggml-common.h, `block_iq4_nl` and its values).
    """

    BLOCK = 32
    BLOCK_BYTES = 18
    DEVICE_BYTES = 18
    FLOAT16 = (0,)

    def terms(self) -> Terms:
        """Integers and scales, in the order of K."""
        return Terms(_values(self.blocks[..., None, 2:]), self.number(0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IQ4_XS(Stored):
    """A weight [..., N, K] in four bits, blocks of 256: w = scale · factor · value, factor from −32 to 31 for every 32.

    Source: GGUF block layout IQ4_XS (ggml-common.h, `block_iq4_xs`).
    """

    BLOCK = 256
    BLOCK_BYTES = 136
    DEVICE_BYTES = 136
    FLOAT16 = (0,)

    def terms(self) -> Terms:
        """Integers and scales, in the order of K."""
        lead = self.blocks.shape[:-1]
        # Two bits of each factor are in the first two bytes after the scale and four in the next four.
        large = fields(self.blocks[..., 2:4], 2, 4).reshape(*lead, 8)
        small = fields(self.blocks[..., 4:8], 4, 2).reshape(*lead, 8)
        factors = (small | (large << 4)).astype(jnp.int32) - 32
        return Terms(_values(self.blocks[..., 8:].reshape(*lead, 8, 16)), self.number(0), factors)

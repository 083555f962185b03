"""What all quantised formats have in common, whatever planes they lie in."""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Terms:
    """A weight [..., N, K] taken apart: w = scale · factor · value − minimum · offset.

    A row has B blocks, a block g groups and a group w values, in the order of K. Both products are exact in float32, so that a
    weight needs one rounding at most.

    Attributes:
        values: int8 [..., N, B, g, w].
        scale: float32 [..., N, B].
        factor: int32 [..., N, B, g]; None stands for 1.
        minimum, offset: float32 [..., N, B] and int32 [..., N, B, g]; None where the format has none.
    """

    values: jax.Array
    scale: jax.Array
    factor: jax.Array | None = None
    minimum: jax.Array | None = None
    offset: jax.Array | None = None


class Quantized(abc.ABC):
    """A weight [..., N, K] of blocks along K; subclasses are frozen dataclasses of their planes, registered as pytrees.

    Attributes:
        BLOCK: values in a block.
        BLOCK_BYTES, DEVICE_BYTES: bytes of a block in a file and on the device.
        FLOAT16: where in a block of a file its float16 numbers begin.
    """

    BLOCK: ClassVar[int]
    BLOCK_BYTES: ClassVar[int]
    DEVICE_BYTES: ClassVar[int]
    FLOAT16: ClassVar[tuple[int, ...]]

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape [..., N, K] of the weight."""

    @abc.abstractmethod
    def terms(self) -> Terms:
        """Integers and scales, in the order of K."""

    @classmethod
    @abc.abstractmethod
    def split(cls, blocks: jax.Array) -> Self:
        """Blocks as a file stores them, uint8 [..., N, B, BLOCK_BYTES], to planes; bit operations that any device can run."""

    @abc.abstractmethod
    def join(self) -> jax.Array:
        """The inverse of `split`."""

    @classmethod
    def broken(cls, blocks: np.ndarray) -> np.ndarray:
        """Which blocks of a file, uint8 [n, BLOCK_BYTES], have a scale that is not finite: bool [n]."""
        # The exponent of a little-endian float16, all ones for infinities and NaN.
        return np.any([(blocks[:, first + 1] & 0x7C) == 0x7C for first in cls.FLOAT16], axis=0)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(plane.nbytes for plane in jax.tree.leaves(self))

    @classmethod
    def from_bytes(cls, raw: np.ndarray | jax.Array) -> Self:
        """Take rows as a GGUF file stores them, uint8 [..., N, bytes of a row]: put on the device as they are and split there."""
        return _split(cls, raw)

    def to_bytes(self) -> np.ndarray:
        """Rows as a GGUF file stores them: uint8 [..., N, bytes of a row]."""
        blocks = np.asarray(_join(self))
        return blocks.reshape(*blocks.shape[:-2], -1)

    def dequantize(self, dtype: jnp.dtype = jnp.float32) -> jax.Array:
        """The weight [..., N, K]; in float32 with the bits of ggml's own dequantisation."""
        terms = self.terms()
        step = terms.scale[..., None] * (1.0 if terms.factor is None else terms.factor.astype(jnp.float32))
        weight = step[..., None] * terms.values.astype(jnp.float32)
        if terms.minimum is not None and terms.offset is not None:
            weight -= (terms.minimum[..., None] * terms.offset.astype(jnp.float32))[..., None]
        return weight.reshape(self.shape).astype(dtype)

    def take(self, index: jax.Array) -> Self:
        """The matrices at `index` of the leading axis of a stack [E, N, K]: experts."""
        return jax.tree.map(lambda plane: plane[index], self)


@functools.partial(jax.jit, static_argnums=0)
def _split(cls: type[Quantized], raw: jax.Array) -> Quantized:
    return cls.split(raw.reshape(*raw.shape[:-1], -1, cls.BLOCK_BYTES))


@jax.jit
def _join(weight: Quantized) -> jax.Array:
    return weight.join()


def words(raw: jax.Array) -> jax.Array:
    """uint8 [..., 4n] → int32 [..., n], lowest byte first."""
    return jax.lax.bitcast_convert_type(raw.reshape(*raw.shape[:-1], -1, 4), jnp.int32)


def halves(raw: jax.Array) -> jax.Array:
    """uint8 [..., 2n] → float16 [..., n]."""
    return jax.lax.bitcast_convert_type(raw.reshape(*raw.shape[:-1], -1, 2), jnp.float16)


def as_bytes(plane: jax.Array) -> jax.Array:
    """Any [..., n] → its bytes, uint8 [..., n · size]."""
    raw = jax.lax.bitcast_convert_type(plane, jnp.uint8)
    return raw.reshape(*plane.shape[:-1], -1)

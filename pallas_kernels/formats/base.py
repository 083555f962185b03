"""The base class of the quantised formats, and conversions of bytes."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Terms:
    """Integers and scales of a weight [..., N, K]: w = scale · factor · value − minimum · offset.

    A row has B blocks, a block g groups and a group w values, in the order of K. Both products are exact in float32, so a weight
    is rounded at most once.

    Attributes:
        values: int8 [..., N, B, g, w].
        scale: float32 [..., N, B].
        factor: int32 [..., N, B, g]; None stands for 1.
        minimum, offset: float32 [..., N, B] and int32 [..., N, B, g]; None if the format has none. The offset is −1 where a
            format adds its minimum.
    """

    values: jax.Array
    scale: jax.Array
    factor: jax.Array | None = None
    minimum: jax.Array | None = None
    offset: jax.Array | None = None

    def grouped(self, groups: int) -> Terms:
        """The terms of a weight [C·N, K] as those of C = `groups` groups of rows, [C, N, K]."""
        numbers = (None if x is None else x.reshape(groups, -1, *x.shape[1:]) for x in vars(self).values())
        return Terms(*numbers)  # type: ignore[arg-type]


class Quantized(abc.ABC):
    """A weight [..., N, K] of blocks along K. Subclasses are frozen dataclasses of planes, registered as pytrees.

    Attributes:
        BLOCK: values in a block.
        BLOCK_BYTES, DEVICE_BYTES: bytes of a block in a file and on the device.
        FLOAT16: offsets in bytes of the float16 numbers in a block of a file.
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
        """Convert blocks of a file, uint8 [..., N, B, BLOCK_BYTES], to planes, with bit operations that run on any device."""

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
        """Convert rows of a GGUF file, uint8 [..., N, bytes of a row]. They are split into planes on the device."""
        return _split(cls, raw)

    def to_bytes(self) -> np.ndarray:
        """The rows of a GGUF file: uint8 [..., N, bytes of a row]."""
        blocks = np.asarray(_join(self))
        return blocks.reshape(*blocks.shape[:-2], -1)

    def dequantize(self, dtype: jnp.dtype = jnp.float32) -> jax.Array:
        """The weight [..., N, K]. In float32 it has the same bits as ggml's dequantisation."""
        terms = self.terms()
        step = terms.scale[..., None] * (1.0 if terms.factor is None else terms.factor.astype(jnp.float32))
        weight = step[..., None] * terms.values.astype(jnp.float32)
        if terms.minimum is not None and terms.offset is not None:
            weight -= (terms.minimum[..., None] * terms.offset.astype(jnp.float32))[..., None]
        return weight.reshape(self.shape).astype(dtype)

    def take(self, index: jax.Array) -> Self:
        """Weights at `index` of the leading axis: matrices of a stack [E, N, K], or rows of a matrix [N, K]."""
        if len(self.shape) > 2:
            return jax.tree.map(lambda plane: plane[index], self)
        return self.change_rows(lambda plane, axis: plane[(*axis * (slice(None),), index)])

    def in_tiles(self, count: int) -> Self:
        """The rows of a matrix [N, K] as a stack [count, N/count, K]; N is a multiple of `count`."""

        def cut(plane: jax.Array, axis: int) -> jax.Array:
            shape = plane.shape
            return jnp.moveaxis(plane.reshape(*shape[:axis], count, shape[axis] // count, *shape[axis + 1 :]), axis, 0)

        return self.change_rows(cut)

    def change_rows(self, change: Callable[[jax.Array, int], jax.Array]) -> Self:
        """The matrix with every plane changed; `change` takes a plane and its axis of rows."""
        planes, tree = jax.tree.flatten(self)
        changed = [change(plane, plane.ndim + axis) for plane, axis in zip(planes, row_axes(type(self)), strict=True)]
        made: Self = jax.tree.unflatten(tree, changed)
        return made


@functools.cache
def row_axes(cls: type[Quantized]) -> tuple[int, ...]:
    """For each plane of a format its axis of rows, from the end: the axis whose length `split` takes from the number of rows."""
    few, many = (
        jax.tree.leaves(jax.eval_shape(cls.split, jax.ShapeDtypeStruct((rows, 1, cls.BLOCK_BYTES), jnp.uint8))) for rows in (1, 2)
    )
    return tuple(
        next(i - a.ndim for i, (one, two) in enumerate(zip(a.shape, b.shape, strict=True)) if one != two)
        for a, b in zip(few, many, strict=True)
    )


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
    """The bytes of an array [..., n] of any type: uint8 [..., n · size]."""
    raw = jax.lax.bitcast_convert_type(plane, jnp.uint8)
    return raw.reshape(*plane.shape[:-1], -1)

"""What a lane format is: how a lane loads and multiplies its part of a weight row.

A lane owns the weights in 16 or 32 bytes of a row. It multiplies them by activations in the same order and adds the product of
the integers and the scales to its accumulator. Source of the arithmetic: gguf.md §6.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels.core import arithmetic, loads
from pallas_kernels.core.arithmetic import LANES
from pallas_kernels.linear.activation_k import K_BLOCK

Loaded = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Place:
    """The part of a row that 32 lanes read.

    Attributes:
        index: of the row.
        first: the first lane column.
        real: which columns exist, bool [32]; None if all do.
        once: whether no other program reads the same part.
    """

    index: tuple[Any, ...]
    first: jax.Array
    real: jax.Array | None
    once: bool = True

    @property
    def span(self) -> Any:
        """The columns of the lanes."""
        return pl.ds(self.first, LANES)

    def block(self, lanes_a_block: int) -> jax.Array:
        """The block of each lane, int32 [32]."""
        return (self.first + loads.numbers()) // lanes_a_block


class Format(abc.ABC):
    """How a lane loads and multiplies one format.

    Attributes:
        width: weights of a lane.
    """

    width: ClassVar[int]

    def __init__(self, interpret: bool):
        self.interpret = interpret

    @abc.abstractmethod
    def weights(self, refs: Any, place: Place) -> Loaded:
        """Load a lane's part of one weight row."""

    @classmethod
    def codebook(cls) -> np.ndarray:
        """What `apply_codebook` looks values up in, int32; a single 0 for formats that have no codebook."""
        return np.zeros(1, np.int32)

    def apply_codebook(self, w: Loaded, table: Any) -> Loaded:
        """Add the codebook's values to a loaded lane; a format without one returns it as it is."""
        return w

    @abc.abstractmethod
    def activations(self, refs: Any, place: Place) -> Loaded:
        """Load a lane's part of one row of activations."""

    @abc.abstractmethod
    def add(self, w: Loaded, x: Loaded, acc: jax.Array) -> jax.Array:
        """Add the product to the accumulator, float32 [32]."""

    def dot(self, words: Sequence[jax.Array], x: Sequence[jax.Array], *, unsigned: bool = False) -> jax.Array:
        """Dot products of int8 words, or of bytes without a sign, with the activations' words, summed over the pairs."""
        total = jnp.zeros_like(words[0])
        for word, part in zip(words, x, strict=True):
            total = arithmetic.dp4a(word, part, total, unsigned=unsigned, interpret=self.interpret)
        return total

    def fma(self, integers: jax.Array, scale: jax.Array, acc: jax.Array) -> jax.Array:
        """acc + integers · scale, rounded once on the GPU."""
        return arithmetic.fma(integers.astype(jnp.float32), scale, acc, interpret=self.interpret)

    def times(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """a · b in float32."""
        return arithmetic.multiply(a.astype(jnp.float32), b, interpret=self.interpret)


def once(ref: Any, place: Place, *index: Any, width: int = 1) -> jax.Array:
    """Load a weight."""
    return loads.load(ref, *place.index, *index, real=place.real, width=width, once=place.once)


def half_once(ref: Any, place: Place, half: int, *index: Any, width: int = 1) -> jax.Array:
    """As `once`, from one of two planes that each matrix has in front of its rows."""
    matrix, row = place.index
    return loads.load(ref, matrix, half, row, place.span, *index, real=place.real, width=width, once=place.once)


def columns() -> jax.Array:
    """The number of each word of a lane, int32 [32, 4]."""
    return jax.lax.broadcasted_iota(jnp.int32, (LANES, 4), 1)


def between(words: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Words 0 and 1 of a lane from the first of two numbers of it and words 2 and 3 from the second: [32] each → [32, 4]."""
    return jnp.where(columns() < 2, words[0][:, None], words[1][:, None])


def moved(words: jax.Array, left: int) -> jax.Array:
    """Words shifted to the left, or by a negative number to the right."""
    return words << left if left >= 0 else words >> -left


class KFormat(Format):
    """Formats that need activations in blocks of 256."""

    planes: ClassVar[int]
    sums: ClassVar[bool]

    def activations(self, refs: Any, place: Place) -> Loaded:
        quants, scales, sums = refs
        [row] = place.index
        planes = [
            loads.load(quants, row, plane, place.span, slice(None), real=place.real, width=4) for plane in range(self.planes)
        ]
        scale = loads.load(scales, row, place.block(K_BLOCK // self.width), real=place.real)
        totals = [loads.load(sums, row, place.span, slice(None), real=place.real, width=4)] if self.sums else []
        return (*planes, scale, *totals)


class BlockFormat(Format):
    """Formats that need activations in blocks of 32."""

    width = 32

    def activations(self, refs: Any, place: Place) -> Loaded:
        quants, scales = refs
        [row] = place.index
        halves = [loads.load(quants, row, 0, half, place.span, slice(None), real=place.real, width=4) for half in range(2)]
        return (*halves, loads.load(scales, row, 0, place.span, real=place.real))

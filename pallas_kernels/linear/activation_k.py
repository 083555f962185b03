"""Quantises activations to int8 blocks of 256, in the order in which the lanes of one weight format read them.

In the expert formats a lane has 64 or 128 weights that are not contiguous in K. Activations are stored in planes in the same
order. So the words of neighbouring lanes are contiguous, and each plane is one 16-byte load per lane.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.core import arithmetic
from pallas_kernels.formats import IQ2_S, IQ2_XXS, IQ3_XXS, Q2_K, Q4_K, Q5_K, Q6_K, Quantized

K_BLOCK = 256
NAME = "q8_k_activation"


@dataclasses.dataclass(frozen=True)
class Order:
    """Which four values of a block each word of a plane has. The position of the first is Σ step · binary digit.

    Attributes:
        planes: planes of a lane, each of four words.
        lane_steps: steps of the lane's number within a block, for its binary digits from the highest.
        plane_steps: steps of the plane's number.
        word_step: step of the word's number within a plane.
    """

    planes: int
    lane_steps: tuple[int, ...]
    plane_steps: tuple[int, ...]
    word_step: int

    @property
    def lanes(self) -> int:
        """Lanes that share a block."""
        return 1 << len(self.lane_steps)

    def first(self, plane: Any, lane: Any, word: Any) -> Any:
        """Position in the block of a word's first value."""
        return _weigh(plane, self.plane_steps) + _weigh(lane, self.lane_steps) + word * self.word_step


def _weigh(number: Any, steps: tuple[int, ...]) -> Any:
    """Σ step · binary digit, the first step for the highest digit."""
    total = 0 * number
    for place, step in enumerate(reversed(steps)):
        total = total + ((number >> place) & 1) * step
    return total


# Lanes with four sub-blocks of 32, one per word; with four sub-blocks of 16, one per word; with four planes of 16; with two
# planes of twice 16.
_SUB_BLOCKS, _SMALL_SUB_BLOCKS = Order(8, (128,), (16, 8, 4), 32), Order(4, (128, 64), (8, 4), 16)
_PLANES, _PAIRS = Order(4, (128, 16), (64, 32), 4), Order(4, (128, 64), (32, 16), 4)
ORDERS: dict[type[Quantized], Order] = {
    IQ2_XXS: _SUB_BLOCKS,
    IQ2_S: _SUB_BLOCKS,
    IQ3_XXS: _SMALL_SUB_BLOCKS,
    Q2_K: _PLANES,
    Q6_K: _PLANES,
    Q4_K: _PAIRS,
    Q5_K: _PAIRS,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ActivationK:
    """Rows of float32 activations in int8 blocks of 256 along K: x = scale · quant.

    Attributes:
        quants: int32 [M, planes, K/256 · lanes, 4], words in the order of a format.
        scales: float32 [M, K/256], negative if a block's value of the largest magnitude is positive.
        sums: int32 [M, K/256 · lanes, planes], the sum of the 16 quants of each plane of a lane.
    """

    quants: jax.Array
    scales: jax.Array
    sums: jax.Array


def places(order: Order) -> tuple[jax.Array, ...]:
    """Position in the block of each value, and its plane, lane and word: int32 [planes, lanes, 4, 4] each."""
    shape = (order.planes, order.lanes, 4, 4)
    plane, lane, word, byte = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(4))
    return order.first(plane, lane, word) + byte, plane, lane, word


def quantize_block(x: jax.Array, place: jax.Array, *, interpret: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One block float32 [planes, lanes, 4, 4] → words int32 [planes, lanes, 4], its scale and sums int32 [planes, lanes].

    With m the first value of the largest magnitude, quant = round half to even (x · (-127/m)) and scale = 1 / (-127/m). A NaN or
    infinity in a block makes its products NaN.
    Source: gguf.md §6 and ggml's `quantize_row_q8_K`.
    """
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    top = _all_axes(bits, jnp.max)
    # Of equal magnitudes, the first in the order of K determines the sign. It is found by its position.
    first = _all_axes(jnp.where(bits == top, place, K_BLOCK), jnp.min)
    largest = _all_axes(jnp.where(place == first, x, 0.0), jnp.sum)
    inverse = arithmetic.divide(jnp.full_like(largest, -127.0), largest, interpret=interpret)
    inverse = jnp.where(largest == 0.0, 0.0, inverse)
    scaled = arithmetic.multiply(x, jnp.broadcast_to(inverse, x.shape), interpret=interpret)
    quants = jnp.clip(arithmetic.round_to_int(scaled, interpret=interpret), -128, 127)
    scale = jnp.where(largest == 0.0, 0.0, arithmetic.divide(jnp.full_like(inverse, 1.0), inverse, interpret=interpret))
    shifts = jax.lax.broadcasted_iota(jnp.int32, x.shape, 3) * 8
    sums = jnp.sum(jnp.sum(quants, axis=-1), axis=-1)
    return jnp.sum((quants & 255) << shifts, axis=-1), scale, sums


def _all_axes(x: jax.Array, reduce: Callable[..., jax.Array]) -> jax.Array:
    """Reduce [planes, lanes, 4, 4] to a single value [1, 1, 1, 1]."""
    return reduce(x.reshape(-1), axis=0).reshape(1, 1, 1, 1)


def _kernel(x_ref: Any, q_ref: Any, s_ref: Any, sums_ref: Any, *, order: Order, interpret: bool) -> None:
    row, block = pl.program_id(0), pl.program_id(1)
    place = places(order)[0]
    x = plt.load(x_ref.at[row, block * K_BLOCK + place])
    store(quantize_block(x, place, interpret=interpret), row, block, order, q_ref, s_ref, sums_ref)


def store(
    made: tuple[jax.Array, ...], row: jax.Array, block: jax.Array, order: Order, q_ref: Any, s_ref: Any, sums_ref: Any
) -> None:
    """Store the results of `quantize_block` as block number `block` of a row."""
    words, scale, sums = made
    shape = words.shape
    plane, lane, word = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(3))
    lane = block * order.lanes + lane
    plt.store(q_ref.at[row, plane, lane, word], words)
    plt.store(s_ref.at[row, pl.ds(block, 1)], scale.reshape(1))
    plane, lane = (jax.lax.broadcasted_iota(jnp.int32, shape[:2], axis) for axis in range(2))
    plt.store(sums_ref.at[row, block * order.lanes + lane, plane], sums)


def out_shapes(rows: int, k: int, order: Order) -> list[jax.ShapeDtypeStruct]:
    """Shapes of the three arrays of `ActivationK` for M rows of K values."""
    blocks = k // K_BLOCK
    return [
        jax.ShapeDtypeStruct((rows, order.planes, blocks * order.lanes, 4), jnp.int32),
        jax.ShapeDtypeStruct((rows, blocks), jnp.float32),
        jax.ShapeDtypeStruct((rows, blocks * order.lanes, order.planes), jnp.int32),
    ]


@functools.partial(jax.jit, static_argnames=("format", "interpret"))
def quantize_k(x: jax.Array, format: type[Quantized], *, interpret: bool = False) -> ActivationK:
    """Quantise rows float32 [M, K], K a multiple of 256, for products with weights of `format`: one launch."""
    order = ORDERS[format]
    rows, k = x.shape
    kernel = functools.partial(_kernel, order=order, interpret=interpret)
    made = pl.pallas_call(
        kernel,
        out_shape=out_shapes(rows, k, order),
        grid=(rows, k // K_BLOCK),
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name=NAME,
    )(x)
    return ActivationK(*made)


def plain(x: ActivationK, format: type[Quantized]) -> tuple[np.ndarray, np.ndarray]:
    """The quants in the order of K, int8 [M, K], and the scales [M, K/256]; for tests."""
    order = ORDERS[format]
    quants = np.asarray(x.quants)
    rows, blocks = quants.shape[0], quants.shape[2] // order.lanes
    values = np.ascontiguousarray(quants).view(np.int8).reshape(rows, order.planes, blocks, order.lanes, 4, 4)
    out = np.zeros((rows, blocks, K_BLOCK), np.int8)
    plane, lane, word, byte = np.indices((order.planes, order.lanes, 4, 4))
    out[:, :, order.first(plane, lane, word) + byte] = np.moveaxis(values, 2, 1)
    return out.reshape(rows, -1), np.asarray(x.scales)

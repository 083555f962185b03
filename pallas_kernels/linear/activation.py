"""Quantises float32 activations to int8 blocks of 32, in the layout that the weight kernels read."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.core import arithmetic
from pallas_kernels.formats import BLOCK, HALF, WORDS

# Blocks of 32 values that a program quantises.
BLOCKS_A_PROGRAM = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Activation:
    """Rows of float32 activations in int8 blocks of 32 along K: x = scale · quant.

    Attributes:
        quants: int32 [M, C, 2, K/32, 4], words in halves as in `Q8_0`. C is the number of groups, 1 without groups.
        scales: float32 [M, C, K/32].
    """

    quants: jax.Array
    scales: jax.Array


def quantize_blocks(x: jax.Array, *, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """Blocks float32 [..., 8, 4] → words int32 [..., 8] and scales float32 [...].

    d = amax / 127, quant = round half to even (x · (1/d)). A NaN or infinity makes its block's scale NaN or infinite.
    Source: gguf.md §6 and `quantize_q8_0` of ds4, which keeps the scale in float32.
    """
    # Compared as integers, NaN is above infinity, so the maximum cannot lose a NaN.
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    amax_bits = jnp.max(jnp.max(bits, axis=-1), axis=-1)
    amax = jax.lax.bitcast_convert_type(amax_bits, jnp.float32)
    scale = arithmetic.divide(amax, jnp.full_like(amax, 127.0), interpret=interpret)
    inverse = arithmetic.divide(jnp.full_like(scale, 1.0), scale, interpret=interpret)
    inverse = jnp.where(scale == 0.0, 0.0, inverse)
    scaled = arithmetic.multiply(x, jnp.broadcast_to(inverse[..., None, None], x.shape), interpret=interpret)
    quants = jnp.clip(arithmetic.round_to_int(scaled, interpret=interpret), -128, 127)
    shifts = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) * 8
    return jnp.sum((quants & 255) << shifts, axis=-1), scale


def _kernel(x_ref: Any, q_ref: Any, s_ref: Any, *, blocks: int, tile: int, interpret: bool) -> None:
    row, first = pl.program_id(0), pl.program_id(1) * tile
    real = first + jnp.arange(tile, dtype=jnp.int32) < blocks
    span = pl.ds(first * BLOCK, tile * BLOCK)
    inside = jnp.broadcast_to(real[:, None], (tile, BLOCK)).reshape(tile * BLOCK)
    x = plt.load(x_ref.at[row, span], mask=inside, other=0.0).reshape(tile, WORDS, 4)
    words, scale = quantize_blocks(x, interpret=interpret)
    block = first + jnp.arange(tile, dtype=jnp.int32)
    # The index of a masked block is past the end; interpret mode drops it, too.
    words = words.reshape(tile, 2, HALF)
    place = (jax.lax.broadcasted_iota(jnp.int32, words.shape, 1), jnp.broadcast_to(block[:, None, None], words.shape))
    column = jax.lax.broadcasted_iota(jnp.int32, words.shape, 2)
    plt.store(q_ref.at[row, *place, column], words, mask=jnp.broadcast_to(real[:, None, None], words.shape))
    plt.store(s_ref.at[row, pl.ds(first, tile)], scale, mask=real)


@functools.partial(jax.jit, static_argnames=("groups", "interpret"))
def quantize(x: jax.Array, groups: int = 1, *, interpret: bool = False) -> Activation:
    """Quantise rows float32 [M, C·K] with C = `groups` in one launch. K is a multiple of 32."""
    m, width = x.shape
    blocks = width // groups // BLOCK
    rows = m * groups
    tile = min(BLOCKS_A_PROGRAM, pl.next_power_of_2(blocks))
    kernel = functools.partial(_kernel, blocks=blocks, tile=tile, interpret=interpret)
    shapes = (
        jax.ShapeDtypeStruct((rows, 2, blocks, HALF), jnp.int32),
        jax.ShapeDtypeStruct((rows, blocks), jnp.float32),
    )
    quants, scales = pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid=(rows, pl.cdiv(blocks, tile)),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="q8_activation",
    )(x.reshape(rows, blocks * BLOCK))
    return Activation(quants.reshape(m, groups, 2, blocks, HALF), scales.reshape(m, groups, blocks))

"""The clamped SwiGLU of the shared expert and the quantisation that follows it, one launch."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.activation import Activation, quantize_blocks
from pallas_kernels.formats import BLOCK, HALF, WORDS

NAME = "swiglu"
BLOCKS_A_PROGRAM = 4


def _kernel(gate_ref: Any, up_ref: Any, q_ref: Any, s_ref: Any, *, blocks: int, tile: int, limit: float, interpret: bool) -> None:
    row, first = pl.program_id(0), pl.program_id(1) * tile
    shape = (tile, WORDS, 4)
    block, word, byte = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(3))
    column, there = (first + block) * BLOCK + word * 4 + byte, first + block < blocks
    gate = jnp.minimum(plt.load(gate_ref.at[row, column], mask=there, other=0.0), limit)
    up = jnp.clip(plt.load(up_ref.at[row, column], mask=there, other=0.0), -limit, limit)
    words, scale = quantize_blocks(gate / (1.0 + jnp.exp(-gate)) * up, interpret=interpret)
    words = words.reshape(tile, 2, HALF)
    block, half, word = (jax.lax.broadcasted_iota(jnp.int32, words.shape, axis) for axis in range(3))
    # A masked block's own place lies past the end, where interpret mode drops it too.
    plt.store(q_ref.at[row, half, first + block, word], words, mask=first + block < blocks)
    block = first + jax.lax.broadcasted_iota(jnp.int32, (tile,), 0)
    plt.store(s_ref.at[row, block], scale, mask=block < blocks)


def swiglu(gate: jax.Array, up: jax.Array, *, limit: float, interpret: bool = False) -> Activation:
    """silu(min(gate, limit)) · clip(up, ±limit) of float32 [M, F], in int8 blocks of 32; F a multiple of 32."""
    m, width = gate.shape
    blocks = width // BLOCK
    tile = min(BLOCKS_A_PROGRAM, pl.next_power_of_2(blocks))
    quants, scales = pl.pallas_call(
        functools.partial(_kernel, blocks=blocks, tile=tile, limit=limit, interpret=interpret),
        out_shape=(
            jax.ShapeDtypeStruct((m, 2, blocks, HALF), jnp.int32),
            jax.ShapeDtypeStruct((m, blocks), jnp.float32),
        ),
        grid=(m, pl.cdiv(blocks, tile)),
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name=NAME,
    )(gate, up)
    return Activation(quants[:, None], scales[:, None])

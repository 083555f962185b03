"""The clamped SwiGLU of the shared expert and the quantisation that follows it, in one launch with that of the routed experts."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.activation import Activation, quantize_blocks
from pallas_kernels.activation_k import K_BLOCK, ORDERS, ActivationK, Order, out_shapes, places, quantize_block, store
from pallas_kernels.formats import BLOCK, HALF, WORDS, Quantized

NAME = "swiglu"
BLOCKS_A_PROGRAM = 4


def _kernel(gate_ref: Any, up_ref: Any, q_ref: Any, s_ref: Any, *, blocks: int, tile: int, limit: float, interpret: bool) -> None:
    row, first = pl.program_id(0), pl.program_id(1) * tile
    _swiglu(row, first, gate_ref, up_ref, q_ref, s_ref, blocks=blocks, tile=tile, limit=limit, interpret=interpret)


def _swiglu(
    row: jax.Array, first: jax.Array, gate_ref: Any, up_ref: Any, q_ref: Any, s_ref: Any,
    *, blocks: int, tile: int, limit: float, interpret: bool,
) -> None:  # fmt: skip
    """Some blocks of one row of the shared expert's hidden values."""
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


def _both_kernel(
    gate_ref: Any, up_ref: Any, hidden_ref: Any, q_ref: Any, s_ref: Any, *k_refs: Any,
    pairs: int, order: Order, limit: float, interpret: bool,
) -> None:  # fmt: skip
    row, block = pl.program_id(0), pl.program_id(1)
    tile = K_BLOCK // BLOCK

    @pl.when(row < pairs)
    def _() -> None:
        place = places(order)[0]
        made = quantize_block(plt.load(hidden_ref.at[row, block * K_BLOCK + place]), place, interpret=interpret)
        store(made, row, block, order, *k_refs)

    @pl.when(row >= pairs)
    def _() -> None:
        sizes = {"blocks": s_ref.shape[1], "tile": tile, "limit": limit, "interpret": interpret}
        _swiglu(row - pairs, block * tile, gate_ref, up_ref, q_ref, s_ref, **sizes)


@functools.partial(jax.jit, static_argnames=("format", "limit", "interpret"))
def swiglu_beside(
    gate: jax.Array, up: jax.Array, hidden: jax.Array, format: type[Quantized], *, limit: float, interpret: bool = False
) -> tuple[Activation, ActivationK]:
    """`swiglu` of the shared expert's [M, F], and the routed experts' hidden values [P, F] in blocks of 256: one launch.

    F is a multiple of 256, and `format` that of the routed experts' down matrices.
    """
    (m, width), (pairs, _), order = gate.shape, hidden.shape, ORDERS[format]
    blocks = width // BLOCK
    quants, scales, *extra = pl.pallas_call(
        functools.partial(_both_kernel, pairs=pairs, order=order, limit=limit, interpret=interpret),
        out_shape=(
            jax.ShapeDtypeStruct((m, 2, blocks, HALF), jnp.int32),
            jax.ShapeDtypeStruct((m, blocks), jnp.float32),
            *out_shapes(pairs, width, order),
        ),
        grid=(pairs + m, width // K_BLOCK),
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name=NAME,
    )(gate, up, hidden)
    return Activation(quants[:, None], scales[:, None]), ActivationK(*extra)


@functools.partial(jax.jit, static_argnames=("limit", "interpret"))
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

"""The clamped SwiGLU of the shared expert, and the quantisation of shared and routed hidden values, in one launch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.formats import BLOCK, HALF, Q8_0, WORDS, Quantized
from pallas_kernels.linear.activation import Activation, quantize_blocks
from pallas_kernels.linear.activation_k import K_BLOCK, ORDERS, ActivationK, Order, out_shapes, places, quantize_block, store

NAME = "swiglu"
BLOCKS_A_PROGRAM = 4


def clamped(gate: jax.Array, up: jax.Array, limit: float) -> jax.Array:
    """`meaning.swiglu` inside kernels; every kernel uses these steps."""
    gate = jnp.minimum(gate, limit)
    return gate / (1.0 + jnp.exp(-gate)) * jnp.clip(up, -limit, limit)


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
    gate, up = (plt.load(ref.at[row, column], mask=there, other=0.0) for ref in (gate_ref, up_ref))
    words, scale = quantize_blocks(clamped(gate, up, limit), interpret=interpret)
    words = words.reshape(tile, 2, HALF)
    block, half, word = (jax.lax.broadcasted_iota(jnp.int32, words.shape, axis) for axis in range(3))
    # The index of a masked block is past the end; interpret mode drops it, too.
    plt.store(q_ref.at[row, half, first + block, word], words, mask=first + block < blocks)
    block = first + jax.lax.broadcasted_iota(jnp.int32, (tile,), 0)
    plt.store(s_ref.at[row, block], scale, mask=block < blocks)


def _both_kernel(
    gate_ref: Any, up_ref: Any, hidden_ref: Any, *refs: Any,
    pairs: int, order: Order, shared: Order | None, limit: float, interpret: bool,
) -> None:  # fmt: skip
    row, block = pl.program_id(0), pl.program_id(1)
    shared_refs, k_refs = refs[:-3], refs[-3:]

    @pl.when(row < pairs)
    def _() -> None:
        place = places(order)[0]
        made = quantize_block(plt.load(hidden_ref.at[row, block * K_BLOCK + place]), place, interpret=interpret)
        store(made, row, block, order, *k_refs)

    @pl.when(row >= pairs)
    def _() -> None:
        if shared is None:
            tile = K_BLOCK // BLOCK
            sizes = {"blocks": shared_refs[1].shape[1], "tile": tile, "limit": limit, "interpret": interpret}
            _swiglu(row - pairs, block * tile, gate_ref, up_ref, *shared_refs, **sizes)
        else:
            _swiglu_k(row - pairs, block, gate_ref, up_ref, shared_refs, shared, limit=limit, interpret=interpret)


def _swiglu_k(
    row: jax.Array, block: jax.Array, gate_ref: Any, up_ref: Any, refs: Sequence[Any], order: Order,
    *, limit: float, interpret: bool,
) -> None:  # fmt: skip
    """A block of 256 of one row of the shared expert's hidden values."""
    place = places(order)[0]
    gate, up = (plt.load(ref.at[row, block * K_BLOCK + place]) for ref in (gate_ref, up_ref))
    store(quantize_block(clamped(gate, up, limit), place, interpret=interpret), row, block, order, *refs)


def _k_kernel(gate_ref: Any, up_ref: Any, *refs: Any, order: Order, limit: float, interpret: bool) -> None:
    _swiglu_k(pl.program_id(0), pl.program_id(1), gate_ref, up_ref, refs, order, limit=limit, interpret=interpret)


@functools.partial(jax.jit, static_argnames=("format", "shared", "limit", "interpret"))
def swiglu_beside(
    gate: jax.Array, up: jax.Array, hidden: jax.Array, format: type[Quantized], shared: type[Quantized] = Q8_0,
    *, limit: float, interpret: bool = False,
) -> tuple[Activation | ActivationK, ActivationK]:  # fmt: skip
    """`swiglu` of the shared expert, and quantise the routed experts' hidden values, in one launch.

    Args:
        gate, up: float32 [M, F], of the shared expert; F is a multiple of 256.
        hidden: float32 [P, F], of the routed experts.
        format: of the routed experts' down matrices, in blocks of 256.
        shared: of the shared expert's down matrix.
        limit: static, of the SwiGLU.

    Returns:
        The shared expert's hidden values as its down matrix reads them, and the routed experts' in blocks of 256.
    """
    (m, width), (pairs, _), order = gate.shape, hidden.shape, ORDERS[format]
    own = None if shared.BLOCK == BLOCK else ORDERS[shared]
    made = pl.pallas_call(
        functools.partial(_both_kernel, pairs=pairs, order=order, shared=own, limit=limit, interpret=interpret),
        out_shape=(*_out_shapes(m, width, own), *out_shapes(pairs, width, order)),
        grid=(pairs + m, width // K_BLOCK),
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name=NAME,
    )(gate, up, hidden)
    return _quantised(made[:-3]), ActivationK(*made[-3:])


def _out_shapes(rows: int, width: int, order: Order | None) -> list[jax.ShapeDtypeStruct]:
    """Shapes of the shared expert's quantised hidden values, in blocks of 256 if an order is given."""
    if order is not None:
        return out_shapes(rows, width, order)
    blocks = width // BLOCK
    return [jax.ShapeDtypeStruct((rows, 2, blocks, HALF), jnp.int32), jax.ShapeDtypeStruct((rows, blocks), jnp.float32)]


def _quantised(made: Sequence[jax.Array]) -> Activation | ActivationK:
    """Arrays of these shapes as activations."""
    if len(made) == 2:
        quants, scales = made
        return Activation(quants[:, None], scales[:, None])
    return ActivationK(*made)


@functools.partial(jax.jit, static_argnames=("format", "limit", "interpret"))
def swiglu(
    gate: jax.Array, up: jax.Array, format: type[Quantized] = Q8_0, *, limit: float, interpret: bool = False
) -> Activation | ActivationK:
    """silu(min(gate, limit)) · clip(up, ±limit) of float32 [M, F], quantised for a weight of `format`; F divides into blocks."""
    m, width = gate.shape
    order = None if format.BLOCK == BLOCK else ORDERS[format]
    if order is None:
        blocks = width // BLOCK
        tile = min(BLOCKS_A_PROGRAM, pl.next_power_of_2(blocks))
        kernel, grid = (
            functools.partial(_kernel, blocks=blocks, tile=tile, limit=limit, interpret=interpret),
            pl.cdiv(blocks, tile),
        )
    else:
        kernel, grid = functools.partial(_k_kernel, order=order, limit=limit, interpret=interpret), width // K_BLOCK
    made = pl.pallas_call(
        kernel,
        out_shape=_out_shapes(m, width, order),
        grid=(m, grid),
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name=NAME,
    )(gate, up)
    return _quantised(made)

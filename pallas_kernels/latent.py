"""Between the low-rank projections and attention: norms, rotation, rounding, and a key's place in the window ring."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import reference, rotary, rounding
from pallas_kernels.activation import Activation, quantize_blocks
from pallas_kernels.formats import BLOCK, HALF, WORDS

NAME = "latent"
WARPS = 4


def _normed(x_ref: Any, weight_ref: Any, row: jax.Array, column: jax.Array, eps: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A row [n] and its pairs' partners, both normed, and which columns there are."""
    width = x_ref.shape[1]
    real, rows = column < width, jnp.broadcast_to(row, column.shape)
    x = plt.load(x_ref.at[rows, column], mask=real, other=0.0)
    weight = plt.load(weight_ref.at[column], mask=real, other=0.0)
    # The pair's other value comes from memory again: lanes would have to exchange registers for it.
    partner = plt.load(x_ref.at[rows, column ^ 1], mask=real, other=0.0)
    partner_weight = plt.load(weight_ref.at[column ^ 1], mask=real, other=0.0)
    scale = jax.lax.rsqrt(jnp.sum(x * x) / width + eps)
    return x * scale * weight, partner * scale * partner_weight, real


def _query(
    row: jax.Array, q_ref: Any, weight_ref: Any, out_ref: Any, quants_ref: Any, scales_ref: Any, *, eps: float, interpret: bool
) -> None:
    width = pl.next_power_of_2(q_ref.shape[1])
    column = jnp.arange(width, dtype=jnp.int32)
    x, _, real = _normed(q_ref, weight_ref, row, column, eps)
    plt.store(out_ref.at[jnp.broadcast_to(row, column.shape), column], x, mask=real)
    words, scales = quantize_blocks(x.reshape(width // BLOCK, WORDS, 4), interpret=interpret)
    words = words.reshape(width // BLOCK, 2, HALF)
    block, half, word = (jax.lax.broadcasted_iota(jnp.int32, words.shape, axis) for axis in range(3))
    # A masked block's own place lies past the end, where interpret mode drops it too.
    place = (jnp.broadcast_to(row, words.shape), half, block, word)
    plt.store(quants_ref.at[place], words, mask=block < quants_ref.shape[2])
    block = jnp.arange(width // BLOCK, dtype=jnp.int32)
    plt.store(scales_ref.at[jnp.broadcast_to(row, block.shape), block], scales, mask=block < scales_ref.shape[1])


def _key(
    row: jax.Array,
    kv_ref: Any,
    weight_ref: Any,
    cos_ref: Any,
    sin_ref: Any,
    slot_ref: Any,
    ring_ref: Any,
    *,
    eps: float,
    qat: bool,
    interpret: bool,
) -> None:
    size = kv_ref.shape[1]
    column = jnp.arange(max(pl.next_power_of_2(size), rounding.FP8_BLOCK), dtype=jnp.int32)
    slot, still = slot_ref[row], size - 2 * cos_ref.shape[1]
    cos, sin = rotary.factors(cos_ref, sin_ref, row, column, still, inverse=False)
    x, partner, real = _normed(kv_ref, weight_ref, row, column, eps)
    out = rotary.turn(x, partner, cos, sin, interpret=interpret)
    if qat:
        out = jnp.where(column < still, rounding.fp8(x.reshape(-1, rounding.FP8_BLOCK)).reshape(x.shape), out)
    place = (jnp.zeros_like(column), jnp.broadcast_to(slot, column.shape), column)
    plt.store(ring_ref.at[place], out.astype(ring_ref.dtype), mask=real & (slot < ring_ref.shape[1]))


def _kernel(*refs: Any, eps: float, qat: bool, interpret: bool) -> None:
    q_ref, kv_ref, q_weight_ref, kv_weight_ref, cos_ref, sin_ref, slot_ref, _, quants_ref, scales_ref, out_ref, ring_ref = refs
    row, part = pl.program_id(0), pl.program_id(1)

    @pl.when(part == 0)
    def query() -> None:
        _query(row, q_ref, q_weight_ref, out_ref, quants_ref, scales_ref, eps=eps, interpret=interpret)

    @pl.when(part == 1)
    def key() -> None:
        _key(row, kv_ref, kv_weight_ref, cos_ref, sin_ref, slot_ref, ring_ref, eps=eps, qat=qat, interpret=interpret)


def latent(
    q_low: jax.Array,
    kv: jax.Array,
    q_weight: jax.Array,
    kv_weight: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    ring: jax.Array,
    slot: jax.Array,
    *,
    eps: float,
    qat: bool,
    interpret: bool = False,
) -> tuple[Activation, jax.Array, jax.Array]:
    """Norm the low-rank queries of M rows and quantise them; norm, rotate and round their keys and store them: one launch.

    Args:
        q_low: float32 [M, L], L a multiple of 32, with the norm's weight [L].
        kv: float32 [M, Q], with the norm's weight [Q].
        cos, sin: float32 [M, R/2] of each row's angles; the last R columns of a key turn.
        ring: [1, ring, Q], updated in place.
        slot: int32 [M], where a row's key goes; a slot past the ring keeps it out.
        qat: round a key's first Q - R columns, a multiple of 64, to FP8.

    Returns:
        the normed queries quantised, the same as float32 [M, L], and the ring.

    Source: `Attention` of the reference inference code.
    """
    m, width = q_low.shape
    blocks = width // BLOCK
    outputs = (
        jax.ShapeDtypeStruct((m, 2, blocks, HALF), jnp.int32),
        jax.ShapeDtypeStruct((m, blocks), jnp.float32),
        jax.ShapeDtypeStruct((m, width), jnp.float32),
        jax.ShapeDtypeStruct(ring.shape, ring.dtype),
    )
    quants, scales, normed, ring = pl.pallas_call(
        functools.partial(_kernel, eps=eps, qat=qat, interpret=interpret),
        out_shape=outputs,
        grid=(m, 2),
        input_output_aliases={7: 3},
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name=NAME,
    )(q_low, kv, q_weight, kv_weight, cos, sin, slot, ring)
    return Activation(quants[:, None], scales[:, None]), normed, ring


def latent_reference(
    q_low: jax.Array,
    kv: jax.Array,
    q_weight: jax.Array,
    kv_weight: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    ring: jax.Array,
    slot: jax.Array,
    *,
    eps: float,
    qat: bool,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array, jax.Array]:
    """What `latent` computes, in jnp; the quantised queries as `reference.quantize` gives them, [M, L/32, 32] and [M, L/32]."""
    q_low, kv = reference.rms_norm(q_low, q_weight, eps), reference.rms_norm(kv, kv_weight, eps)
    kv = rotary.rotate(kv, cos, sin)
    if qat:
        still, turning = jnp.split(kv, [kv.shape[-1] - 2 * cos.shape[1]], axis=-1)
        blocks = still.reshape(still.shape[0], -1, rounding.FP8_BLOCK)
        kv = jnp.concatenate([rounding.fp8(blocks).reshape(still.shape), turning], axis=-1)
    return reference.quantize(q_low), q_low, ring.at[0, slot].set(kv.astype(ring.dtype), mode="drop")

"""Between the low-rank projections and attention: norms, rotation, rounding, and a key's place in the window ring."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.core import rotary, rounding
from pallas_kernels.core.launch import Part, launch
from pallas_kernels.formats import BLOCK, HALF, WORDS
from pallas_kernels.linear.activation import Activation, quantize_blocks
from pallas_kernels.linear.halves import halves_of

NAME = "latent"
WARPS = 8


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
    row: jax.Array, q_ref: Any, weight_ref: Any, out_ref: Any, halves_ref: Any, quants_ref: Any, scales_ref: Any,
    *, eps: float, interpret: bool,
) -> None:  # fmt: skip
    width = pl.next_power_of_2(q_ref.shape[1])
    column = jnp.arange(width, dtype=jnp.int32)
    x, _, real = _normed(q_ref, weight_ref, row, column, eps)
    rows = jnp.broadcast_to(row, column.shape)
    plt.store(out_ref.at[rows, column], x, mask=real)
    for i, values in enumerate(halves_of(x)):
        plt.store(halves_ref.at[rows, jnp.full_like(column, i), column], values, mask=real)
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
    sequence_ref: Any,
    slot_ref: Any,
    ring_ref: Any,
    *,
    eps: float,
    qat: bool,
    interpret: bool,
) -> None:
    size = kv_ref.shape[1]
    column = jnp.arange(max(pl.next_power_of_2(size), rounding.FP8_BLOCK), dtype=jnp.int32)
    sequence, slot, plain = sequence_ref[row], slot_ref[row], size - 2 * cos_ref.shape[1]
    cos, sin = rotary.factors(cos_ref, sin_ref, row, column, plain, inverse=False)
    x, partner, real = _normed(kv_ref, weight_ref, row, column, eps)
    out = rotary.rotate_columns(x, partner, cos, sin, interpret=interpret)
    if qat:
        out = jnp.where(column < plain, rounding.fp8(x.reshape(-1, rounding.FP8_BLOCK)).reshape(x.shape), out)
    place = (jnp.full_like(column, sequence), jnp.full_like(column, slot), column)
    plt.store(ring_ref.at[place], out.astype(ring_ref.dtype), mask=real & (slot < ring_ref.shape[1]))


def _body(program: jax.Array, inputs: Sequence[Any], outputs: Sequence[Any], *, eps: float, qat: bool, interpret: bool) -> None:
    q_ref, kv_ref, q_weight_ref, kv_weight_ref, cos_ref, sin_ref, sequence_ref, slot_ref, _ = inputs
    quants_ref, scales_ref, out_ref, halves_ref, ring_ref = outputs
    row, part = program // 2, program % 2

    @pl.when(part == 0)
    def query() -> None:
        _query(row, q_ref, q_weight_ref, out_ref, halves_ref, quants_ref, scales_ref, eps=eps, interpret=interpret)

    @pl.when(part == 1)
    def key() -> None:
        _key(
            row, kv_ref, kv_weight_ref, cos_ref, sin_ref, sequence_ref, slot_ref, ring_ref, eps=eps, qat=qat, interpret=interpret
        )


def latent_part(
    q_low: jax.Array,
    kv: jax.Array,
    q_weight: jax.Array,
    kv_weight: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    ring: jax.Array,
    sequence: jax.Array,
    slot: jax.Array,
    *,
    eps: float,
    qat: bool,
    interpret: bool = False,
) -> Part:
    """`latent` as a part of a launch; its results are quants, scales, the normed queries, their halves and the ring."""
    m, width = q_low.shape
    blocks = width // BLOCK
    return Part(
        name=NAME,
        programs=2 * m,
        body=functools.partial(_body, eps=eps, qat=qat, interpret=interpret),
        inputs=(q_low, kv, q_weight, kv_weight, cos, sin, sequence, slot, ring),
        outputs=(
            jax.ShapeDtypeStruct((m, 2, blocks, HALF), jnp.int32),
            jax.ShapeDtypeStruct((m, blocks), jnp.float32),
            jax.ShapeDtypeStruct((m, width), jnp.float32),
            jax.ShapeDtypeStruct((m, 2, width), jnp.float16),
            jax.ShapeDtypeStruct(ring.shape, ring.dtype),
        ),
        aliases={8: 4},
    )


def latent(
    q_low: jax.Array,
    kv: jax.Array,
    q_weight: jax.Array,
    kv_weight: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    ring: jax.Array,
    sequence: jax.Array,
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
        cos, sin: float32 [M, R/2] of each row's angles; the last R columns of a key rotate.
        ring: [B, ring, Q], updated in place.
        sequence: int32 [M], which of the B rings takes a row's key.
        slot: int32 [M], where in it; a slot past the ring keeps it out.
        qat: round a key's first Q - R columns, a multiple of 64, to FP8.

    Returns:
        the normed queries quantised, the same as float32 [M, L], and the ring.

    Source: `Attention` of the reference inference code.
    """
    part = latent_part(q_low, kv, q_weight, kv_weight, cos, sin, ring, sequence, slot, eps=eps, qat=qat, interpret=interpret)
    [[quants, scales, normed, _, ring]] = launch([part], warps=WARPS, interpret=interpret)
    return Activation(quants[:, None], scales[:, None]), normed, ring

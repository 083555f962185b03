"""What each kernel means, in the fewest lines of jnp, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import arithmetic
from pallas_kernels.activation import quantize_blocks
from pallas_kernels.formats import BLOCK, Q8_0, WORDS, Quantized

Weight = jax.Array | Quantized
K_BLOCK = 256


def as_float32(weight: Weight) -> jax.Array:
    """The weight's values in float32, whatever it is stored as."""
    return weight.dequantize() if isinstance(weight, Quantized) else weight.astype(jnp.float32)


def dot(x: jax.Array, w: jax.Array, precision: jax.lax.PrecisionLike = None) -> jax.Array:
    """Grouped product of float32 x [M, C, K] and w [C, N, K]: [M, C, N]."""
    return jnp.einsum("mck,cnk->mcn", x, w, precision=precision, preferred_element_type=jnp.float32)


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Activations float32 [..., K] as int8 [..., K/32, 32] and scales float32 [..., K/32], with the kernels' rounding."""
    blocks = x.reshape(*x.shape[:-1], -1, WORDS, 4)
    words, scales = quantize_blocks(blocks, interpret=True)
    return jax.lax.bitcast_convert_type(words, jnp.int8).reshape(*scales.shape, BLOCK), scales


def quantize_k(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Activations float32 [..., K] as Q8_K: int8 [..., K/256, 256] and scales float32 [..., K/256].

    With m the first value of the largest magnitude, quant = round half to even (x · (-127/m)) and scale = 1 / (-127/m), so that
    scales may be negative. A NaN or infinity makes its block's products NaN. Source: gguf.md §6 and ggml's `quantize_row_q8_K`.
    """
    blocks = x.reshape(*x.shape[:-1], -1, K_BLOCK)
    largest = jnp.take_along_axis(blocks, jnp.argmax(jnp.abs(blocks), axis=-1, keepdims=True), axis=-1)
    inverse = arithmetic.divide(jnp.full_like(largest, -127.0), largest, interpret=True)
    inverse = jnp.where(largest == 0.0, 0.0, inverse)
    scaled = arithmetic.multiply(blocks, jnp.broadcast_to(inverse, blocks.shape), interpret=True)
    quants = jnp.clip(arithmetic.round_to_int(scaled, interpret=True), -128, 127).astype(jnp.int8)
    scale = arithmetic.divide(jnp.full_like(inverse, 1.0), inverse, interpret=True)
    return quants, jnp.where(largest == 0.0, 0.0, scale)[..., 0]


def quantized_dot(x: jax.Array, weight: Q8_0) -> jax.Array:
    """The share-warp kernel's arithmetic: exact integer dot per block of 32, times both scales, summed in float32.

    x float32 [M, C, K] with C groups, weight [C·N, K]; returns [M, C, N]. Integers up to 2¹⁹ are exact in float32, whose
    products a CPU computes faster than those of int8.
    """
    m, groups, _ = x.shape
    xq, xs = quantize(x)
    blocks = weight.scales.shape[-1]
    wq = weight.blocks().reshape(groups, -1, blocks, BLOCK).astype(jnp.float32)
    ws = weight.scales.reshape(groups, -1, blocks).astype(jnp.float32)
    dots = jnp.einsum("mcgk,cngk->mcng", xq.astype(jnp.float32), wq, precision="highest", preferred_element_type=jnp.float32)
    return jnp.sum(dots * (ws[None] * xs[:, :, None, :]), axis=-1)


def expert_dot(x: jax.Array, weight: Quantized, *, add_up: bool = False) -> jax.Array:
    """Rows with matrices of their own, in the arithmetic of the expert kernels.

    Activations are quantised in blocks as long as the weight's: 32 by `quantize`, 256 by `quantize_k`. Integer dots per group of
    a block, times the group's factors, summed in int32; a block's sum times both scales, minus the minima times the activations'
    integer sums; blocks summed in float32.

    x float32 [..., K], weight [..., N, K], leading axes of x as they are or 1; returns [..., N], or with `add_up` the sum over
    the last of the leading axes. Source: gguf.md §6.
    """
    xq, xs = quantize(x) if weight.BLOCK == BLOCK else quantize_k(x)
    terms = weight.terms()
    # A group's dot stays below 2²⁴, so that float32 holds it.
    xq = xq.reshape(*xs.shape[:-1], 1, xs.shape[-1], *terms.values.shape[-2:]).astype(jnp.float32)
    dots = jnp.sum(xq * terms.values.astype(jnp.float32), axis=-1).astype(jnp.int32)
    sums = jnp.sum(dots if terms.factor is None else dots * terms.factor, axis=-1)
    steps = terms.scale
    if terms.minimum is not None and terms.offset is not None:
        offsets = jnp.sum(jnp.sum(xq, axis=-1).astype(jnp.int32) * terms.offset, axis=-1)
        sums, steps = jnp.concatenate([sums, offsets], axis=-1), jnp.concatenate([steps, -terms.minimum], axis=-1)
        xs = jnp.concatenate([xs, xs], axis=-1)
    # A product of the library for each row: of loops, a CPU compiler fuses products and sums as the number of rows suits it.
    terms_NB = sums.astype(jnp.float32) * steps
    spec = "...enb,...eb->...n" if add_up else "...nb,...b->...n"
    return jnp.einsum(spec, terms_NB, xs, precision="highest", preferred_element_type=jnp.float32)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x [..., K] → weight · x / sqrt(mean(x²) + eps)."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight

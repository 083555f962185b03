"""The meaning of the product kernels in plain jnp, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.core import arithmetic
from pallas_kernels.formats import BLOCK, WORDS, Quantized, Terms
from pallas_kernels.linear.activation import quantize_blocks

Weight = jax.Array | Quantized
# Nearly float32 on the tensor cores: each operand is a sum of two bfloat16 numbers. The product of the small parts is left out.
NEARLY_FLOAT32 = jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3
# The same with TF32 numbers, which together have all digits of a float32. It takes half as long again.
AS_FLOAT32 = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
K_BLOCK = 256


def as_float32(weight: Weight) -> jax.Array:
    """The weight's values in float32, [..., N, K], for any stored type."""
    return weight.dequantize() if isinstance(weight, Quantized) else weight.astype(jnp.float32)


def dot(x: jax.Array, w: jax.Array, precision: jax.lax.PrecisionLike = None) -> jax.Array:
    """Grouped product of float32 x [M, C, K] and w [C, N, K]: [M, C, N]."""
    return jnp.einsum("mck,cnk->mcn", x, w, precision=precision, preferred_element_type=jnp.float32)


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantise float32 [..., K] to int8 [..., K/32, 32] and scales float32 [..., K/32], with the kernels' rounding."""
    blocks = x.reshape(*x.shape[:-1], -1, WORDS, 4)
    words, scales = quantize_blocks(blocks, interpret=True)
    return jax.lax.bitcast_convert_type(words, jnp.int8).reshape(*scales.shape, BLOCK), scales


def quantize_k(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantise float32 [..., K] to Q8_K: int8 [..., K/256, 256] and scales float32 [..., K/256].

    With m the first value of the largest magnitude, quant = round half to even (x · (-127/m)) and scale = 1 / (-127/m). Scales
    may be negative. A NaN or infinity in a block makes its products NaN. Source: gguf.md §6 and ggml's `quantize_row_q8_K`.
    """
    blocks = x.reshape(*x.shape[:-1], -1, K_BLOCK)
    largest = jnp.take_along_axis(blocks, jnp.argmax(jnp.abs(blocks), axis=-1, keepdims=True), axis=-1)
    inverse = arithmetic.divide(jnp.full_like(largest, -127.0), largest, interpret=True)
    inverse = jnp.where(largest == 0.0, 0.0, inverse)
    scaled = arithmetic.multiply(blocks, jnp.broadcast_to(inverse, blocks.shape), interpret=True)
    quants = jnp.clip(arithmetic.round_to_int(scaled, interpret=True), -128, 127).astype(jnp.int8)
    scale = arithmetic.divide(jnp.full_like(inverse, 1.0), inverse, interpret=True)
    return quants, jnp.where(largest == 0.0, 0.0, scale)[..., 0]


def quantized_dot(x: jax.Array, weight: Quantized) -> jax.Array:
    """The arithmetic of the kernels for dense weights, as `expert_dot` has it, with float32 sums over the blocks.

    x float32 [M, C, K] with C groups, weight [C·N, K]; returns [M, C, N]. A CPU multiplies float32 faster than int8.
    """
    m, groups, _ = x.shape
    xq, xs = _quantize_for(x, weight)
    terms = weight.terms().grouped(groups)
    blocks, (count, width) = xs.shape[-1], terms.values.shape[-2:]
    xq = xq.astype(jnp.float32).reshape(m, groups, blocks * count, width)
    # A product's batches come first in memory. The integers are moved there, behind a barrier: a compiler takes the conversion of
    # weights out of a loop of decode steps, but would copy the converted weights in every step.
    values = jnp.moveaxis(terms.values.reshape(groups, -1, blocks * count, width), 2, 1)
    wq = jax.lax.optimization_barrier(values).astype(jnp.float32)
    dots = jnp.einsum("mcgk,cgnk->mcng", xq, wq, precision="highest", preferred_element_type=jnp.float32)
    totals = jnp.sum(xq, axis=-1).reshape(m, groups, 1, blocks, count)
    sums, ws = _block_sums(dots.reshape(*dots.shape[:-1], blocks, count), totals, terms)
    xs = jnp.concatenate([xs] * (ws.shape[-1] // blocks), axis=-1)
    return _scaled_sum("...nb,...b->...n", sums * ws, xs)


def _scaled_sum(spec: str, terms: jax.Array, xs: jax.Array) -> jax.Array:
    """Sum of a weight's terms times the activations' scales: a library product for each row.

    In loops a CPU compiler fuses products and sums differently for other numbers of rows, and runs short sums one by one.
    """
    return jnp.einsum(spec, terms, xs, precision="highest", preferred_element_type=jnp.float32)


def _quantize_for(x: jax.Array, weight: Quantized) -> tuple[jax.Array, jax.Array]:
    """Quantise activations float32 [..., K] in blocks of the weight's size: int8 [..., B, BLOCK] and scales [..., B]."""
    return quantize(x) if weight.BLOCK == BLOCK else quantize_k(x)


def _block_sums(dots: jax.Array, totals: jax.Array, terms: Terms) -> tuple[jax.Array, jax.Array]:
    """Integer sums of blocks and the weight's scale of each: float32 [..., N, B] both, or [..., N, 2B] with minima.

    Args:
        dots: float32 [..., N, B, g], dot products of groups. They are below 2²⁴, so they are exact.
        totals: float32 [..., N or 1, B, g], sums of the groups' activations.
    """
    if terms.factor is None:
        sums = jnp.sum(dots, axis=-1)
    else:
        sums = jnp.sum(dots.astype(jnp.int32) * terms.factor, axis=-1).astype(jnp.float32)
    if terms.minimum is None or terms.offset is None:
        return sums, terms.scale
    below = jnp.sum(totals.astype(jnp.int32) * terms.offset, axis=-1).astype(jnp.float32)
    return jnp.concatenate([sums, below], axis=-1), jnp.concatenate([terms.scale, -terms.minimum], axis=-1)


def expert_dot(x: jax.Array, weight: Quantized, *, add_up: bool = False) -> jax.Array:
    """Product of each row with its own matrix, in the arithmetic of the expert kernels.

    Activations are quantised in blocks of the weight's size: 32 by `quantize`, 256 by `quantize_k`. The integer dot product of
    each group is multiplied by the group's factor, and the groups of a block are summed in int32. The sum is multiplied by both
    scales; the minima times the integer sums of the activations are subtracted. Blocks are summed in float32.

    Args:
        x: float32 [..., K].
        weight: [..., N, K]; each leading axis of x equals the weight's or is 1.
        add_up: static, sum over the last leading axis.

    Returns:
        float32 [..., N], without the last leading axis if `add_up`.

    Source: gguf.md §6.
    """
    xq, xs = _quantize_for(x, weight)
    terms = weight.terms()
    xq = xq.reshape(*xs.shape[:-1], 1, xs.shape[-1], *terms.values.shape[-2:]).astype(jnp.float32)
    dots = jnp.sum(xq * terms.values.astype(jnp.float32), axis=-1)
    sums, steps = _block_sums(dots, jnp.sum(xq, axis=-1), terms)
    xs = jnp.concatenate([xs] * (steps.shape[-1] // xs.shape[-1]), axis=-1)
    return _scaled_sum("...enb,...eb->...n" if add_up else "...nb,...b->...n", sums * steps, xs)

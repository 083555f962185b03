"""What each kernel means, in the fewest lines of jnp, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.activation import quantize_blocks
from pallas_kernels.formats import BLOCK, Q8_0, WORDS

Weight = jax.Array | Q8_0


def as_float32(weight: Weight) -> jax.Array:
    """The weight's values in float32, whatever it is stored as."""
    return weight.dequantize() if isinstance(weight, Q8_0) else weight.astype(jnp.float32)


def dot(x: jax.Array, w: jax.Array, precision: jax.lax.PrecisionLike = None) -> jax.Array:
    """Grouped product of float32 x [M, C, K] and w [C, N, K]: [M, C, N]."""
    return jnp.einsum("mck,cnk->mcn", x, w, precision=precision, preferred_element_type=jnp.float32)


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Activations float32 [..., K] as int8 [..., K/32, 32] and scales float32 [..., K/32], with the kernels' rounding."""
    blocks = x.reshape(*x.shape[:-1], -1, WORDS, 4)
    words, scales = quantize_blocks(blocks, interpret=True)
    return jax.lax.bitcast_convert_type(words, jnp.int8).reshape(*scales.shape, BLOCK), scales


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

"""What the compressor's kernel computes, in plain jnp; the model's module and the kernel's tests share it.

Source: `Compressor` of the reference inference code of DeepSeek-V4; ratio 4 pools over the previous block too.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.attention.meaning import round_rows
from pallas_kernels.core import rotary, rounding
from pallas_kernels.core.norm import rms_norm


def pool(values: jax.Array, gates: jax.Array, real: jax.Array, *, ratio: int) -> jax.Array:
    """Gate-weighted mean of the tokens of each block, channel by channel: float32 [n, w].

    Args:
        values, gates: float32 [n, C·ratio, C·w], the block's tokens and with C = 2 those of the block before it in front; gates
            have their bias.
        real: bool [n, C·ratio], false for tokens before the sequence's first.
    """
    if values.shape[1] == 2 * ratio:
        values, gates = previous_then_current(values, ratio), previous_then_current(gates, ratio)
    gates = jnp.where(real[..., None], gates, -jnp.inf)
    return jnp.sum(jax.nn.softmax(gates, axis=1) * values, axis=1)


def previous_then_current(x: jax.Array, ratio: int) -> jax.Array:
    """Of [n, 2·ratio, 2·w], the first half of the channels for the previous block's tokens and the second for the current's."""
    previous, current = jnp.split(x, [ratio], axis=1)
    half = x.shape[-1] // 2
    return jnp.concatenate([previous[..., :half], current[..., half:]], axis=1)


def rows(
    values: jax.Array, gates: jax.Array, ape: jax.Array, norm_weight: jax.Array, cos: jax.Array, sin: jax.Array, *, ratio: int,
    eps: float, finish: str,
) -> jax.Array:  # fmt: skip
    """All finished rows [T/ratio, w] of a whole sequence.

    Args:
        values, gates: float32 [T, C·w], from position 0 on.
        cos, sin: float32 [T/ratio, R/2], at the first token of each block.
        ape, norm_weight, ratio, eps, finish: as for `decode.compress`.
    """
    overlap, count = values.shape[1] // norm_weight.shape[0], values.shape[0] // ratio
    token = jnp.arange(count, dtype=jnp.int32)[:, None] * ratio + jnp.arange((1 - overlap) * ratio, ratio, dtype=jnp.int32)
    index = jnp.maximum(token, 0)
    biased = gates[index] + ape[index % ratio]
    x = rms_norm(pool(values[index], biased, token >= 0, ratio=ratio), norm_weight, eps)
    x = rotary.rotate(x, cos, sin)
    if finish == "fp4":
        return rounding.hadamard_fp4(x, precision="highest")
    return round_rows(x, 2 * cos.shape[1]) if finish == "fp8" else x

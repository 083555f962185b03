"""Rotary positions in kernel bodies: interleaved pairs in the last R columns, with cosines and sines from a table."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

from pallas_kernels import arithmetic


def factors(cos_ref: Any, sin_ref: Any, row: jax.Array, column: jax.Array, still: int, inverse: bool) -> tuple[jax.Array, ...]:
    """What the columns int32 [n] and their partners, column ^ 1, are multiplied with: cosine and signed sine, float32 [n].

    The first `still` columns do not turn: theirs are 1 and 0. Columns of padding turn by no matter what.
    """
    turning = column >= still
    pair = jnp.clip((column - still) >> 1, 0, cos_ref.shape[1] - 1)
    row = jnp.broadcast_to(row, column.shape)
    cos = plt.load(cos_ref.at[row, pair], mask=turning, other=1.0)
    sin = plt.load(sin_ref.at[row, pair], mask=turning, other=0.0)
    first = (column & 1) == 0
    return cos, jnp.where(first != inverse, -sin, sin)


def turn(x: jax.Array, partner: jax.Array, cos: jax.Array, sin: jax.Array, *, interpret: bool) -> jax.Array:
    """x [..., n] turned, with each column's partner and factors [n] of `factors`; rounded alike in every kernel."""
    cos, sin = jnp.broadcast_to(cos, x.shape), jnp.broadcast_to(sin, x.shape)
    return arithmetic.fma(x, cos, arithmetic.multiply(partner, sin, interpret=interpret), interpret=interpret)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, inverse: bool = False) -> jax.Array:
    """Rotate the last R dimensions of x [M, ..., Q] by angles of the tables [M, R/2], backwards when `inverse`."""
    shape = (x.shape[0], *(1,) * (x.ndim - 2), cos.shape[1])
    cos, sin = cos.reshape(shape), (-sin if inverse else sin).reshape(shape)
    still, turning = jnp.split(x, [x.shape[-1] - 2 * cos.shape[-1]], axis=-1)
    even, odd = turning[..., 0::2], turning[..., 1::2]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(turning.shape)
    return jnp.concatenate([still, turned], axis=-1)

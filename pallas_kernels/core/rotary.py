"""Rotary embedding of positions: rotates interleaved pairs in the last R columns, with cosines and sines from a table.

`rotate` is the meaning. `factors` and `rotate_columns` compute the same inside kernels, column by column.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

from pallas_kernels.core import arithmetic


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, inverse: bool = False) -> jax.Array:
    """Rotate the last R dimensions of x [M, ..., Q]; with `inverse`, by the negative angles.

    Args:
        cos, sin: cosines and sines of the angles, [M, R/2], or with as many axes as x.
    """
    between = (1,) * (x.ndim - cos.ndim)
    cos, sin = (table.reshape(table.shape[0], *between, *table.shape[1:]) for table in (cos, -sin if inverse else sin))
    plain, rotary = jnp.split(x, [x.shape[-1] - 2 * cos.shape[-1]], axis=-1)
    even, odd = rotary[..., 0::2], rotary[..., 1::2]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(rotary.shape)
    return jnp.concatenate([plain, rotated], axis=-1)


def factors(cos_ref: Any, sin_ref: Any, row: jax.Array, column: jax.Array, plain: int, inverse: bool) -> tuple[jax.Array, ...]:
    """Factors of each column and of its partner (column ^ 1): cosine and signed sine, float32 [n] each.

    The first `plain` columns do not rotate; their factors are 1 and 0. Padding columns get arbitrary values.

    Args:
        cos_ref, sin_ref: references of [M, R/2].
        row: int32, the row in the table.
        column: int32 [n].
        plain: static, number of columns before the rotary ones.
        inverse: static, rotate by the negative angles.
    """
    rotary = column >= plain
    pair = jnp.clip((column - plain) >> 1, 0, cos_ref.shape[1] - 1)
    row = jnp.broadcast_to(row, column.shape)
    cos = plt.load(cos_ref.at[row, pair], mask=rotary, other=1.0)
    sin = plt.load(sin_ref.at[row, pair], mask=rotary, other=0.0)
    first = (column & 1) == 0
    return cos, jnp.where(first != inverse, -sin, sin)


def rotate_columns(x: jax.Array, partner: jax.Array, cos: jax.Array, sin: jax.Array, *, interpret: bool) -> jax.Array:
    """Rotate x [..., n], given each column's partner and the factors [n]. Rounds the same way in every kernel."""
    cos, sin = jnp.broadcast_to(cos, x.shape), jnp.broadcast_to(sin, x.shape)
    return arithmetic.fma(x, cos, arithmetic.multiply(partner, sin, interpret=interpret), interpret=interpret)

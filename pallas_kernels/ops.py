"""The products that the model is made of: shapes are checked here, and here a path is chosen."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import reference
from pallas_kernels.formats import Q8_0

Weight = jax.Array | Q8_0


def matmul(x: jax.Array, weight: Weight) -> jax.Array:
    """Multiply activations with a weight matrix that stays as it is stored.

    Args:
        x: float32 [M, K] activations.
        weight: [N, K], float32, bfloat16 or Q8_0.

    Returns:
        float32 [M, N].

    Raises:
        ValueError: x is not a float32 matrix, or its K is not the weight's.
    """
    if x.ndim != 2 or x.dtype != jnp.float32:
        raise ValueError(f"x is {x.dtype}{list(x.shape)}; matmul takes float32 [M, K]")
    if len(weight.shape) != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight is {list(weight.shape)}, x is {list(x.shape)}; K must agree in [N, K] and [M, K]")
    return reference.matmul(x, weight)


def grouped_matmul(x: jax.Array, weight: Weight) -> jax.Array:
    """Multiply each group of the activations with its own rows of one weight matrix.

    Args:
        x: float32 [M, groups, K].
        weight: [groups·N, K], group after group.

    Returns:
        float32 [M, groups, N].

    Raises:
        ValueError: the weight's rows do not divide into the groups, or K differs.
    """
    m, groups, k = x.shape
    if weight.shape[0] % groups or weight.shape[1] != k:
        raise ValueError(f"weight is {list(weight.shape)}; {groups} groups of [N, {k}] rows are needed")
    w_GNK = reference.as_float32(weight).reshape(groups, -1, k)
    return jnp.einsum("mgk,gnk->mgn", x, w_GNK, preferred_element_type=jnp.float32)

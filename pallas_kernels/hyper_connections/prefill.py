"""Gates of the streams for many rows, with a lane for each row.

The Sinkhorn rounds are sixteen numbers of a row. As operations of their own they would be four launches a round.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.hyper_connections.gates import MIXES, STREAMS, mixing, sigmoid

NAME = "hc_gates"
# Rows of a program.
LANES = 128
WARPS = 4
# Index of the scale of each projection.
SCALE = [0] * STREAMS + [1] * STREAMS + [2] * STREAMS**2


def _kernel(mixes: Any, scale: Any, base: Any, pre: Any, post: Any, comb: Any, *, iterations: int, eps: float) -> None:
    row = pl.program_id(0) * LANES + jnp.arange(LANES, dtype=jnp.int32)
    real = row < mixes.shape[0]

    def load(i: int) -> jax.Array:
        return plt.load(mixes.at[row, jnp.full_like(row, i)], mask=real, other=0.0)

    def store(ref: Any, values: list[jax.Array]) -> None:
        for i, value in enumerate(values):
            plt.store(ref.at[row, jnp.full_like(row, i)], value, mask=real)

    gates = [load(i) * scale[SCALE[i]] + base[i] for i in range(MIXES)]
    store(pre, [sigmoid(gate) + eps for gate in gates[:STREAMS]])
    store(post, [2.0 * sigmoid(gate) for gate in gates[STREAMS : 2 * STREAMS]])
    store(comb, mixing(gates[2 * STREAMS :], iterations, eps))


def split(
    mixes: jax.Array, scale: jax.Array, base: jax.Array, *, iterations: int, eps: float, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Split projections into the weights of four streams before and after a sub-layer.

    Args:
        mixes: float32 [T, 24].
        scale, base: float32 [3] and [24].
        iterations, eps: static.

    Returns:
        pre float32 [T, 4], post float32 [T, 4] and comb float32 [T, 4, 4].

    Source: the meaning is `pallas_kernels.hyper_connections.meaning.split`, which says more about the arguments.
    """
    t = mixes.shape[0]
    shapes = tuple(jax.ShapeDtypeStruct((t, width), jnp.float32) for width in (STREAMS, STREAMS, STREAMS**2))
    pre, post, comb = pl.pallas_call(
        functools.partial(_kernel, iterations=iterations, eps=eps),
        out_shape=shapes,
        grid=(pl.cdiv(t, LANES),),
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name=NAME,
    )(mixes, scale, base)
    return pre, post, comb.reshape(t, STREAMS, STREAMS)

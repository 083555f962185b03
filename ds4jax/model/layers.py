"""The parts that every block uses: linear maps, norms, the embedding."""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels import ops
from pallas_kernels.core import norm
from pallas_kernels.formats import Quantized
from pallas_kernels.linear.cut import Cut, gathered, rows_taken


class Keys(Protocol):
    """A source of random keys for parameters, such as `nnx.Rngs`."""

    def params(self) -> jax.Array:
        """The next key."""


# None makes parameters that have a shape and a type instead of a value. A checkpoint that is loaded gives them values.
Rngs = Keys | None


def parameter(rngs: Rngs, *shape: int, scale: float = 0.0, mean: float = 0.0) -> nnx.Param:
    """A float32 parameter of `shape` with normal random values; loading a checkpoint replaces them."""
    if rngs is None:
        return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32))
    return nnx.Param(mean + scale * jax.random.normal(rngs.params(), shape, jnp.float32))


def constant(rngs: Rngs, value: np.ndarray) -> nnx.Param:
    """A parameter whose first value is not random."""
    return nnx.Param(jax.ShapeDtypeStruct(value.shape, value.dtype) if rngs is None else jnp.asarray(value))


class RMSNorm(nnx.Module):
    """x [..., D] → weight · x / sqrt(mean(x²) + eps), float32."""

    def __init__(self, dim: int, eps: float, *, rngs: Rngs):
        self.weight = parameter(rngs, dim, mean=1.0)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return norm.rms_norm(x, self.weight.get_value(), self.eps)


class Linear(nnx.Module):
    """x [T, K] → x Wᵀ [T, N]; the weight [N, K] stays in its stored format, float or quantised."""

    def __init__(self, n_out: int, n_in: int, *, rngs: Rngs):
        self.weight = parameter(rngs, n_out, n_in, scale=n_in**-0.5)

    def __call__(self, x: jax.Array, *, strict: bool, decoding: bool = False) -> jax.Array:
        return gathered(self.part(x, strict=strict, decoding=decoding), self.weight.get_value())

    def part(self, x: jax.Array, *, strict: bool, decoding: bool = False) -> jax.Array:
        """The outputs of this device's rows of the weight, [T, N/P]; all of them if it is not cut."""
        return ops.matmul(x, self.weight.get_value(), strict=strict, decoding=decoding)


def together(x: jax.Array, *layers: Linear, strict: bool, decoding: bool = False) -> list[jax.Array]:
    """`part` of several linear maps of the same x [T, K]; one launch where a kernel runs and their formats agree."""
    return ops.matmul_many(x, [layer.weight.get_value() for layer in layers], strict=strict, decoding=decoding)


class GroupedLinear(nnx.Module):
    """x [T, G·K] → [T, G·N]: each group of K inputs has its own N outputs (the low-rank output projection).

    If the weight is cut, x holds the inputs of this device's groups, and the outputs are gathered.
    """

    def __init__(self, groups: int, n_out: int, n_in: int, *, rngs: Rngs):
        self.weight = parameter(rngs, groups * n_out, n_in, scale=n_in**-0.5)

    def __call__(self, x: jax.Array, *, strict: bool, decoding: bool = False) -> jax.Array:
        weight = self.weight.get_value()
        x_TGK = x.reshape(x.shape[0], -1, weight.shape[-1])
        y_TGN = ops.grouped_matmul(x_TGK, weight, strict=strict, decoding=decoding)
        return gathered(y_TGN.reshape(x.shape[0], -1), weight)


class Embedding(nnx.Module):
    """Token ids [T] → rows of the table [V, D] in float32."""

    def __init__(self, vocab_size: int, dim: int, *, rngs: Rngs):
        self.weight = parameter(rngs, vocab_size, dim, scale=0.02)

    def __call__(self, ids: jax.Array, after: jax.Array | None = None) -> jax.Array:
        """The rows; `after` as in `rows_taken`."""
        table = self.weight.get_value()
        if isinstance(table, Cut):
            return rows_taken(table, ids, after)
        return table.take(ids).dequantize() if isinstance(table, Quantized) else table[ids].astype(jnp.float32)

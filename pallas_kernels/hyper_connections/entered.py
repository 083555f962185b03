"""What enters a sub-layer: the streams, and its normalised input in every form that weights read."""

from __future__ import annotations

import dataclasses

import jax

from pallas_kernels.formats import BLOCK, Quantized
from pallas_kernels.linear.activation import Activation
from pallas_kernels.linear.activation_k import ORDERS, ActivationK, Order
from pallas_kernels.linear.halves import FloatRows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Entered:
    """The streams and the input of a sub-layer.

    Attributes:
        h: float32 [M, N, D], the streams after the last output was written back.
        parts: float32 [M, 48, slices], partial results of the projections; `mixing_part` reads them.
        x: float32 [M, D], the normalised input.
        halves: float16 [M, 2, D], x as `halves_of` splits it.
        quantized: x in int8 blocks of 32.
        quantized_k: x in int8 blocks of 256, in each of the orders.
        orders: static.
    """

    h: jax.Array
    parts: jax.Array
    x: jax.Array
    halves: jax.Array
    quantized: Activation
    quantized_k: tuple[ActivationK, ...] = ()
    orders: tuple[Order, ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def rows(self) -> FloatRows:
        """x for float weights."""
        return FloatRows(self.x, self.halves)

    def quantized_for(self, format: type[Quantized]) -> Activation | ActivationK:
        """x as weights of a format read it; a format of blocks of 256 must have been given to `enter`."""
        return self.quantized if format.BLOCK == BLOCK else self.quantized_k[self.orders.index(ORDERS[format])]

"""Weights that are cut along their outputs, a part for each device of a mesh. Everything here runs inside `jax.shard_map`.

A product of a cut weight makes the outputs of this device's rows, and its sums over K stay on one device. The outputs are then
gathered, which only moves them. A kernel of this package sums each output alone, so it multiplies the device's rows. A product of
XLA may sum in another order when there are fewer outputs: on a CPU the bits of a product of 256 outputs differ from those of its
four quarters. So XLA's products are computed in the shape of the whole, with zeros for the rows of the other devices.

There are two ways to gather, XLA's collectives and, where a program has mailboxes, direct stores. Both only move bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats import Quantized
from pallas_kernels.linear.mailbox_gather import Mail, gather

# The name of the mesh's axis.
AXIS = "devices"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cut:
    """A device's part of a weight [..., N, K].

    Attributes:
        rows: [..., N/P, K]; device i has the i-th part.
        devices: static; P.
        mail: the mailboxes by which its outputs are gathered; None if XLA's collectives do it.
    """

    rows: jax.Array | Quantized
    devices: int = dataclasses.field(metadata={"static": True})
    mail: Mail | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [..., N, K] of the whole weight."""
        *lead, n, k = self.rows.shape
        return (*lead, n * self.devices, k)

    def take(self, index: jax.Array) -> Cut:
        """The same part of the matrices at `index` of a stack [E, N, K]."""
        taken = self.rows.take(index) if isinstance(self.rows, Quantized) else self.rows[index]
        return dataclasses.replace(self, rows=taken)


def rows_of(weight: Any) -> Any:
    """This device's rows of a weight: all of them if it is not cut."""
    return weight.rows if isinstance(weight, Cut) else weight


def filled(weight: Any) -> Any:
    """A weight in the shape of the whole, with zeros in the rows of other devices; one that is not cut stays as it is."""
    if not isinstance(weight, Cut):
        return weight
    if isinstance(weight.rows, Quantized):
        return weight.rows.change_rows(lambda plane, axis: spread(plane, weight, axis))
    return spread(weight.rows, weight, -2)


def spread(y: jax.Array, weight: Any, axis: int = -1) -> jax.Array:
    """A device's part [.., n/P, ..] in its place among zeros, [.., n, ..]; `y` itself if the weight is not cut."""
    if not isinstance(weight, Cut):
        return y
    axis, size = axis % y.ndim, y.shape[axis]
    whole = jnp.zeros((*y.shape[:axis], size * weight.devices, *y.shape[axis + 1 :]), y.dtype)
    return _apart(jax.lax.dynamic_update_slice_in_dim(whole, _apart(y), jax.lax.axis_index(AXIS) * size, axis))


def own_part(y: jax.Array, weight: Any, axis: int = -1) -> jax.Array:
    """This device's part [.., n/P, ..] of outputs [.., n, ..]; `y` itself if the weight is not cut."""
    if not isinstance(weight, Cut):
        return y
    size = y.shape[axis] // weight.devices
    return _apart(jax.lax.dynamic_slice_in_dim(_apart(y), jax.lax.axis_index(AXIS) * size, size, axis))


def _apart(y: jax.Array) -> jax.Array:
    """Keeps a slice out of what XLA fuses: a sum over a row that is fused with a slice has another order."""
    return jax.lax.optimization_barrier(y)


def completed(y: jax.Array, weight: Any) -> jax.Array:
    """Outputs [.., n] of all devices, from outputs [.., n] whose own part alone is right; `y` if the weight is not cut."""
    return gathered(own_part(y, weight), weight)


def gathered(y: jax.Array, weight: Any) -> jax.Array:
    """Outputs [.., n] of all devices from each one's part [.., n/P]; `y` itself if the weight is not cut."""
    if not isinstance(weight, Cut):
        return y
    if weight.mail:
        [whole] = gather([y.reshape(-1, y.shape[-1])], weight.mail)
        return whole.reshape(*y.shape[:-1], -1)
    whole = jax.lax.all_gather(y, AXIS, axis=y.ndim - 1, tiled=True)
    return whole


def gathered_together(parts: Sequence[jax.Array], weight: Any) -> list[jax.Array]:
    """`gathered` of several outputs [T, n/P], of any numbers of rows T, in one exchange."""
    if not isinstance(weight, Cut):
        return list(parts)
    if weight.mail:
        return gather(parts, weight.mail)
    all_PN = jax.lax.all_gather(jnp.concatenate([part.reshape(-1) for part in parts]), AXIS)
    ends = np.cumsum([part.size for part in parts])
    pieces = zip(jnp.split(all_PN, ends[:-1], axis=1), parts, strict=True)
    # Columns of one device stand next to those of the next one.
    return [jnp.moveaxis(piece.reshape(-1, *part.shape), 0, 1).reshape(len(part), -1) for piece, part in pieces]


def rows_taken(table: Cut, index_T: jax.Array, after: jax.Array | None = None) -> jax.Array:
    """Rows float32 [T, K] of a cut table [V, K]: each device looks up its own, and the rows are gathered.

    Args:
        after: what the gather before led to, if the index does not depend on it; mailboxes wait for it.
    """
    size = table.rows.shape[0]
    place_T = jnp.clip(index_T - jax.lax.axis_index(AXIS) * size, 0, size - 1)
    rows = table.rows.take(place_T).dequantize() if isinstance(table.rows, Quantized) else table.rows[place_T]
    rows, owner_T, count = rows.astype(jnp.float32), index_T // size, jnp.arange(len(index_T))
    if table.mail:
        [whole] = gather([rows], table.mail, after)
        return whole.reshape(len(rows), table.devices, -1)[count, owner_T]
    return jax.lax.all_gather(rows, AXIS)[owner_T, count]

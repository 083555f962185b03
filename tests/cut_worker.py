"""A process with eight devices: products of cut weights, and attention with nothing cut. Prints bits as JSON.

Usage: cut_worker.py DEVICES...; their number is a power of two up to eight.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels import ops
from pallas_kernels.attention.meaning import attend
from pallas_kernels.core.norm import rms_scale
from pallas_kernels.experts.meaning import gathered as experts
from pallas_kernels.experts.meaning import one_by_one
from pallas_kernels.formats import Q8_0, Quantized
from pallas_kernels.formats.base import row_axes
from pallas_kernels.linear.cut import AXIS, Cut, gathered, own_part, rows_taken, spread

ROWS, OUTPUTS, INPUTS, EXPERTS = 5, 256, 64, 3


def stored(values: np.ndarray, form: str) -> Any:
    """A weight as numbers or as Q8_0."""
    return Q8_0.from_bytes(Q8_0.encode(values)) if form == "Q8_0" else jnp.asarray(values)


def cases() -> Iterator[tuple[str, Callable[..., jax.Array], tuple[Any, ...], tuple[Any, ...]]]:
    """Names, functions, their weights that can be cut, and their other arguments."""
    random = np.random.default_rng(0)
    numbers = functools.partial(random.standard_normal, dtype=np.float32)
    x, stacked = numbers((ROWS, INPUTS)), numbers((ROWS, 8, INPUTS))
    chosen, share = random.integers(0, EXPERTS, (ROWS, 2), np.int32), random.random((ROWS, 2), np.float32)
    for form in ("float32", "Q8_0"):
        weight = stored(numbers((OUTPUTS, INPUTS)), form)
        stacks = tuple(stored(numbers((EXPERTS, INPUTS, INPUTS)), form) for _ in range(3))
        for strict in (False, True):

            def product(w: Any, x: jax.Array, strict: bool = strict) -> jax.Array:
                return gathered(ops.matmul(x, w, strict=strict), w)

            def by_groups(w: Any, x: jax.Array, strict: bool = strict) -> jax.Array:
                own = 8 // w.devices if isinstance(w, Cut) else 8
                x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(AXIS) * own, own, 1) if own < 8 else x
                return gathered(ops.grouped_matmul(x, w, strict=strict).reshape(ROWS, -1), w)

            yield f"product {form} {strict}", product, (weight,), (x,)
            yield f"groups {form} {strict}", by_groups, (weight,), (stacked,)
        for route in (experts, one_by_one):

            def routed(gate: Any, up: Any, down: Any, *those: jax.Array, route: Any = route) -> jax.Array:
                return gathered(route(*those, gate, up, down, limit=7.0), down)

            yield f"{route.__name__} {form}", routed, stacks, (x, chosen, share)
        yield f"rows {form}", taken, (weight,), (chosen[:, 0] + 90,)

    def heads(w: Any, x: jax.Array) -> jax.Array:
        q = ops.matmul(x, w, strict=False, decoding=True).reshape(len(x), -1, 128)
        return gathered((q * own_part(rms_scale(spread(q, w, 1), 1e-6), w, 1)).reshape(len(x), -1), w)

    yield "norm of heads", heads, (stored(numbers((1024, INPUTS)), "Q8_0"),), (numbers((6, INPUTS)),)
    segments = numbers((24, INPUTS)), numbers((ROWS, 16, INPUTS))
    seen = np.tril(np.ones((ROWS, 24), bool)), np.ones((ROWS, 16), bool)

    def attention(q: jax.Array, *rows: jax.Array) -> jax.Array:
        return attend(q, list(zip(rows[:2], rows[2:], strict=True)), q[0, :, 0], 0.125)[0]

    yield "attention", attention, (), (stacked, *segments, *seen)


def taken(table: Any, index: jax.Array) -> jax.Array:
    """Rows of a table."""
    if isinstance(table, Cut):
        return rows_taken(table, index)
    return table.take(index).dequantize() if isinstance(table, Quantized) else table[index]


def specs(weight: Any) -> Any:
    """How each plane of a weight is cut."""
    planes, tree = jax.tree.flatten(weight)
    axes = row_axes(type(weight)) if isinstance(weight, Quantized) else (-2,)
    return jax.tree.unflatten(
        tree, [PartitionSpec(*[None] * (plane.ndim + axis), AXIS) for plane, axis in zip(planes, axes, strict=True)]
    )


def measured(count: int) -> dict[str, str]:
    """The bits of every case on so many devices."""
    found = {}
    for name, function, weights, others in cases():
        if count == 1:
            made = jax.jit(function)(*weights, *others)
        else:

            def each(weights: Any, others: Any, function: Any = function) -> jax.Array:
                return function(*(Cut(weight, count) for weight in weights), *others)

            mesh = Mesh(np.array(jax.devices()[:count]), (AXIS,))
            how = {"in_specs": (tuple(map(specs, weights)), PartitionSpec()), "out_specs": PartitionSpec()}
            made = jax.jit(jax.shard_map(each, mesh=mesh, check_vma=False, **how))(weights, others)
        found[name] = np.asarray(made).tobytes().hex()
    return found


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    print(json.dumps({count: measured(count) for count in map(int, sys.argv[1:])}))

"""The products that the model is made of: shapes are checked here, and the gate's choice is carried out here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import activation, reference
from pallas_kernels.activation import Activation
from pallas_kernels.bundle import Part, launch
from pallas_kernels.dispatch import DECODE_ROWS, choose
from pallas_kernels.formats import BLOCK, Q8_0
from pallas_kernels.q8_matmul import MOST_ROWS, q8_part
from pallas_kernels.tiles import tile_for

Weight = jax.Array | Q8_0
MOST_TILE_VALUES = 1 << 25


def matmul(x: jax.Array, weight: Weight, *, strict: bool, implementation: str | None = None) -> jax.Array:
    """Multiply activations with a weight matrix that stays as it is stored.

    Args:
        x: float32 [M, K] activations, M at least 1.
        weight: [N, K], float32, bfloat16, float16 or Q8_0.
        strict: static. True multiplies float32 values by `jnp.dot` at highest precision and one fixed row count, and puts no
            Pallas kernel into the program. False reads Q8_0 weights in int8 with activations in int8 blocks of 32 where there
            are few rows: on CUDA by the share-warp kernel, elsewhere by the same arithmetic in jnp. With many rows it multiplies
            them out, on CUDA to bfloat16 as the activations are then too, elsewhere to float32.
        implementation: static; "pallas", "xla" or "interpret" takes that path or fails.

    Returns:
        float32 [M, N].

    Raises:
        ValueError: x is not a float32 matrix or has no rows, its K is not the weight's, or the implementation is unknown or
            cannot serve this product.
    """
    return matmul_many(x, [weight], strict=strict, implementation=implementation)[0]


def matmul_many(x: jax.Array, weights: Sequence[Weight], *, strict: bool, implementation: str | None = None) -> list[jax.Array]:
    """`matmul` of the same activations with several weights, one launch for all where the kernel runs.

    Args:
        x: float32 [M, K].
        weights: [N, K] each.

    Returns:
        float32 [M, N] for each weight.

    Raises:
        ValueError: as for `matmul`.
    """
    if x.ndim != 2 or x.dtype != jnp.float32 or x.shape[0] < 1:
        raise ValueError(f"x is {x.dtype}{list(x.shape)}; it must be float32 [M, K] with M at least 1")
    if not weights:
        raise ValueError("weights is empty; give at least one")
    for weight in weights:
        if len(weight.shape) != 2 or weight.shape[1] != x.shape[1]:
            raise ValueError(f"weight is {list(weight.shape)} and x is {list(x.shape)}; K must agree in [N, K] and [M, K]")
    if len({isinstance(weight, Q8_0) for weight in weights}) > 1:
        return [matmul(x, weight, strict=strict, implementation=implementation) for weight in weights]
    outputs = _products(x[:, None, :], tuple(weights), strict, implementation)
    return [y[:, 0] for y in outputs]


def grouped_matmul(x: jax.Array, weight: Weight, *, strict: bool, implementation: str | None = None) -> jax.Array:
    """Multiply each group of the activations with its own rows of one weight matrix.

    Args:
        x: float32 [M, C, K] with C groups.
        weight: [C·N, K], group after group.
        strict, implementation: as for `matmul`.

    Returns:
        float32 [M, C, N].

    Raises:
        ValueError: as for `matmul`, or the weight's rows do not divide into the groups.
    """
    if x.ndim != 3 or x.dtype != jnp.float32 or x.shape[0] < 1:
        raise ValueError(f"x is {x.dtype}{list(x.shape)}; it must be float32 [M, C, K] with M at least 1")
    if len(weight.shape) != 2 or weight.shape[1] != x.shape[2] or weight.shape[0] % x.shape[1]:
        raise ValueError(f"weight is {list(weight.shape)}; {x.shape[1]} groups of [N, {x.shape[2]}] rows are needed")
    return _products(x, (weight,), strict, implementation)[0]


def _products(x: jax.Array, weights: tuple[Weight, ...], strict: bool, implementation: str | None) -> tuple[jax.Array, ...]:
    """x [M, C, K] times each [C·N, K] by the path that the gate chooses: [M, C, N] each."""
    half = all(not isinstance(weight, Q8_0) and weight.dtype.itemsize == 2 for weight in weights)
    choice = choose(x.shape[0], isinstance(weights[0], Q8_0), half=half, strict=strict, implementation=implementation)
    paths: dict[str, Callable[..., tuple[jax.Array, ...]]] = {
        "pallas": functools.partial(_share_warp, interpret=False),
        "interpret": functools.partial(_share_warp, interpret=True),
        "xla": _quantized,
        "dot": functools.partial(_dots, strict=strict),
        "bfloat16": _narrow_dots,
        "three bfloat16": _split_dots,
    }
    if choice.cuda == choice.default:
        return paths[choice.cuda](x, weights)
    outputs: tuple[jax.Array, ...] = jax.lax.platform_dependent(
        x, weights, cuda=paths[choice.cuda], default=paths[choice.default]
    )
    return outputs


@functools.partial(jax.jit, static_argnames="interpret", inline=True)
def _share_warp(x: jax.Array, weights: tuple[Q8_0, ...], *, interpret: bool) -> tuple[jax.Array, ...]:
    """The kernel in launches of at most 8 rows. Traced once for each shape and inlined, since layers repeat shapes."""
    m, groups, _ = x.shape
    parts = []
    for first in range(0, m, MOST_ROWS):
        rows = x[first : first + MOST_ROWS]
        quants = activation.quantize(rows.reshape(rows.shape[0], -1), groups, interpret=interpret)
        parts.append(quantized_products(quants, weights, groups=groups, interpret=interpret))
    outputs = (jnp.concatenate(part) if len(part) > 1 else part[0] for part in zip(*parts, strict=True))
    return tuple(y.reshape(m, groups, -1) for y in outputs)


def quantized_part(x: Activation, weights: Sequence[Q8_0], *, groups: int = 1, interpret: bool = False) -> Part:
    """The share-warp kernel with the tile measured for this device; the arguments are those of `q8_matmul`."""
    m, _, blocks = x.scales.shape
    device_kind = "" if interpret else jax.devices()[0].device_kind
    tile = tile_for(tuple(weight.shape[0] // groups for weight in weights), blocks * BLOCK, groups, m, device_kind)
    return q8_part(x, weights, tile=tile, groups=groups, interpret=interpret)


def quantized_products(x: Activation, weights: Sequence[Q8_0], *, groups: int = 1, interpret: bool = False) -> list[jax.Array]:
    """`quantized_part` as a launch of its own."""
    return launch([quantized_part(x, weights, groups=groups, interpret=interpret)], warps=1, interpret=interpret)[0]


def _quantized(x: jax.Array, weights: tuple[Q8_0, ...]) -> tuple[jax.Array, ...]:
    return tuple(reference.quantized_dot(x, weight) for weight in weights)


def _dots(x: jax.Array, weights: tuple[Weight, ...], *, strict: bool) -> tuple[jax.Array, ...]:
    return tuple(_dot(x, weight, strict) for weight in weights)


def _dot(x: jax.Array, weight: Weight, strict: bool) -> jax.Array:
    """Multiply out the weight and use the library's product; a large weight for many rows is multiplied out in tiles."""
    dot = _fixed_rows if strict else reference.dot
    if not isinstance(weight, Q8_0) or (strict and x.shape[0] <= DECODE_ROWS):
        return dot(x, reference.as_float32(weight).reshape(x.shape[1], -1, x.shape[2]))
    return _multiplied_out(x, weight, dot, jnp.float32)


def _narrow_dots(x: jax.Array, weights: tuple[Q8_0, ...]) -> tuple[jax.Array, ...]:
    """In bfloat16 with float32 sums; the precision is said, since the program's own is the highest."""
    dot, narrow = functools.partial(reference.dot, precision=jax.lax.Precision.DEFAULT), x.astype(jnp.bfloat16)
    return tuple(_multiplied_out(narrow, weight, dot, jnp.bfloat16) for weight in weights)


def _split_dots(x: jax.Array, weights: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Nearly float32: each operand as the sum of two bfloat16 numbers, and all their products but that of the small parts."""
    dot = functools.partial(reference.dot, precision=jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3)
    return tuple(dot(x, weight.astype(jnp.float32).reshape(x.shape[1], -1, x.shape[2])) for weight in weights)


def _multiplied_out(x: jax.Array, weight: Q8_0, dot: Callable[..., jax.Array], dtype: Any) -> jax.Array:
    """The library's product x [M, C, K] with a weight multiplied out to a type, in tiles of rows when it is large."""
    m, groups, k = x.shape
    tiles = _tiles(weight, groups)
    if tiles == 1:
        return dot(x, weight.dequantize(dtype).reshape(groups, -1, k))
    rows = weight.shape[0] // tiles
    quants = jnp.moveaxis(weight.quants.reshape(2, tiles, rows, *weight.quants.shape[2:]), 1, 0)
    scales = weight.scales.reshape(tiles, rows, -1)

    def one(tile: tuple[jax.Array, jax.Array]) -> jax.Array:
        return dot(x, Q8_0(*tile).dequantize(dtype)[None])

    y_tiles = jax.lax.map(one, (quants, scales))
    return jnp.moveaxis(y_tiles, 0, 2).reshape(m, groups, -1)


def _tiles(weight: Q8_0, groups: int) -> int:
    """Into how many tiles of rows a quantised weight is cut, so that no tile has too many values."""
    if groups > 1:
        return 1
    n, k = weight.shape
    return next(tiles for tiles in range(1, n + 1) if n % tiles == 0 and (n // tiles * k <= MOST_TILE_VALUES or tiles == n))


def _fixed_rows(x: jax.Array, w: jax.Array) -> jax.Array:
    """Always eight rows at a time, so that the library cannot choose another algorithm for another number of rows."""
    m = x.shape[0]
    parts = jnp.pad(x, ((0, -m % MOST_ROWS), (0, 0), (0, 0))).reshape(-1, MOST_ROWS, *x.shape[1:])
    dot = functools.partial(reference.dot, w=w, precision=jax.lax.Precision.HIGHEST)
    if m <= DECODE_ROWS:
        return jnp.concatenate([dot(part) for part in parts])[:m]
    y = jax.lax.map(dot, parts)
    return y.reshape(-1, *y.shape[2:])[:m]

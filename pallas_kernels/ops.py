"""Matrix products of the model. Checks shapes and runs the path that the gate (`core.dispatch`) chooses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.core.dispatch import DECODE_ROWS, choose
from pallas_kernels.core.launch import Part, launch
from pallas_kernels.core.limits import MAX_ROWS
from pallas_kernels.core.tiles import tile_for
from pallas_kernels.formats import BLOCK, Q8_0, Quantized
from pallas_kernels.linear import meaning
from pallas_kernels.linear.activation import Activation
from pallas_kernels.linear.activation_k import ActivationK
from pallas_kernels.linear.cut import Cut, filled, own_part, rows_of, spread
from pallas_kernels.linear.lane_matmul import lane_part
from pallas_kernels.linear.lane_row import quantize_for
from pallas_kernels.linear.meaning import Weight
from pallas_kernels.linear.q8_matmul import q8_part

# Values of a large weight that are dequantised at a time.
MAX_TILE_VALUES = 1 << 25
# Paths of the gate that run kernels.
KERNELS = ("pallas", "interpret")
# Products [M, C, N] of x [M, C, K] and several weights.
Path = Callable[..., tuple[jax.Array, ...]]


def matmul(
    x: jax.Array, weight: Weight | Cut, *, strict: bool, decoding: bool = False, implementation: str | None = None
) -> jax.Array:
    """Multiply activations by a weight matrix in its stored format.

    Args:
        x: float32 [M, K] activations, M at least 1.
        weight: [N, K], float32, bfloat16, float16 or of any quantised format. Of a cut weight only the outputs of this device's
            rows are made.
        strict: static. True uses `jnp.dot` on float32 values, at highest precision and one fixed row count, and no Pallas
            kernel. False depends on the number of rows. Up to 32 rows, and for any number of rows with `decoding`, quantised
            weights are read as integers and multiplied by activations in int8 blocks of 32 or 256, as the format asks: on CUDA by
            a kernel if the format has one, otherwise by the same arithmetic in jnp. With more rows the weights are dequantised:
            on CUDA to bfloat16, like the activations, elsewhere to float32.
        decoding: static; the rows are a decode step's, so that their arithmetic may not depend on their number.
        implementation: static; "pallas", "xla" or "interpret" takes that path or fails.

    Returns:
        float32 [M, N].

    Raises:
        ValueError: x is not a float32 matrix, x has no rows, its K differs from the weight's, or the implementation is unknown
            or does not support this product.
    """
    return matmul_many(x, [weight], strict=strict, decoding=decoding, implementation=implementation)[0]


def matmul_many(
    x: jax.Array, weights: Sequence[Weight | Cut], *, strict: bool, decoding: bool = False, implementation: str | None = None
) -> list[jax.Array]:
    """`matmul` of the same activations with several weights. A kernel computes all of them in one launch if their formats agree.

    Args:
        x: float32 [M, K].
        weights: [N, K] each.

    Returns:
        float32 [M, N] for each weight.

    Raises:
        ValueError: `weights` is empty; otherwise as for `matmul`.
    """
    if x.ndim != 2 or x.dtype != jnp.float32 or x.shape[0] < 1:
        raise ValueError(f"x is {x.dtype}{list(x.shape)}; it must be float32 [M, K] with M at least 1")
    if not weights:
        raise ValueError("weights is empty; give at least one")
    for weight in weights:
        if len(weight.shape) != 2 or weight.shape[1] != x.shape[1]:
            raise ValueError(f"weight is {list(weight.shape)} and x is {list(x.shape)}; K must agree in [N, K] and [M, K]")
    if len({(_format(weight), isinstance(weight, Cut)) for weight in weights}) > 1:
        return [matmul(x, weight, strict=strict, decoding=decoding, implementation=implementation) for weight in weights]
    outputs = _products(x[:, None, :], tuple(weights), strict, decoding, implementation)
    return [y[:, 0] for y in outputs]


def grouped_matmul(
    x: jax.Array, weight: Weight | Cut, *, strict: bool, decoding: bool = False, implementation: str | None = None
) -> jax.Array:
    """Multiply each group of the activations by its own rows of one weight matrix.

    Args:
        x: float32 [M, C, K] with C groups.
        weight: [C·N, K], group after group. Of a cut weight, C counts this device's groups.
        strict, decoding, implementation: as for `matmul`.

    Returns:
        float32 [M, C, N].

    Raises:
        ValueError: the number of weight rows is not a multiple of the groups; otherwise as for `matmul`.
    """
    if x.ndim != 3 or x.dtype != jnp.float32 or x.shape[0] < 1:
        raise ValueError(f"x is {x.dtype}{list(x.shape)}; it must be float32 [M, C, K] with M at least 1")
    if len(weight.shape) != 2 or weight.shape[1] != x.shape[2] or rows_of(weight).shape[0] % x.shape[1]:
        raise ValueError(f"weight is {list(weight.shape)}; {x.shape[1]} groups of [N, {x.shape[2]}] rows are needed")
    return _products(x, (weight,), strict, decoding, implementation, grouped=True)[0]


def _format(weight: Weight | Cut) -> type[Quantized] | None:
    """The weight's format; None if it is a float matrix."""
    rows = rows_of(weight)
    return type(rows) if isinstance(rows, Quantized) else None


def _products(
    x: jax.Array, weights: tuple[Weight | Cut, ...], strict: bool, decoding: bool, implementation: str | None,
    *, grouped: bool = False,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """Products [M, C, N] of x [M, C, K] and each weight [C·N, K], by the path that the gate chooses."""
    half = all(_format(weight) is None and rows_of(weight).dtype.itemsize == 2 for weight in weights)
    format = _format(weights[0])
    choice = choose(x.shape[0], format, half=half, strict=strict, decoding=decoding, implementation=implementation)
    paths: dict[str, Path] = {
        "pallas": functools.partial(_kernels, interpret=False),
        "interpret": functools.partial(_kernels, interpret=True),
        "xla": _quantized,
        "dot": functools.partial(_dots, strict=strict),
        "bfloat16": _narrow_dots,
        "three bfloat16": _split_dots,
    }
    if isinstance(weights[0], Cut):
        paths = {name: _of_rows(path, name in KERNELS, grouped) for name, path in paths.items()}
    if choice.cuda == choice.default:
        return paths[choice.cuda](x, weights)
    outputs: tuple[jax.Array, ...] = jax.lax.platform_dependent(
        x, weights, cuda=paths[choice.cuda], default=paths[choice.default]
    )
    return outputs


def _of_rows(path: Path, kernel: bool, grouped: bool) -> Path:
    """A path that makes the outputs of this device's rows of cut weights, see `pallas_kernels.linear.cut`.

    Args:
        kernel: whether the path runs kernels.
        grouped: whether the groups are cut, and not the rows of each.
    """

    def run(x: jax.Array, weights: tuple[Cut, ...]) -> tuple[jax.Array, ...]:
        if kernel:
            return path(x, tuple(weight.rows for weight in weights))
        axis, cut = 1 if grouped else 2, weights[0]
        outputs = path(spread(x, cut, 1) if grouped else x, tuple(map(filled, weights)))
        return tuple(own_part(y, cut, axis) for y in outputs)

    return run


@functools.partial(jax.jit, static_argnames="interpret", inline=True)
def _kernels(x: jax.Array, weights: tuple[Quantized, ...], *, interpret: bool) -> tuple[jax.Array, ...]:
    """Run a kernel on at most 8 rows per launch. Layers repeat shapes, so this is traced once per shape and inlined."""
    m, groups, _ = x.shape
    parts = []
    for first in range(0, m, MAX_ROWS):
        rows = x[first : first + MAX_ROWS]
        quants = quantize_for(rows.reshape(rows.shape[0], -1), type(weights[0]), groups, interpret=interpret)
        parts.append(quantized_products(quants, weights, groups=groups, interpret=interpret))
    outputs = (jnp.concatenate(part) if len(part) > 1 else part[0] for part in zip(*parts, strict=True))
    return tuple(y.reshape(m, groups, -1) for y in outputs)


def product_parts(
    x: Activation | ActivationK, weights: Sequence[Quantized], *, groups: int = 1, interpret: bool = False
) -> list[Part]:
    """Products with weights of one format as launch parts: their outputs together are one for each weight, in order.

    Q8_0 weights share a part, with the tile measured for this device. More than eight rows go in batches, see `core.batches`.
    Arguments as for `q8_matmul` and `lane_matmul`.
    """
    q8 = [weight for weight in weights if isinstance(weight, Q8_0)]
    if not q8 or not isinstance(x, Activation):
        return [lane_part(x, weight, groups=groups, interpret=interpret) for weight in weights]
    m, _, blocks = x.scales.shape
    device_kind = "" if interpret else jax.devices()[0].device_kind
    sizes = tuple(weight.shape[0] // groups for weight in q8)
    tile = tile_for(sizes, blocks * BLOCK, groups, m, device_kind)
    return [q8_part(x, q8, tile=tile, groups=groups, interpret=interpret)]


def quantized_products(
    x: Activation | ActivationK, weights: Sequence[Quantized], *, groups: int = 1, interpret: bool = False
) -> list[jax.Array]:
    """Run `product_parts` in a launch of their own."""
    made = launch(product_parts(x, weights, groups=groups, interpret=interpret), warps=1, interpret=interpret)
    return [y for outputs in made for y in outputs]


def _quantized(x: jax.Array, weights: tuple[Quantized, ...]) -> tuple[jax.Array, ...]:
    return tuple(meaning.quantized_dot(x, weight) for weight in weights)


def _dots(x: jax.Array, weights: tuple[Weight, ...], *, strict: bool) -> tuple[jax.Array, ...]:
    return tuple(_dot(x, weight, strict) for weight in weights)


def _dot(x: jax.Array, weight: Weight, strict: bool) -> jax.Array:
    """Dequantise the weight and use XLA's product. With many rows, a large weight is dequantised in tiles."""
    dot = _fixed_rows if strict else meaning.dot
    if not isinstance(weight, Quantized) or (strict and x.shape[0] <= DECODE_ROWS):
        return dot(x, meaning.as_float32(weight).reshape(x.shape[1], -1, x.shape[2]))
    return _dequantised_dot(x, weight, dot, jnp.float32)


def _narrow_dots(x: jax.Array, weights: tuple[Quantized, ...]) -> tuple[jax.Array, ...]:
    """Products in bfloat16 with float32 sums. The precision is explicit because the program's default is the highest."""
    dot, narrow = functools.partial(meaning.dot, precision=jax.lax.Precision.DEFAULT), x.astype(jnp.bfloat16)
    return tuple(_dequantised_dot(narrow, weight, dot, jnp.bfloat16) for weight in weights)


def _split_dots(x: jax.Array, weights: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    dot = functools.partial(meaning.dot, precision=meaning.NEARLY_FLOAT32)
    return tuple(dot(x, weight.astype(jnp.float32).reshape(x.shape[1], -1, x.shape[2])) for weight in weights)


def _dequantised_dot(x: jax.Array, weight: Quantized, dot: Callable[..., jax.Array], dtype: Any) -> jax.Array:
    """XLA's product of x [M, C, K] and a weight dequantised to `dtype`, in tiles of rows if the weight is large."""
    m, groups, k = x.shape
    tiles = _tiles(weight, groups)
    if tiles == 1:
        return dot(x, weight.dequantize(dtype).reshape(groups, -1, k))

    def one(tile: Quantized) -> jax.Array:
        return dot(x, tile.dequantize(dtype)[None])

    y_tiles = jax.lax.map(one, weight.in_tiles(tiles))
    return jnp.moveaxis(y_tiles, 0, 2).reshape(m, groups, -1)


def _tiles(weight: Quantized, groups: int) -> int:
    """Number of row tiles of a quantised weight; each tile has at most `MAX_TILE_VALUES` values."""
    if groups > 1:
        return 1
    n, k = weight.shape
    return next(tiles for tiles in range(1, n + 1) if n % tiles == 0 and (n // tiles * k <= MAX_TILE_VALUES or tiles == n))


def _fixed_rows(x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiply eight rows at a time, so that XLA cannot choose another algorithm for another number of rows."""
    m = x.shape[0]
    parts = jnp.pad(x, ((0, -m % MAX_ROWS), (0, 0), (0, 0))).reshape(-1, MAX_ROWS, *x.shape[1:])
    dot = functools.partial(meaning.dot, w=w, precision=jax.lax.Precision.HIGHEST)
    if m <= DECODE_ROWS:
        return jnp.concatenate([dot(part) for part in parts])[:m]
    y = jax.lax.map(dot, parts)
    return y.reshape(-1, *y.shape[2:])[:m]

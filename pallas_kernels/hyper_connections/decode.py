"""Hyper-connections of a decode step: from a sub-layer's output to the next sub-layer's quantised input, in two launches.

In the first launch each program writes the output back into a slice of the streams' columns and projects the slice. Each program
of the second launch sums the slices' partial results itself. They also contain the products of the streams with each other, which
give the root mean square of any weighted sum of the streams. So a program can normalise its columns of the sub-layer's input
without reading the others. The weights for writing the sub-layer's output back (post and comb) are computed in a launch together
with the sub-layer, because the Sinkhorn rounds are a long chain of operations on few numbers.

Source: manifold-constrained hyper-connections as in the V4 report and the reference code's `hc_split_sinkhorn`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.core.launch import TRAFFIC, Part
from pallas_kernels.formats import BLOCK, HALF, Q8_0, WORDS, Quantized
from pallas_kernels.hyper_connections.entered import Entered
from pallas_kernels.hyper_connections.gates import MIXES, STREAMS, Row, mixing, sigmoid
from pallas_kernels.linear import activation_k
from pallas_kernels.linear.activation import Activation, quantize_blocks
from pallas_kernels.linear.activation_k import ORDERS, ActivationK, Order
from pallas_kernels.linear.halves import halves_of

MIX, ENTER, SINKHORN = "hc_mix", "hc_enter", "hc_sinkhorn"
# Columns per program of the two launches.
SLICE, COLUMNS = 64, 256
MIX_WARPS = 2
# Partial results of a slice: up to 32 projections, then the products of streams i and j.
PARTS, PRODUCTS = 48, 32
PAIRS = [(i, j) for i in range(STREAMS) for j in range(i, STREAMS)]


def _write_stream(h: Row, outputs: Row, post: jax.Array, comb: Row) -> jax.Array:
    """A target stream after the sum of the outputs was written back; `comb` has the weight of each source stream."""
    mixed = comb[0] * h[0]
    for weight, stream in zip(comb[1:], h[1:], strict=True):
        mixed = mixed + weight * stream
    return post * functools.reduce(jnp.add, outputs) + mixed


def _mix_kernel(h_ref: Any, fn_ref: Any, post_ref: Any, comb_ref: Any, *refs: Any, mixes: int, width: int) -> None:
    *output_refs, new_ref, parts_ref = refs
    row, part = pl.program_id(0), pl.program_id(1)
    span = pl.ds(part * width, width)
    number = jax.lax.broadcasted_iota(jnp.int32, (PRODUCTS, width), 0)
    column = part * width + jax.lax.broadcasted_iota(jnp.int32, (PRODUCTS, width), 1)
    # Rows past the end of fn repeat its last row and are not used. fn is loaded first, because it comes from memory and the rest
    # from the cache.
    index = jnp.minimum(number, mixes - 1)
    fn = [plt.load(fn_ref.at[index, jnp.full_like(index, j), column]) for j in range(STREAMS)]
    h = [plt.load(h_ref.at[row, jnp.int32(j), span]) for j in range(STREAMS)]
    outputs = [plt.load(ref.at[row, span]) for ref in output_refs]
    new = h
    if outputs:
        gains = [[comb_ref[row, source, target] for source in range(STREAMS)] for target in range(STREAMS)]
        new = [_write_stream(h, outputs, post_ref[row, target], gain) for target, gain in enumerate(gains)]
    products = jnp.zeros((PRODUCTS, width), jnp.float32)
    for weights, stream in zip(fn, new, strict=True):
        products = products + weights.astype(jnp.float32) * stream[None, :]
    _store_parts(parts_ref, row, part, 0, products)
    for i, stream in enumerate(new):
        plt.store(new_ref.at[row, jnp.int32(i), span], stream)
    pair = jax.lax.broadcasted_iota(jnp.int32, (STREAMS * STREAMS, width), 0)
    _store_parts(parts_ref, row, part, PRODUCTS, _select_stream(new, pair // STREAMS) * _select_stream(new, pair % STREAMS))


def _select_stream(streams: Row, number: jax.Array) -> jax.Array:
    """The columns of the stream with each number, [n, width]."""
    chosen = jnp.broadcast_to(streams[0][None, :], number.shape)
    for j, stream in enumerate(streams[1:], 1):
        chosen = jnp.where(number == j, stream[None, :], chosen)
    return chosen


def _store_parts(parts_ref: Any, row: jax.Array, part: jax.Array, first: int, terms: jax.Array) -> None:
    """Sum terms [n, width] over the slice's columns and store them from index `first`."""
    place = first + jax.lax.broadcasted_iota(jnp.int32, terms.shape[:1], 0)
    plt.store(parts_ref.at[row, place, jnp.full_like(place, 0) + part], jnp.sum(terms, axis=1))


@dataclasses.dataclass(frozen=True)
class _Gates:
    """Gates of a row. Every program of the second launch computes the same numbers."""

    row: jax.Array
    parts: Any
    scale: Any
    base: Any
    dim: int
    norm_eps: float

    def sums_of(self, places: Sequence[int]) -> Row:
        """Sum some of the partial results over all slices. All loads start before the first sum."""
        parts = self.parts.shape[2]
        part = jax.lax.broadcasted_iota(jnp.int32, (pl.next_power_of_2(parts),), 0)
        real = None if parts == part.shape[0] else part < parts
        other = None if real is None else 0.0
        loaded = [plt.load(self.parts.at[self.row, jnp.full_like(part, place), part], mask=real, other=other) for place in places]
        return [jnp.sum(values, axis=0) for values in loaded]

    def scale_of(self, squares: Row) -> jax.Array:
        """1 / the root mean square of all streams together, from the sums of their squares."""
        square = functools.reduce(jnp.add, squares) / jnp.float32(STREAMS * self.dim)
        return jax.lax.rsqrt(square + self.norm_eps)

    def gate(self, mix: jax.Array, i: int, scale: int) -> jax.Array:
        """Projection i of the normalised streams, times its scale, plus its base."""
        return mix * self.scale[scale] + self.base[i]

    def norm(self, pre: Row, products: dict[tuple[int, int], jax.Array]) -> jax.Array:
        """1 / the root mean square of the weighted sum of the streams."""
        total = jnp.float32(0.0)
        for (i, j), product in products.items():
            total = total + pre[i] * pre[j] * product * jnp.float32(1.0 if i == j else 2.0)
        # Rounding can make the sum negative if the streams cancel.
        return jax.lax.rsqrt(jnp.maximum(total / jnp.float32(self.dim), 0.0) + self.norm_eps)


def _enter_kernel(
    h_ref: Any, parts_ref: Any, scale_ref: Any, base_ref: Any, weight_ref: Any, *refs: Any,
    eps: float, norm_eps: float, orders: tuple[Order, ...], interpret: bool,
) -> None:  # fmt: skip
    gates = _Gates(pl.program_id(0), parts_ref, scale_ref, base_ref, h_ref.shape[2], norm_eps)
    _store_input(gates, h_ref, weight_ref, refs, eps, orders, interpret, pl.program_id(1))


def _store_input(
    gates: _Gates, h_ref: Any, weight_ref: Any, refs: Sequence[Any], eps: float, orders: tuple[Order, ...], interpret: bool,
    part: jax.Array,
) -> None:  # fmt: skip
    """Store some columns of the sub-layer's input, and their quantised blocks."""
    x_ref, halves_ref, q_ref, s_ref, *k_refs = refs
    row = gates.row

    def loaded(place: jax.Array) -> Row:
        column = part * COLUMNS + place
        streams = [plt.load(h_ref.at[row, jnp.full_like(column, j), column]) for j in range(STREAMS)]
        return [*streams, plt.load(weight_ref.at[column]).astype(jnp.float32)]

    shape = (COLUMNS // BLOCK, WORDS, 4)
    block, word, byte = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(3))
    place = block * BLOCK + word * 4 + byte
    places = [place, *(activation_k.places(order)[0] for order in orders)]
    columns = [loaded(place) for place in places]
    sums = gates.sums_of([*range(STREAMS), *(PRODUCTS + STREAMS * i + j for i, j in PAIRS)])
    products = dict(zip(PAIRS, sums[STREAMS:], strict=True))
    scale = gates.scale_of([products[j, j] for j in range(STREAMS)])
    pre = [sigmoid(gates.gate(sums[j] * scale, j, 0)) + eps for j in range(STREAMS)]
    norm = gates.norm(pre, products)

    def normed(streams: Row) -> jax.Array:
        *h, weight = streams
        x = pre[0] * h[0]
        for j in range(1, STREAMS):
            x = x + pre[j] * h[j]
        return x * norm * weight

    x = normed(columns[0])
    column = part * COLUMNS + place
    plt.store(x_ref.at[row, column], x)
    for i, values in enumerate(halves_of(x)):
        plt.store(halves_ref.at[row, jnp.full_like(column, i), column], values)
    words, scales = quantize_blocks(x, interpret=interpret)
    words = words.reshape(COLUMNS // BLOCK, 2, HALF)
    block, half, word = (jax.lax.broadcasted_iota(jnp.int32, words.shape, axis) for axis in range(3))
    first = part * (COLUMNS // BLOCK)
    plt.store(q_ref.at[row, half, first + block, word], words)
    plt.store(s_ref.at[row, pl.ds(first, COLUMNS // BLOCK)], scales)
    for i, order in enumerate(orders):
        made = activation_k.quantize_block(normed(columns[1 + i]), places[1 + i], interpret=interpret)
        activation_k.store(made, row, part, order, *k_refs[3 * i : 3 * i + 3])


def _store_mixing(gates: _Gates, post_ref: Any, comb_ref: Any, iterations: int, eps: float) -> None:
    """Compute and store post and comb, the weights for writing the sub-layer's output back."""
    sums = gates.sums_of([*range(STREAMS, MIXES), *(PRODUCTS + (STREAMS + 1) * j for j in range(STREAMS))])
    scale = gates.scale_of(sums[-STREAMS:])
    mixes = [mix * scale for mix in sums[:-STREAMS]]
    for k in range(STREAMS):
        post_ref[gates.row, k] = 2.0 * sigmoid(gates.gate(mixes[k], STREAMS + k, 1))
    logits = [gates.gate(mix, place, 2) for place, mix in enumerate(mixes[STREAMS:], 2 * STREAMS)]
    comb = mixing(logits, iterations, eps)
    for i, value in enumerate(comb):
        comb_ref[gates.row, i // STREAMS, i % STREAMS] = value


def _mixed(
    h: jax.Array, fn: jax.Array, outputs: tuple[jax.Array, ...], post: jax.Array | None, comb: jax.Array | None, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """First launch: the streams after the outputs were written back, and the partial results float32 [M, 48, slices]."""
    m, n, dim = h.shape
    if n != STREAMS or dim % COLUMNS or fn.shape[1] != n * dim:
        raise ValueError(
            f"h is {list(h.shape)} and fn {list(fn.shape)}; they must be [M, 4, D] and [rows, 4·D], D a multiple of {COLUMNS}"
        )
    if post is None or comb is None:
        post, comb = jnp.zeros((m, n), jnp.float32), jnp.zeros((m, n, n), jnp.float32)
    width, name = min(SLICE, dim), f"{MIX}_{fn.shape[0]}"
    TRAFFIC[name] = fn.size * fn.dtype.itemsize
    new, parts = pl.pallas_call(
        functools.partial(_mix_kernel, mixes=fn.shape[0], width=width),
        out_shape=(
            jax.ShapeDtypeStruct(h.shape, jnp.float32),
            jax.ShapeDtypeStruct((m, PARTS, dim // width), jnp.float32),
        ),
        grid=(m, dim // width),
        compiler_params=plt.CompilerParams(num_warps=MIX_WARPS, num_stages=1),
        interpret=interpret,
        name=name,
    )(h, fn.reshape(fn.shape[0], n, dim), post, comb, *outputs)
    return new, parts


def _entered(
    new: jax.Array, parts: jax.Array, scale: jax.Array, base: jax.Array, weight: jax.Array, *,
    orders: tuple[Order, ...], interpret: bool, **numbers: Any,
) -> tuple[jax.Array, jax.Array, Activation, tuple[ActivationK, ...]]:  # fmt: skip
    """Second launch: x, its halves, and x in blocks of 32 and in each order in blocks of 256."""
    m, _, dim = new.shape
    blocks = dim // BLOCK
    wanted = (
        jax.ShapeDtypeStruct((m, dim), jnp.float32),
        jax.ShapeDtypeStruct((m, 2, dim), jnp.float16),
        jax.ShapeDtypeStruct((m, 2, blocks, HALF), jnp.int32),
        jax.ShapeDtypeStruct((m, blocks), jnp.float32),
    )
    extra = (shape for order in orders for shape in activation_k.out_shapes(m, dim, order))
    x, halves, quants, scales, *made = pl.pallas_call(
        functools.partial(_enter_kernel, orders=orders, interpret=interpret, **numbers),
        out_shape=(*wanted, *extra),
        grid=(m, dim // COLUMNS),
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name=ENTER,
    )(new, parts, scale, base, weight)
    ordered = (ActivationK(*made[3 * i : 3 * i + 3]) for i in range(len(orders)))
    return x, halves, Activation(quants[:, None], scales[:, None]), tuple(ordered)


def _orders(formats: Sequence[type[Quantized]]) -> tuple[Order, ...]:
    """The distinct orders of the formats of blocks of 256."""
    return tuple(dict.fromkeys(ORDERS[format] for format in formats if format.BLOCK != BLOCK))


def _mixing_body(
    program: jax.Array, inputs: Sequence[Any], outputs: Sequence[Any], *, dim: int, iterations: int, eps: float, norm_eps: float
) -> None:
    parts, scale, base = inputs
    post, comb = outputs
    _store_mixing(_Gates(program, parts, scale, base, dim, norm_eps), post, comb, iterations, eps)


def mixing_part(entered: Entered, scale: jax.Array, base: jax.Array, *, iterations: int, eps: float, norm_eps: float) -> Part:
    """Compute the weights for writing a sub-layer's output back to the streams. One program per row.

    Args:
        entered: the result of `enter` with the same scale, base, eps and norm_eps.
        scale, base: float32 [3] and [24], as for `enter`.
        iterations: static, Sinkhorn rounds.
        eps, norm_eps: static, as for `enter`.

    Returns:
        A launch part with the results post, float32 [M, 4], and comb, float32 [M, source stream, target stream].
    """
    m, n, dim = entered.h.shape
    body = functools.partial(_mixing_body, dim=dim, iterations=iterations, eps=eps, norm_eps=norm_eps)
    shapes = (jax.ShapeDtypeStruct((m, n), jnp.float32), jax.ShapeDtypeStruct((m, n, n), jnp.float32))
    return Part(SINKHORN, m, body, (entered.parts, scale, base), shapes)


@functools.partial(jax.jit, static_argnames=("eps", "norm_eps", "formats", "interpret"))
def enter(
    h: jax.Array, fn: jax.Array, scale: jax.Array, base: jax.Array, norm_weight: jax.Array, *,
    outputs: tuple[jax.Array, ...] = (), post: jax.Array | None = None, comb: jax.Array | None = None,
    eps: float, norm_eps: float, formats: tuple[type[Quantized], ...] = (), interpret: bool = False,
) -> Entered:  # fmt: skip
    """Write the last sub-layer's output back into the streams and prepare the next sub-layer's input. Two launches.

    Args:
        h: float32 [M, 4, D], D a multiple of 256.
        fn: float [24, 4·D], the projections.
        scale, base: float32 [3] and [24]; `meaning.split` says how they are used.
        norm_weight: [D], of the sub-layer's RMS norm.
        outputs: float32 [M, D] each; their sum is written back. Without outputs the streams do not change.
        post, comb: float32 [M, 4] and [M, 4, 4], the results of `mixing_part` for the last sub-layer.
        eps, norm_eps: static; added to the gates, and to the mean squares of both norms.
        formats: static; of the weights that x is multiplied by.

    Raises:
        ValueError: h or fn has another shape.

    Source: the meaning is `pallas_kernels.hyper_connections.meaning`.
    """
    new, parts = _mixed(h, fn, outputs, post, comb, interpret)
    orders = _orders(formats)
    made = _entered(new, parts, scale, base, norm_weight, orders=orders, interpret=interpret, eps=eps, norm_eps=norm_eps)
    return Entered(new, parts, *made, orders)


@functools.partial(jax.jit, static_argnames=("eps", "norm_eps", "format", "interpret"))
def leave(
    h: jax.Array, fn: jax.Array, scale: jax.Array, base: jax.Array, norm_weight: jax.Array, *,
    outputs: tuple[jax.Array, ...] = (), post: jax.Array | None = None, comb: jax.Array | None = None,
    eps: float, norm_eps: float, format: type[Quantized] = Q8_0, interpret: bool = False,
) -> tuple[jax.Array, jax.Array, Activation | ActivationK]:  # fmt: skip
    """Like `enter`, for the head after the last layer, which only sums the streams. Two launches.

    Args:
        fn: float [4, 4·D].
        scale, base: float32 [1] and [4].
        format: static; of the head.

    Returns:
        The streams, their normalised weighted sum float32 [M, D], and the sum as the head reads it.

    Raises:
        ValueError: h or fn has another shape.
    """
    new, parts = _mixed(h, fn, outputs, post, comb, interpret)
    x, _, quantized, ordered = _entered(
        new, parts, scale, base, norm_weight, orders=_orders([format]), interpret=interpret, eps=eps, norm_eps=norm_eps
    )
    return new, x, ordered[0] if ordered else quantized


def write_back(h: jax.Array, *, outputs: tuple[jax.Array, ...], post: jax.Array, comb: jax.Array) -> jax.Array:
    """Write the sum of the outputs [M, D] back into the streams [M, 4, D] after the last layer. One elementwise fusion.

    Args:
        h: float32 [M, 4, D].
        outputs: float32 [M, D] each.
        post, comb: float32 [M, 4] and [M, source stream, target stream].
    """
    streams = [h[:, source, None, :] for source in range(STREAMS)]
    gains = [comb[:, source, :, None] for source in range(STREAMS)]
    return _write_stream(streams, [y[:, None, :] for y in outputs], post[..., None], gains)

"""Hyper-connections of a decode step: from one sub-layer's output to the next one's quantised input in two launches.

The first launch writes the output back into the streams and projects them, a slice of columns a program; the sums over all
columns are left to the second, whose programs each add the slices' parts up for themselves. Beside the projections these are the
products of the streams with each other: they give the root mean square of any weighted sum of the streams, so that a program can
norm its own columns of the sub-layer's input without having seen the others. How the sub-layer's output will be written back is
worked out beside a launch of the sub-layer itself: the Sinkhorn rounds are a long chain of few numbers.

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

from pallas_kernels import activation_k
from pallas_kernels.activation import Activation, quantize_blocks
from pallas_kernels.activation_k import ORDERS, ActivationK
from pallas_kernels.bundle import TRAFFIC, Part
from pallas_kernels.formats import BLOCK, HALF, WORDS, Quantized

MIX, ENTER, SINKHORN = "hc_mix", "hc_enter", "hc_sinkhorn"
STREAMS = 4
# Columns of a program of each launch.
SLICE, COLUMNS = 64, 256
# Where the parts of a slice lie: up to 32 projections, then the products of streams i and j.
PARTS, PRODUCTS = 48, 32
MIXES = STREAMS * (2 + STREAMS)
PAIRS = [(i, j) for i in range(STREAMS) for j in range(i, STREAMS)]

Row = list[jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Entered:
    """What a sub-layer starts from.

    Attributes:
        h: float32 [M, N, D], the streams with the last output in them.
        parts: float32 [M, 48, slices], of which `mixing_part` makes how this sub-layer's output will be written back.
        x: float32 [M, D], its normed input.
        quantized: the same in int8 blocks of 32.
        quantized_k: the same in blocks of 256 in the order of an expert format, where one was asked for.
    """

    h: jax.Array
    parts: jax.Array
    x: jax.Array
    quantized: Activation
    quantized_k: ActivationK | None = None


def _written(h: Row, outputs: Row, post: Any, comb: Any, target: int) -> jax.Array:
    """Columns of the target stream with the outputs in it; `post` and `comb` are references of one row."""
    if not outputs:
        return h[target]
    row, post_ref, comb_ref = pl.program_id(0), post, comb
    mixed = comb_ref[row, 0, target] * h[0]
    for source in range(1, STREAMS):
        mixed = mixed + comb_ref[row, source, target] * h[source]
    return post_ref[row, target] * functools.reduce(jnp.add, outputs) + mixed


def _mix_kernel(h_ref: Any, fn_ref: Any, post_ref: Any, comb_ref: Any, *refs: Any, mixes: int, width: int) -> None:
    *output_refs, new_ref, parts_ref = refs
    row, part = pl.program_id(0), pl.program_id(1)
    span = pl.ds(part * width, width)
    number = jax.lax.broadcasted_iota(jnp.int32, (PRODUCTS, width), 0)
    column = part * width + jax.lax.broadcasted_iota(jnp.int32, (PRODUCTS, width), 1)
    # Rows that fn does not have repeat its last one and are not used. fn comes from memory and all else from the cache, so its
    # loads start first.
    index = jnp.minimum(number, mixes - 1)
    fn = [plt.load(fn_ref.at[index, jnp.full_like(index, j), column]) for j in range(STREAMS)]
    h = [plt.load(h_ref.at[row, jnp.int32(j), span]) for j in range(STREAMS)]
    outputs = [plt.load(ref.at[row, span]) for ref in output_refs]
    new = [_written(h, outputs, post_ref, comb_ref, target) for target in range(STREAMS)]
    products = jnp.zeros((PRODUCTS, width), jnp.float32)
    for weights, stream in zip(fn, new, strict=True):
        products = products + weights.astype(jnp.float32) * stream[None, :]
    _store_parts(parts_ref, row, part, 0, products)
    for i, stream in enumerate(new):
        plt.store(new_ref.at[row, jnp.int32(i), span], stream)
    pair = jax.lax.broadcasted_iota(jnp.int32, (STREAMS * STREAMS, width), 0)
    _store_parts(parts_ref, row, part, PRODUCTS, _of(new, pair // STREAMS) * _of(new, pair % STREAMS))


def _of(streams: Row, number: jax.Array) -> jax.Array:
    """Columns of the stream of each number, [n, width]."""
    chosen = jnp.broadcast_to(streams[0][None, :], number.shape)
    for j, stream in enumerate(streams[1:], 1):
        chosen = jnp.where(number == j, stream[None, :], chosen)
    return chosen


def _store_parts(parts_ref: Any, row: jax.Array, part: jax.Array, first: int, terms: jax.Array) -> None:
    """Sum terms [n, width] over the slice's columns and store them from place `first` on."""
    place = first + jax.lax.broadcasted_iota(jnp.int32, terms.shape[:1], 0)
    plt.store(parts_ref.at[row, place, jnp.full_like(place, 0) + part], jnp.sum(terms, axis=1))


def _sigmoid(x: jax.Array) -> jax.Array:
    return 1.0 / (1.0 + jnp.exp(-x))


def _sinkhorn(c: Row, iterations: int, eps: float) -> Row:
    """Make columns, then rows and columns in turn of a positive 4×4 matrix, sixteen numbers, sum to one."""

    def scaled(c: Row, lines: list[list[int]]) -> Row:
        out = list(c)
        for line in lines:
            inverse = 1.0 / ((c[line[0]] + c[line[1]]) + (c[line[2]] + c[line[3]]) + eps)
            for i in line:
                out[i] = c[i] * inverse
        return out

    rows = [[STREAMS * j + k for k in range(STREAMS)] for j in range(STREAMS)]
    columns = [list(line) for line in zip(*rows, strict=True)]

    def one_round(_: jax.Array, c: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(scaled(scaled(list(c), rows), columns))

    return list(jax.lax.fori_loop(0, iterations - 1, one_round, tuple(scaled(c, columns))))


@dataclasses.dataclass(frozen=True)
class _Turn:
    """What every program of the second launch works out for its row: numbers, the same in all of them."""

    row: jax.Array
    parts: Any
    scale: Any
    base: Any
    dim: int
    norm_eps: float

    def sums_of(self, places: Sequence[int]) -> Row:
        """Some of the slices' parts, each over all slices; every load is on its way before the first sum."""
        parts = self.parts.shape[2]
        part = jax.lax.broadcasted_iota(jnp.int32, (pl.next_power_of_2(parts),), 0)
        there = None if parts == part.shape[0] else part < parts
        other = None if there is None else 0.0
        loaded = [
            plt.load(self.parts.at[self.row, jnp.full_like(part, place), part], mask=there, other=other) for place in places
        ]
        return [jnp.sum(values, axis=0) for values in loaded]

    def scale_of(self, squares: Row) -> jax.Array:
        """1 / the root mean square of all streams together, from their squares."""
        square = functools.reduce(jnp.add, squares) / jnp.float32(STREAMS * self.dim)
        return jax.lax.rsqrt(square + self.norm_eps)

    def gate(self, mix: jax.Array, i: int, scale: int) -> jax.Array:
        """Projection i of the normed streams, scaled and moved."""
        return mix * self.scale[scale] + self.base[i]

    def norm(self, pre: Row, products: dict[tuple[int, int], jax.Array]) -> jax.Array:
        """1 / the root mean square of the weighted sum of the streams."""
        total = jnp.float32(0.0)
        for (i, j), product in products.items():
            total = total + pre[i] * pre[j] * product * jnp.float32(1.0 if i == j else 2.0)
        # Streams that cancel may leave less than nothing.
        return jax.lax.rsqrt(jnp.maximum(total / jnp.float32(self.dim), 0.0) + self.norm_eps)


def _enter_kernel(
    h_ref: Any, parts_ref: Any, scale_ref: Any, base_ref: Any, weight_ref: Any, *refs: Any,
    eps: float, norm_eps: float, format: type[Quantized] | None, interpret: bool,
) -> None:  # fmt: skip
    turn = _Turn(pl.program_id(0), parts_ref, scale_ref, base_ref, h_ref.shape[2], norm_eps)
    _store_input(turn, h_ref, weight_ref, refs, eps, format, interpret, pl.program_id(1))


def _store_input(
    turn: _Turn, h_ref: Any, weight_ref: Any, refs: Sequence[Any], eps: float, format: type[Quantized] | None, interpret: bool,
    part: jax.Array,
) -> None:  # fmt: skip
    """Some columns of the sub-layer's input, and their blocks."""
    x_ref, q_ref, s_ref, *k_refs = refs
    row = turn.row

    def loaded(place: jax.Array) -> Row:
        column = part * COLUMNS + place
        streams = [plt.load(h_ref.at[row, jnp.full_like(column, j), column]) for j in range(STREAMS)]
        return [*streams, plt.load(weight_ref.at[column]).astype(jnp.float32)]

    shape = (COLUMNS // BLOCK, WORDS, 4)
    block, word, byte = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(3))
    place = block * BLOCK + word * 4 + byte
    places = [place] if format is None else [place, activation_k.places(ORDERS[format])[0]]
    columns = [loaded(place) for place in places]
    sums = turn.sums_of([*range(STREAMS), *(PRODUCTS + STREAMS * i + j for i, j in PAIRS)])
    products = dict(zip(PAIRS, sums[STREAMS:], strict=True))
    scale = turn.scale_of([products[j, j] for j in range(STREAMS)])
    pre = [_sigmoid(turn.gate(sums[j] * scale, j, 0)) + eps for j in range(STREAMS)]
    norm = turn.norm(pre, products)

    def normed(streams: Row) -> jax.Array:
        *h, weight = streams
        x = pre[0] * h[0]
        for j in range(1, STREAMS):
            x = x + pre[j] * h[j]
        return x * norm * weight

    x = normed(columns[0])
    plt.store(x_ref.at[row, part * COLUMNS + place], x)
    words, scales = quantize_blocks(x, interpret=interpret)
    words = words.reshape(COLUMNS // BLOCK, 2, HALF)
    block, half, word = (jax.lax.broadcasted_iota(jnp.int32, words.shape, axis) for axis in range(3))
    first = part * (COLUMNS // BLOCK)
    plt.store(q_ref.at[row, half, first + block, word], words)
    plt.store(s_ref.at[row, pl.ds(first, COLUMNS // BLOCK)], scales)
    if format is not None:
        made = activation_k.quantize_block(normed(columns[1]), places[1], interpret=interpret)
        activation_k.store(made, row, part, ORDERS[format], *k_refs)


def _store_mixing(turn: _Turn, post_ref: Any, comb_ref: Any, iterations: int, eps: float) -> None:
    """How the sub-layer's output will be written back."""
    sums = turn.sums_of([*range(STREAMS, MIXES), *(PRODUCTS + (STREAMS + 1) * j for j in range(STREAMS))])
    scale = turn.scale_of(sums[-STREAMS:])
    mixes = [mix * scale for mix in sums[:-STREAMS]]
    for k in range(STREAMS):
        post_ref[turn.row, k] = 2.0 * _sigmoid(turn.gate(mixes[k], STREAMS + k, 1))
    comb = []
    for j in range(STREAMS):
        places = [STREAMS * (2 + j) + k for k in range(STREAMS)]
        logits = [turn.gate(mixes[place - STREAMS], place, 2) for place in places]
        most = functools.reduce(jnp.maximum, logits)
        weights = [jnp.exp(logit - most) for logit in logits]
        total = (weights[0] + weights[1]) + (weights[2] + weights[3])
        comb += [weight / total + eps for weight in weights]
    comb = _sinkhorn(comb, iterations, eps)
    for i, value in enumerate(comb):
        comb_ref[turn.row, i // STREAMS, i % STREAMS] = value


def _mixed(
    h: jax.Array, fn: jax.Array, outputs: tuple[jax.Array, ...], post: jax.Array | None, comb: jax.Array | None, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """First launch: the streams with the outputs in them, and the parts float32 [M, 48, slices]."""
    m, n, dim = h.shape
    if n != STREAMS or dim % COLUMNS or fn.shape[1] != n * dim:
        raise ValueError(
            f"h is {list(h.shape)} and fn {list(fn.shape)}; [M, 4, D] and [rows, 4·D] with D a multiple of {COLUMNS}"
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
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name=name,
    )(h, fn.reshape(fn.shape[0], n, dim), post, comb, *outputs)
    return new, parts


def _entered(
    new: jax.Array, parts: jax.Array, scale: jax.Array, base: jax.Array, weight: jax.Array, *,
    format: type[Quantized] | None, interpret: bool, **numbers: Any,
) -> list[jax.Array]:  # fmt: skip
    """Second launch: x, its quants and scales, and those of the format if there is one."""
    m, _, dim = new.shape
    blocks = dim // BLOCK
    wanted = (
        jax.ShapeDtypeStruct((m, dim), jnp.float32),
        jax.ShapeDtypeStruct((m, 2, blocks, HALF), jnp.int32),
        jax.ShapeDtypeStruct((m, blocks), jnp.float32),
    )
    extra = () if format is None else tuple(activation_k.out_shapes(m, dim, ORDERS[format]))
    made: list[jax.Array] = pl.pallas_call(
        functools.partial(_enter_kernel, format=format, interpret=interpret, **numbers),
        out_shape=(*wanted, *extra),
        grid=(m, dim // COLUMNS),
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name=ENTER,
    )(new, parts, scale, base, weight)
    return made


def _mixing_body(
    program: jax.Array, inputs: Sequence[Any], outputs: Sequence[Any], *, dim: int, iterations: int, eps: float, norm_eps: float
) -> None:
    parts, scale, base = inputs
    post, comb = outputs
    _store_mixing(_Turn(program, parts, scale, base, dim, norm_eps), post, comb, iterations, eps)


def mixing_part(entered: Entered, scale: jax.Array, base: jax.Array, *, iterations: int, eps: float, norm_eps: float) -> Part:
    """How the output of a sub-layer will be written back to its streams, a program for each row.

    Args:
        entered: what `enter` made with the same scale, base, eps and norm_eps.
        iterations: Sinkhorn rounds.

    Returns:
        A part whose results are post, float32 [M, 4], and comb, float32 [M, source stream, target stream].
    """
    m, n, dim = entered.h.shape
    body = functools.partial(_mixing_body, dim=dim, iterations=iterations, eps=eps, norm_eps=norm_eps)
    shapes = (jax.ShapeDtypeStruct((m, n), jnp.float32), jax.ShapeDtypeStruct((m, n, n), jnp.float32))
    return Part(SINKHORN, m, body, (entered.parts, scale, base), shapes)


@functools.partial(jax.jit, static_argnames=("eps", "norm_eps", "format", "interpret"))
def enter(
    h: jax.Array, fn: jax.Array, scale: jax.Array, base: jax.Array, norm_weight: jax.Array, *,
    outputs: tuple[jax.Array, ...] = (), post: jax.Array | None = None, comb: jax.Array | None = None,
    eps: float, norm_eps: float, format: type[Quantized] | None = None, interpret: bool = False,
) -> Entered:  # fmt: skip
    """Write the last sub-layer's output back into the streams and prepare the next one's input: two launches.

    Args:
        h: float32 [M, 4, D], D a multiple of 256.
        fn: float [24, 4·D]; scale [3] and base [24] float32.
        norm_weight: [D], of the sub-layer's RMS norm.
        outputs: float32 [M, D] each, whose sum is written back with post [M, 4] and comb [M, 4, 4]; none leaves the streams.
        eps, norm_eps: of the gates, and of both norms.
        format: of expert weights that will be multiplied with x in blocks of 256; None where there are none.

    Raises:
        ValueError: shapes that do not fit.
    """
    new, parts = _mixed(h, fn, outputs, post, comb, interpret)
    made = _entered(new, parts, scale, base, norm_weight, format=format, interpret=interpret, eps=eps, norm_eps=norm_eps)
    x, quants, scales, *extra = made
    return Entered(new, parts, x, Activation(quants[:, None], scales[:, None]), ActivationK(*extra) if extra else None)


@functools.partial(jax.jit, static_argnames=("eps", "norm_eps", "interpret"))
def leave(
    h: jax.Array, fn: jax.Array, scale: jax.Array, base: jax.Array, norm_weight: jax.Array, *,
    outputs: tuple[jax.Array, ...] = (), post: jax.Array | None = None, comb: jax.Array | None = None,
    eps: float, norm_eps: float, interpret: bool = False,
) -> tuple[jax.Array, jax.Array, Activation]:  # fmt: skip
    """The same before the head, whose fn [4, 4·D], scale [1] and base [4] give the weights of a sum alone: two launches.

    Returns:
        the streams, the normed sum float32 [M, D], and the same in int8 blocks of 32.
    """
    new, parts = _mixed(h, fn, outputs, post, comb, interpret)
    made = _entered(new, parts, scale, base, norm_weight, format=None, interpret=interpret, eps=eps, norm_eps=norm_eps)
    x, quants, scales = made
    return new, x, Activation(quants[:, None], scales[:, None])


def expand(h: jax.Array, *, outputs: tuple[jax.Array, ...], post: jax.Array, comb: jax.Array) -> jax.Array:
    """Streams [M, 4, D] with the sum of the outputs [M, D] written back, one elementwise fusion: stream k gets
    post[k] · y + Σ_j comb[j, k] · h[j].
    """
    mixed = sum(comb[:, j, :, None] * h[:, j, None, :] for j in range(STREAMS))
    return post[..., None] * functools.reduce(jnp.add, outputs)[:, None, :] + mixed

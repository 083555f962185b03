"""The share-warp Q8_0 matmul: every weight block is read once and serves all rows of the activations.

A warp owns a few weight rows. Lane l owns their blocks l, l+32, l+64, ...: it loads a block's eight words in two 16-byte loads,
takes the exact integer dot product with each of the M rows, and adds it to that row's accumulator with one fused multiply-add.
The lanes are summed once, at the end. Neither order depends on M, so row m of any call has the bits of the same row alone, at any
length. The order of the lanes does depend on the tile (measured on an H100), so a product has one tile for every M.

Source of the idea: `matmul_q8_0_preq_batch_share_warp_kernel` of the TrevorS/ds4 engine.
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

from pallas_kernels import arithmetic
from pallas_kernels.activation import Activation
from pallas_kernels.formats import HALF, Q8_0

MOST_ROWS = 8
LANES = 32
NAME = "q8_share_warp"


@dataclasses.dataclass(frozen=True)
class Tile:
    """How many weight rows a program owns, and how many warps share them; it also decides in which order lanes are summed."""

    rows: int = 1
    warps: int = 1


def _value(i: int) -> jax.Array:
    """A Python integer as a traced value: a slice that starts at a constant may not reach past the end, even when masked."""
    return jax.lax.full((), i, jnp.int32)


def _load(ref: Any, *index: Any, real: jax.Array | None, **how: Any) -> jax.Array:
    """Load a slice; interpret mode takes no Python integers beside dynamic slices, so they become values."""
    index = tuple(_value(i) if isinstance(i, int) else i for i in index)
    return plt.load(ref.at[index], mask=real, other=None if real is None else 0, **how)


def _masks(real: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
    """A mask of blocks for scales and, repeated over the words of a half, for quants."""
    return real, None if real is None else jnp.broadcast_to(real[..., None], (*real.shape, HALF))


def _program(
    x_ref: Any,
    xs_ref: Any,
    w_ref: Any,
    ws_ref: Any,
    o_ref: Any,
    group: Any,
    tile_index: Any,
    *,
    n: int,
    tile: Tile,
    interpret: bool,
) -> None:
    """One program's rows of one matrix: rows `tile_index`·rows.. of the n rows of `group`."""
    m_rows, blocks = x_ref.shape[0], xs_ref.shape[-1]
    lanes = min(LANES, pl.next_power_of_2(blocks))
    shape = (tile.rows, lanes)
    row = tile_index * tile.rows
    rows = pl.ds(group * n + row, tile.rows)
    in_rows = row + jax.lax.broadcasted_iota(jnp.int32, shape, 0) < n if n % tile.rows else None

    def chunk(c: jax.Array, accumulators: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        column = c * lanes
        span, real, real_x = pl.ds(column, lanes), in_rows, None
        if blocks % lanes:
            in_blocks = column + jax.lax.broadcasted_iota(jnp.int32, shape, 1) < blocks
            real = in_blocks if real is None else real & in_blocks
            real_x = column + jnp.arange(lanes, dtype=jnp.int32) < blocks
        (w_mask, q_mask), (xs_mask, xq_mask) = _masks(real), _masks(real_x)
        # Each weight is used once, so it leaves the cache first.
        once = functools.partial(_load, eviction_policy="evict_first")
        words = [once(w_ref, half, rows, span, slice(None), real=q_mask) for half in range(2)]
        scale = once(ws_ref, rows, span, real=w_mask).astype(jnp.float32)
        out = []
        for m in range(m_rows):
            dot = jnp.zeros((*shape, HALF), jnp.int32)
            for half in range(2):
                x = _load(x_ref, m, group, half, span, slice(None), real=xq_mask)
                dot = arithmetic.dp4a(words[half], jnp.broadcast_to(x[None], dot.shape), dot, interpret=interpret)
            xs = jnp.broadcast_to(_load(xs_ref, m, group, span, real=xs_mask)[None], shape)
            both = arithmetic.multiply(scale, xs, interpret=interpret)
            total = jnp.sum(dot, axis=-1).astype(jnp.float32)
            out.append(arithmetic.fma(total, both, accumulators[m], interpret=interpret))
        return tuple(out)

    zeros = tuple(jnp.zeros(shape, jnp.float32) for _ in range(m_rows))
    sums = jax.lax.fori_loop(0, pl.cdiv(blocks, lanes), chunk, zeros)
    real = row + jnp.arange(tile.rows, dtype=jnp.int32) < n if n % tile.rows else None
    for m in range(m_rows):
        plt.store(o_ref.at[_value(m), rows], arithmetic.sum_lanes(sums[m], interpret=interpret), mask=real)


def _kernel(x_ref: Any, xs_ref: Any, *refs: Any, sizes: tuple[int, ...], groups: int, tile: Tile, interpret: bool) -> None:
    count = len(sizes)
    weights, outputs = refs[: 2 * count], refs[2 * count :]
    program, first = pl.program_id(0), 0
    for i, n in enumerate(sizes):
        tiles = pl.cdiv(n, tile.rows)
        operands = (x_ref, xs_ref, weights[2 * i], weights[2 * i + 1], outputs[i])
        body = functools.partial(_program, *operands, n=n, tile=tile, interpret=interpret)
        if groups > 1:
            body(program // tiles, program % tiles)
        elif count == 1:
            body(_value(0), program)
        else:
            pl.when((program >= first) & (program < first + tiles))(functools.partial(body, _value(0), program - first))
        first += tiles


def q8_matmul(x: Activation, weights: Sequence[Q8_0], *, tile: Tile, groups: int = 1, interpret: bool = False) -> list[jax.Array]:
    """Multiply the same activations with one or several weights in one launch.

    Args:
        x: M rows, 1 to 8, of K values; `groups` groups of K when grouped.
        weights: [N, K] each; a single [groups·N, K] when grouped.

    Returns:
        float32 [M, N] for each weight, [M, groups·N] when grouped.
    """
    m = x.quants.shape[0]
    sizes = tuple(weight.shape[0] // groups for weight in weights)
    kernel = functools.partial(_kernel, sizes=sizes, groups=groups, tile=tile, interpret=interpret)
    operands = [array for weight in weights for array in (weight.quants, weight.scales)]
    outputs: list[jax.Array] = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((m, weight.shape[0]), jnp.float32) for weight in weights],
        grid=(groups * sum(pl.cdiv(n, tile.rows) for n in sizes),),
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=1),
        interpret=interpret,
        name=NAME,
    )(x.quants, x.scales, *operands)
    return outputs

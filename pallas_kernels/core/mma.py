"""Products of float16 numbers on tensor cores, as PTX in kernel bodies and as the same sums in jnp in interpret mode.

A tensor core adds the 16 products of an instruction in an order of its own. That order depends on the places of the products
along K alone. So an output has the same bits wherever it stands in a tile, as long as its chain of instructions is the same.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

from pallas_kernels.core.arithmetic import LANES

# float16 values that a lane holds of each operand: one load of 16 bytes.
VALUES = 8
# Rows and columns of a tile, and values along K of a block: four lanes hold a row's values of a block.
TILE_ROWS, TILE_COLUMNS, BLOCK = 16, 8, 4 * VALUES


def _instruction(out: str, column: int, step: int) -> str:
    """One instruction: 16 values along K of both operands. $0 to $7 are results, $8 to $15 the tile's rows, $24 on sums."""
    rows = ", ".join(f"${8 + row + word}" for word in (2 * step, 2 * step + 1) for row in (0, 4))
    columns = f"${column + 2 * step}, ${column + 2 * step + 1}"
    made = ", ".join(f"{out}{i}" for i in range(4))
    first = 24 if out == "h" else 28
    added = ", ".join(f"${first + i}" for i in range(4)) if step == 0 else made
    return f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{{made}}}, {{{rows}}}, {{{columns}}}, {{{added}}};"


_STEPS = [_instruction(out, column, step) for step in (0, 1) for out, column in (("h", 16), ("l", 20))]
_MOVES = [f"mov.f32 ${i}, {'h' if i < 4 else 'l'}{i % 4};" for i in range(8)]
_CODE = " ".join(["{ .reg .f32 h<4>, l<4>;", *_STEPS, *_MOVES, "}"])
_CONSTRAINTS = ",".join(["=f"] * 8 + ["r"] * 16 + ["f"] * 8)


def multiply_tile(
    first: jax.Array,
    second: jax.Array,
    high: jax.Array,
    low: jax.Array,
    sums: jax.Array,
    *,
    interpret: bool,
    diagonal: bool = False,
) -> jax.Array:
    """Add the products of a tile's 16 rows and 8 columns over a block of 32 values along K to sums.

    Lane 4·g + t of a warp holds the eight values from 8·t on: of rows g and 8 + g, and of column g. Its first four sums are of
    `high`, the others of `low`. Of each four, the first two are of row g and columns 2·t and 2·t + 1, the last two of row 8 + g
    and the same columns.

    Args:
        first, second: float16 [32·W, 8] of W warps, rows 0 to 7 and 8 to 15.
        high, low: float16 [32·W, 8], two matrices of columns.
        sums: float32 [32·W, 8].
        diagonal: only products of column i and rows i and 8 + i are used; interpret mode leaves out the others.

    Returns:
        The sums, float32 [32·W, 8].
    """
    if interpret:
        return sums + _tiles(first, second, high, low, diagonal)
    shape = jax.ShapeDtypeStruct(sums.shape, jnp.float32)
    arguments = [first, second, high, low, sums]
    [out] = plt.elementwise_inline_asm(_CODE, args=arguments, constraints=_CONSTRAINTS, pack=VALUES, result_shape_dtypes=[shape])
    return out


def _tiles(first: jax.Array, second: jax.Array, high: jax.Array, low: jax.Array, diagonal: bool) -> jax.Array:
    """The products alone. A product of two float16 numbers is exact in float32, so only the order of sums matters."""
    warps = first.shape[0] // LANES
    rows = jnp.stack([x.astype(jnp.float32).reshape(warps, 8, BLOCK) for x in (first, second)])
    columns = jnp.stack([x.astype(jnp.float32).reshape(warps, 8, BLOCK) for x in (high, low)])
    # [half of the columns, half of the rows, warp, row, column, K].
    products = rows[None, :, :, :, None, :] * columns[:, None, :, None, :, :] if not diagonal else rows[None] * columns[:, None]
    while products.shape[-1] > 1:
        products = products[..., : products.shape[-1] // 2] + products[..., products.shape[-1] // 2 :]
    totals = products[..., 0]
    if diagonal:
        totals = jnp.where(jnp.eye(8, dtype=bool), totals[..., None], 0.0)
    pairs = totals.reshape(2, 2, warps, 8, 4, 2)
    return jnp.transpose(pairs, (2, 3, 4, 0, 1, 5)).reshape(first.shape)

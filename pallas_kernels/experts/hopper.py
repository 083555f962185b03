"""Expert products of a prefill on Hopper: weights go from memory to the tensor cores as they are stored (Pallas Mosaic GPU).

Rows are sorted by expert. One launch computes gate, up and the clamped SwiGLU of all experts, and another down. A warpgroup owns
two fragments of 64 rows of weights, and the rows of a tile of one expert. Its threads decode a block of 256 weights of a row into
registers (`fragments`), the left operand of wgmma. Another warpgroup loads activations into shared memory. Sums are float32, in
the order of K. A tile of fewer rows takes a narrower instruction, which sums in the same order. So the result of a row depends
only on the row and the expert.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.experts.fragments import BLOCK, DECODERS, Decoder
from pallas_kernels.experts.grouping import Spans
from pallas_kernels.experts.placing import rows_of_pairs, spans
from pallas_kernels.experts.swiglu import clamped
from pallas_kernels.experts.warpgroup import decoded, filled, loaded_words, rows_of_threads, stored, uniform
from pallas_kernels.formats import Quantized

GATE_UP, DOWN = "stored_gate_up", "stored_down"
# Rows of a fragment, and warpgroups that multiply.
ROWS, GROUPS = 64, 2
# How the activations lie in shared memory: rows of 128 bytes, as wgmma reads them.
SWIZZLED = (8, 64), 128
# Registers of a thread that loads.
MEMORY_REGISTERS = 40


@dataclasses.dataclass(frozen=True)
class Tile:
    """How the work is cut. It changes only the time of a launch.

    Attributes:
        widths: numbers of rows that have an instruction, in order; the last is the maximum of a tile.
        stages: blocks of activations in shared memory.
    """

    widths: tuple[int, ...] = (80, 96, 112, 128)
    stages: int = 3

    @classmethod
    def of(cls, pairs: int, experts: int) -> Tile:
        """The tile for `pairs` of rows and experts. With few rows, decoding takes the time, and narrow instructions load less."""
        return cls() if pairs >= 40 * experts else cls((16, 32, 64), 4)

    @property
    def rows(self) -> int:
        """Maximum number of rows of a tile."""
        return self.widths[-1]


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two matrices of a warpgroup: an expert's planes, and the distance in rows from the first matrix's rows."""

    planes: Sequence[Any]
    distance: int


@dataclasses.dataclass(frozen=True)
class Product:
    """What the two launches differ in.

    Attributes:
        name: of the launch.
        together: whether the two matrices of a warpgroup are the same rows of two stacks, or neighbouring rows of one.
        order: int [256], the row at each position of a block of rows.
        out: shape and type of the output.
        finish: from references to the operand of rows and the output, both sums float32 [64, rows], the tile's first place and
            number of rows and the warpgroup's first row.
    """

    name: str
    together: bool
    order: np.ndarray
    out: jax.ShapeDtypeStruct
    finish: Callable[..., None]


def _multiply(
    product: Product, decoder: Decoder, shape: tuple[int, int], width: int, tile: Tile, sides: Sequence[Side],
    span: tuple[Any, Any, Any], refs: tuple[Any, ...], allocations: Any,
) -> None:  # fmt: skip
    """A tile of at most `width` rows by both matrices of a warpgroup; the loading warpgroup runs it, too."""
    x_gmem, operand_gmem, order_gmem, out_gmem, table_smem = refs
    first, count, column = span
    steps = shape[1] // BLOCK
    # A thread's second row is eight positions after its first.
    [far] = {int(after - before) for before, after in product.order.reshape(-1, 2, 8).transpose(0, 2, 1).reshape(-1, 2)}

    def fetch(k: Any, rows: jax.Array) -> list[jax.Array]:
        return [loaded_words(side.planes, rows, k, decoder, shape, (side.distance, side.distance + far)) for side in sides]

    def context(run: Callable[..., Any]) -> None:
        def scope(*sums: Any) -> None:
            rows = rows_of_threads(order_gmem, column)
            run((sums, rows, fetch(jnp.int32(0), rows)))
            product.finish(operand_gmem, out_gmem, [total[...] for total in sums], first, count, column)

        pl.run_scoped(scope, *[plgpu.WGMMAAccumulatorRef((ROWS, width), jnp.float32)] * 2)

    def body(index: tuple[Any], x_smem: Any, carry: Any) -> Any:
        sums, rows, words = carry
        following = fetch(jnp.minimum(index[0] + 1, steps - 1), rows)
        for quarter in range(4):
            columns = pl.ds(quarter * (BLOCK // 4), BLOCK // 4)
            for total, some in zip(sums, words, strict=True):
                weights = decoded(some, table_smem, decoder, quarter)
                plgpu.wgmma(total, weights, x_smem.at[:, columns].transpose((1, 0)))
                # The next matrix is decoded while this one is multiplied.
                plgpu.wgmma_wait(1)
        # A product on its way at the end of the body would make the compiler wait after every instruction.
        plgpu.wgmma_wait(0)
        return sums, rows, following

    # A narrow tile fills the first rows of the blocks in shared memory.
    [blocks] = allocations["flat_in_smem_refs"]
    narrow = allocations | {"flat_in_smem_refs": [blocks.at[:, pl.ds(0, width)]]}
    _pipeline(body, context, steps, width, tile)(x_gmem.at[pl.ds(first, width)], allocations=narrow)


def _pipeline(body: Callable[..., Any], context: Callable[..., Any], steps: int, rows: int, tile: Tile) -> Any:
    """Loads blocks of some rows ahead of the warpgroups that multiply."""
    tiling, swizzle = SWIZZLED
    block = plgpu.BlockSpec(
        (rows, BLOCK),
        lambda k: (0, k),
        transforms=(plgpu.TilingTransform(tiling), plgpu.SwizzleTransform(swizzle)),
    )
    return plgpu.emit_pipeline_warp_specialized(
        body, grid=(steps,), memory_registers=MEMORY_REGISTERS, wg_axis="wg", num_compute_wgs=GROUPS,
        max_concurrent_steps=tile.stages, compute_context=context, in_specs=[block],
    )  # fmt: skip


def _nothing(*_: Any, **__: Any) -> None:
    """The memory that a pipeline needs does not depend on its functions."""


def _launch(product: Product, x: jax.Array, operand: jax.Array, tiles: Spans, stacks: Sequence[Quantized], *, tile: Tile,
            processors: int) -> jax.Array:  # fmt: skip
    """Run a product: programs take tiles and 64-row parts of an expert's matrix in turn."""
    decoder = DECODERS[type(stacks[0])]
    experts, n, length = stacks[0].shape
    planes = [[plane.reshape(experts, -1) for plane in jax.tree.leaves(stack)] for stack in stacks]
    each, table = 1 if product.together else 2, decoder.table()
    # One array for both: XLA would make an order that is 0 to 255 in a launch of its own, in every call.
    numbers = jnp.asarray(np.concatenate([product.order, table]), jnp.int32)
    across = n // (ROWS * GROUPS * each)

    def kernel(x_gmem: Any, operand_gmem: Any, tiles_gmem: Any, numbers_gmem: Any, planes_gmem: Any, out_gmem: Any,
               table_smem: Any) -> None:  # fmt: skip
        group = lax.axis_index("wg")
        filled(table_smem, numbers_gmem, BLOCK)
        refs = x_gmem, operand_gmem, numbers_gmem, out_gmem, table_smem
        pipeline = _pipeline(_nothing, _nothing, length // BLOCK, tile.rows, tile)
        allocations = pipeline.get_allocations(x_gmem.at[pl.ds(0, tile.rows)])

        @functools.partial(pl.run_scoped, allocations=allocations, collective_axes="wg")
        def _(allocations: Any) -> None:
            @plgpu.nd_loop((tiles.table.shape[1] * across,), collective_axes="sm")
            def _(info: Any) -> None:
                number, part = info.index[0] // across, info.index[0] % across
                expert, first, count = (uniform(tiles_gmem[i, number]) for i in range(3))
                row = (part * GROUPS + group) * ROWS * each
                some = [[plane.at[expert] for plane in stack] for stack in planes_gmem]
                sides = [Side(some[0], 0), Side(some[-1], 0 if product.together else ROWS)]
                for fewer, width in zip((0, *tile.widths), tile.widths, strict=False):

                    @pl.when((count > fewer) & (count <= width))
                    def _(width: int = width) -> None:
                        _multiply(product, decoder, (n, length), width, tile, sides, (first, count, row), refs, allocations)

    made: jax.Array = plgpu.kernel(
        kernel, out_type=product.out, grid=(processors,), grid_names=("sm",), num_threads=GROUPS + 1, thread_name="wg",
        kernel_name=product.name, scratch_types=[plgpu.SMEM(table.shape, jnp.int32)],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(x, operand, tiles.table, numbers, planes)  # fmt: skip
    return made


def gate_up(
    x: jax.Array, share: jax.Array, tiles: Spans, gate: Quantized, up: Quantized, order: np.ndarray,
    *, limit: float, tile: Tile, processors: int,
) -> jax.Array:  # fmt: skip
    """silu(min(gate, limit)) · clip(up, ±limit) · share for each pair in the order of the experts.

    Args:
        x: bfloat16 [places, D], columns in the order of the gate's decoder.
        share: float32 [places].
        tiles: of all pairs.
        gate, up: stacks [E, F, D] of one format.
        order: int [256], the hidden value at each position of a block, which is the order of down's decoder.

    Returns:
        bfloat16 [places, F]; empty places are not written.
    """
    width = gate.shape[1]

    def finish(share_gmem: Any, out_gmem: Any, sums: Sequence[jax.Array], first: Any, count: Any, row: Any) -> None:
        stored(clamped(sums[0], sums[1], limit), out_gmem, share_gmem, first, count, row, width, scatter=False)

    out = jax.ShapeDtypeStruct((x.shape[0], width), jnp.bfloat16)
    product = Product(GATE_UP, True, order, out, finish)
    return _launch(product, x, share, tiles, (gate, up), tile=tile, processors=processors)


def down(hidden: jax.Array, tiles: Spans, weight: Quantized, pairs: int, *, tile: Tile, processors: int) -> jax.Array:
    """Multiply hidden values, bfloat16 [places, F], by the experts' matrices of a stack [E, D, F]: float32 [pairs, D] by pair."""
    width = weight.shape[1]

    def finish(pair_gmem: Any, out_gmem: Any, sums: Sequence[jax.Array], first: Any, count: Any, row: Any) -> None:
        for i, total in enumerate(sums):
            stored(total, out_gmem, pair_gmem, first, count, row + i * ROWS, width, scatter=True)

    out = jax.ShapeDtypeStruct((pairs, width), jnp.float32)
    product = Product(DOWN, False, np.arange(BLOCK), out, finish)
    return _launch(product, hidden, tiles.pair, tiles, (weight,), tile=tile, processors=processors)


@functools.partial(jax.jit, static_argnames=("limit", "tile", "processors"))
def experts(
    x: jax.Array, chosen: jax.Array, share: jax.Array, gate: Quantized, up: Quantized, weight: Quantized, *, limit: float,
    tile: Tile | None = None, processors: int | None = None,
) -> jax.Array:  # fmt: skip
    """Weighted sum of the chosen experts' outputs, for many rows; arguments, result and errors as for `prefill.experts`.

    Args:
        tile: static, how the work is cut; by default `Tile.of` for these rows.
        processors: static; multiprocessors of the device, by default of this one.
    """
    (tokens, active), tile = chosen.shape, tile or Tile.of(chosen.size, gate.shape[0])
    processors = processors or jax.devices()[0].core_count
    tiles, shares = spans(chosen, share, gate.shape[0], tile.rows)
    rows = rows_of_pairs(x.astype(jnp.bfloat16), tiles.pair, active, DECODERS[type(gate)].order)
    order = DECODERS[type(weight)].order
    hidden = gate_up(rows, shares, tiles, gate, up, order, limit=limit, tile=tile, processors=processors)
    y = down(hidden, tiles, weight, chosen.size, tile=tile, processors=processors)
    return jnp.sum(y.reshape(tokens, active, -1), axis=1)

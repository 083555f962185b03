"""What the threads of a warpgroup do on their own in `hopper`: load stored words, decode them, and store sums by address."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from pallas_kernels.core.thread_code import THREADS, Code
from pallas_kernels.experts.fragments import BLOCK, QUAD, Decoder

# Shape of a fragment: rows, and columns of a quarter block.
FRAGMENT = (64, BLOCK // 4)


def _words(count: int) -> Any:
    """The type of some words of each thread, an int32 array."""
    layout = plgpu.Layout.WG_STRIDED((THREADS * count,), vec_size=1)
    return plgpu.ShapeDtypeStruct((THREADS * count,), jnp.int32, layout=layout)


def _number() -> Any:
    """The layout of an integer that all threads have."""
    return plgpu.Layout.WG_SPLAT(())


def _as_array(values: Sequence[Any]) -> Any:
    layout = mgpu.WGStridedFragLayout((THREADS * len(values),), vec_size=1)
    one = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
    registers = np.empty(len(values), object)
    registers[:] = [vector.broadcast(one, value) for value in values]
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)


def _element(register: Any, i: int) -> Any:
    """Element i of a register, as 32 bits."""
    return llvm.bitcast(ir.IntegerType.get_signless(32), vector.extract(register, dynamic_position=[], static_position=[i]))


def _as_words(array: Any) -> list[Any]:
    return [_element(register, 0) for register in array.registers.flat]


def _as_number(array: Any) -> Any:
    return array.registers.item()


def _address(ref: Any) -> Any:
    """The address of a reference: 64 bits in global memory, 32 in shared memory."""
    bits = 32 if mgpu.utils.is_smem_ref(ref) else 64
    return llvm.ptrtoint(ir.IntegerType.get_signless(bits), mgpu.utils.memref_ptr(ref))


def _position(code: Code, first: Any) -> Any:
    """The position of a thread's first row among rows from `first`: 16 rows a warp, a row a quad."""
    thread = code.thread()
    warp, quad = code.shift_right(thread, 5), code.masked(code.shift_right(thread, 2), 7)
    return code.plus(code.plus(first, code.shift_left(warp, 4)), quad)


def _in_quad(code: Code) -> Any:
    return code.masked(code.thread(), QUAD - 1)


def filled(table_smem: Any, numbers_gmem: Any, first: int) -> None:
    """Copy a table to shared memory from number `first` on. Every warpgroup writes the same values, and waits for its own."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def fill(_: Any, target: Any, source: Any) -> None:
        code = Code()
        zero = code.constant(0)
        for i in range(ir.MemRefType(target.type).shape[0] // THREADS):
            place = code.shift_left(code.plus(code.thread(), i * THREADS), 2)
            [word] = code.loaded(code.address(_address(source), zero, 0, code.plus(place, 4 * first)), bits=32)
            code.stored_in_table(_address(target), place, word)
        mgpu.utils.warpgroup_barrier()

    fill(table_smem, numbers_gmem)


def uniform(number: jax.Array) -> jax.Array:
    """A number that the compiler knows to be the same in all threads of a warp."""

    @plgpu.inline_mgpu(arg_types=(_number(),), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=_number()))
    def run(_: Any, number: Any) -> Any:
        return mgpu.FragmentedArray.splat(Code().uniform(_as_number(number)), (), is_signed=True)

    return run(number)


def rows_of_threads(order_gmem: Any, first: jax.Array) -> jax.Array:
    """The matrix row of each thread's first row, int32 [128]; `order` begins with the row at each position of a block of rows."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _number()), return_type=_words(1))
    def rows(_: Any, order: Any, first: Any) -> Any:
        code = Code()
        position = _position(code, _as_number(first))
        place = code.shift_left(code.masked(position, BLOCK - 1), 2)
        [row] = code.loaded(code.address(_address(order), code.constant(0), 0, place), bits=32)
        return _as_array([code.plus(code.masked(position, -BLOCK), row)])

    return rows(order_gmem, first)  # type: ignore[no-any-return]


def loaded_words(
    planes: Sequence[Any], rows: jax.Array, k: jax.Array, decoder: Decoder, shape: tuple[int, int], distances: tuple[int, int]
) -> jax.Array:
    """The stored words of block k that each thread decodes, of two rows.

    Args:
        planes: an expert's planes in global memory.
        rows: int32 [128], a row for each thread.
        shape: N and K of the matrix.
        distances: of the two rows from that row.
    """
    made, (matrix_rows, length) = _words(2 * decoder.words), shape

    @plgpu.inline_mgpu(arg_types=([plgpu.RefType()] * len(planes), _words(1).layout, _number()), return_type=made)
    def load(_: Any, planes: Any, rows: Any, k: Any) -> Any:
        code = Code()
        [row], quad = _as_words(rows), _in_quad(code)
        both: tuple[list[Any], list[Any]] = [], []
        for what in decoder.loads:
            pitch = what.block * (length // BLOCK)
            there = code.plus(row, what.part * matrix_rows) if what.part else row
            first = code.plus(code.scaled(there, pitch), code.scaled(quad, what.thread))
            address = code.near(_address(planes[what.plane]), code.plus(first, code.scaled(_as_number(k), what.block)))
            for distance, words in zip(distances, both, strict=True):
                words += code.loaded(address, bits=what.bits, offset=distance * pitch)
        return _as_array(both[0] + both[1])

    return load(list(planes), rows, k)  # type: ignore[no-any-return]


def decoded(words: jax.Array, table_smem: Any, decoder: Decoder, quarter: int) -> jax.Array:
    """Quarter of a block of 64 rows of weights, bfloat16 [64, 64], from the threads' words."""
    made = plgpu.ShapeDtypeStruct(FRAGMENT, jnp.bfloat16, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(_words(2 * decoder.words).layout, plgpu.RefType()), return_type=made)
    def decode(_: Any, words: Any, table: Any) -> Any:
        code, loaded = Code(), _as_words(words)
        two = loaded[: decoder.words], loaded[decoder.words :]
        values = [decoder.decode(code, row, _in_quad(code), _address(table), quarter) for row in two]
        pair, layout = ir.VectorType.get((2,), ir.BF16Type.get()), made.layout.to_mgpu()
        registers = np.empty(layout.registers_shape(FRAGMENT), object)
        # Eight columns after another, and in each the first and the second row.
        registers.flat[:] = [llvm.bitcast(pair, row[i]) for i in range(FRAGMENT[1] // 8) for row in values]
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return decode(words, table_smem)  # type: ignore[no-any-return]


def stored(
    values: jax.Array, out_gmem: Any, operand_gmem: Any, first: Any, count: Any, column: Any, width: int, *, scatter: bool
) -> None:
    """Store `count` columns of values, float32 [64, rows], as rows of the output from column `column`.

    Args:
        out_gmem: [P, width].
        operand_gmem: [P], for the row of each place: its index if `scatter`, else a float32 factor.
        first: the first place. Row n is stored at the index of its place, or at place first + n in bfloat16.
    """
    number = _number()

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WGMMA, number, number, number))
    def store(_: Any, out: Any, operand: Any, values: Any, first: Any, count: Any, column: Any) -> None:
        code, zero = Code(), Code().constant(0)
        size = 4 if scatter else 2
        pitch, place = width * size, code.scaled(_position(code, _as_number(column)), size)
        begin, registers = code.shift_left(_in_quad(code), 1), list(values.registers.flat)
        operands = code.address(_address(operand), code.plus(_as_number(first), begin), 4, zero)
        for i in range(len(registers) // 2):
            for j in range(2):
                [known] = code.loaded(operands, bits=32, offset=4 * (8 * i + j))
                n = code.plus(begin, 8 * i + j)
                row = known if scatter else code.plus(n, _as_number(first))
                address = code.address(_address(out), row, pitch, place)
                for half, register in enumerate(registers[2 * i : 2 * i + 2]):
                    value = _element(register, j)
                    value = value if scatter else code.product(value, known)
                    code.stored_if(n, _as_number(count), address, value, narrow=not scatter, offset=8 * half * size)

    store(out_gmem, operand_gmem, values, first, count, column)

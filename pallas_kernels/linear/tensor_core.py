"""Pieces of a kernel on the int8 tensor cores: blocks through shared memory, their products, and sums over warps.

Arrays [P, 4] have a row for each lane of a program; a piece of assembly runs once for each row. Interpret mode does the same in
jnp. Four lanes share a row: lane l of a warp has row l/4 of the weights or of the activations. The order of the values within a
block is free because the sum of integers is exact; weights and activations have the same.

A lane has four places of a product of 16 weight rows with eight rows of activations: weight rows l/4 and l/4 + 8, each with rows
2·(l mod 4) and 2·(l mod 4) + 1 of the activations.

Source of the fragments: PTX ISA, matrix fragments for mma.m16n8k32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

from pallas_kernels.core import arithmetic
from pallas_kernels.core.arithmetic import LANES

# Rows of weights and of activations of one instruction.
HEIGHT, COLUMNS = 16, 8
# Neighbouring blocks that a lane gets together.
PAIR = 2
# A buffer in shared memory holds 32 blocks of 16 weight rows, each as two units of 16 bytes. The gaps between rows spread what
# eight lanes load at once over all banks.
UNIT_BYTES, ROW_BYTES = LANES * 16, 2 * LANES * 16 + 16
BUFFER_BYTES, BUFFERS = HEIGHT * ROW_BYTES, 2

Values = list[jax.Array]


def spread(words: jax.Array, upper: jax.Array, *, interpret: bool) -> jax.Array:
    """Exchange words so that each of a row's four lanes has two words of both blocks of a pair.

    Args:
        words: int32 [P, 4]; lane l has half l mod 2 of block l/2 mod 2.
        upper: int32 [P, 4], not zero in the lanes of the second block.

    Returns:
        int32 [P, 4], two words of the first block and two of the second.
    """
    if interpret:
        # Axes: lanes of the block, lanes of the half, then words as the first and the last two.
        parts = words.reshape(-1, 2, 2, 2, 2)
        return parts.transpose(0, 3, 2, 1, 4).reshape(words.shape)
    code = ".reg .pred p; .reg .b32 s<2>, r<2>; setp.eq.s32 p, $8, 0; selp.b32 s0, $6, $4, p; selp.b32 s1, $7, $5, p; "
    code += " ".join(f"shfl.sync.bfly.b32 r{i}, s{i}, 2, 0x1f, 0xffffffff;" for i in range(2))
    code += " selp.b32 o0, $4, r0, p; selp.b32 o1, $5, r1, p; selp.b32 o2, r0, $6, p; selp.b32 o3, r1, $7, p;"
    return _integers(code, [words, upper], "r" * 8)


def multiply_add(
    weights: jax.Array, x: jax.Array, scales: jax.Array, xs: jax.Array, acc: jax.Array, *, block: int, interpret: bool
) -> jax.Array:
    """acc plus the exact dot products of one block times their scales, rounded once on the GPU, float32 [P, 4].

    Args:
        weights: int32 [P, 4] of `load_block`.
        x: int32 [P, 4] of `spread`, for row l/4 of the activations.
        scales, xs: float32 [P, 4], of both blocks of the pair for the first of a lane's two rows, then for the second.
        acc: float32 [P, 4], of the places.
        block: which of the pair's two blocks.
    """
    if interpret:
        both = (scales[:, block::PAIR, None] * xs[:, None, block::PAIR]).reshape(-1, 4)
        return arithmetic.fma(_dots(weights, x[:, PAIR * block :][:, :PAIR]), both, acc, interpret=True)
    # 0x4b400000 is 1.5 · 2²³ as float32: plus a small integer it is that float plus the integer.
    code = ".reg .s32 c<4>, z; .reg .f32 p; mov.b32 z, 0x4b400000; mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
    code += f"{{c0, c1, c2, c3}}, {{$4, $5, $6, $7}}, {{${8 + PAIR * block}, ${9 + PAIR * block}}}, {{z, z, z, z}}; "
    for i in range(4):
        code += f"mul.rn.f32 p, ${12 + PAIR * (i // 2) + block}, ${16 + PAIR * (i % 2) + block}; "
        code += f"mov.b32 o{i}, c{i}; sub.rn.f32 o{i}, o{i}, 0f4B400000; fma.rn.f32 o{i}, o{i}, p, ${20 + i}; "
    return _floats(code, [weights, x, scales, xs, acc], "r" * 8 + "f" * 12)


def _dots(weights: jax.Array, x: jax.Array) -> jax.Array:
    """The integers of the instruction in jnp, float32 [P, 4]. They are below 2²⁴, so the products are exact."""

    def fragment(words: jax.Array) -> jax.Array:
        values = jnp.stack([(words << shift) >> 24 for shift in (24, 16, 8, 0)], axis=-1)
        return values.astype(jnp.float32).reshape(-1, COLUMNS, 32)

    rows = jnp.stack([fragment(weights[:, row::2]) for row in range(2)], axis=1)
    dots = jnp.einsum("wrgk,wnk->wgrn", rows, fragment(x), precision="highest", preferred_element_type=jnp.float32)
    return jnp.moveaxis(dots.reshape(-1, COLUMNS, 2, 4, 2), 2, 3).reshape(-1, 4)


def buffers(like: jax.Array) -> jax.Array:
    """The address of `BUFFERS` buffers in shared memory, int32 [P, 4]; `like` is any float32 [P, 4]."""
    code = f".shared .align 16 .b8 buffers[{BUFFERS * BUFFER_BYTES}]; .reg .b32 a; mov.u32 a, buffers;"
    return _integers(code + _all("a"), [like], "f" * 4)


def after(address: jax.Array, values: Sequence[jax.Array]) -> jax.Array:
    """The address, for use after these float32 [P, 4] are known. Assembly is ordered by its operands alone."""
    for value in values:
        address = _integers(_all("$4"), [address, value], "r" * 4 + "f" * 4)
    return address


def store_blocks(address: jax.Array, words: Values, step: int) -> jax.Array:
    """Store a block of each of several rows and wait until all warps have done so.

    Args:
        address: int32 [P, 4], the place of the lane's block in its first row.
        words: int32 [P, 4], two halves of a block for each row. A unit takes every other word of both halves, as `spread` does.
        step: bytes from a row to the next.

    Returns:
        The address.
    """
    code = ""
    for i in range(len(words) // 2):
        for unit in range(2):
            taken = ", ".join(f"${8 + 8 * i + unit + other}" for other in (0, 4, 2, 6))
            code += f"st.shared.v4.b32 [$4+{i * step + unit * UNIT_BYTES}], {{{taken}}}; "
    return _integers(code + "bar.sync 0;" + _all("$4"), [address, *words], "r" * (4 + 4 * len(words)))


def load_block(address: jax.Array, offset: int) -> jax.Array:
    """The instruction's words of a block: of weight rows l/4 and l/4 + 8, first and second of each, int32 [P, 4].

    Args:
        address: int32 [P, 4]; eight lanes have the places of weight rows 0 to 7 in the first unit of block 0, the next eight of
            rows 8 to 15, and the other 16 lanes the same in the second unit.
        offset: bytes from there to the block.
    """
    return _integers(f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{o0, o1, o2, o3}}, [$4+{offset}];", [address], "r" * 4)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Sums over the warps of a program through a buffer, several arrays of sums in a round.

    Triton would sum over warps four values at a time, with two barriers each.

    Attributes:
        warps: warps of a program, a power of two.
        total: arrays of sums of a warp.
    """

    warps: int
    total: int

    @property
    def bytes(self) -> int:
        """What all warps store for one array of sums."""
        return self.warps * LANES * PAIR * 16

    @property
    def count(self) -> int:
        """Arrays of a round, a power of two."""
        return 1 << (min(self.warps, self.total, BUFFER_BYTES // self.bytes).bit_length() - 1)

    @property
    def width(self) -> int:
        """Values that a lane sums in a round: the warps divide the arrays, or their lanes, among each other."""
        return max(1, 4 * self.count // self.warps)

    def owned(self, warp: jax.Array, lane: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What a lane sums, int32 [P] each: the array of the round, the lane that has these places, and the first of them.

        A warp that has nothing to sum gets the array `count`.
        """
        slices = 4 // self.width
        place = ((warp & (slices - 1)) * LANES + lane) * self.width
        return jnp.minimum(warp // slices, self.count), place // 4, place % 4

    def run(self, address: jax.Array, sums: list[Values], *, interpret: bool) -> tuple[list[jax.Array], jax.Array]:
        """Sum over the warps, the largest distance first, and then over the two blocks of a pair.

        Args:
            address: int32 [P, 4], a buffer's.
            sums: `total` times one array for each block of a pair, float32 [P, 4].

        Returns:
            float32 [P, 4] for each round, the first `width` values of a lane are those that it owns; and the address.
        """
        rounds, made = [sums[first : first + self.count] for first in range(0, self.total, self.count)], list[jax.Array]()
        if interpret:
            return [self._sum(some) for some in rounds], address
        for some in rounds:
            for number, values in enumerate(some):
                code = ".reg .b32 a, t; mov.u32 t, %tid.x; shl.b32 t, t, 4; add.u32 a, $4, t; "
                for b in range(PAIR):
                    words = ", ".join(f"${8 + 4 * b + i}" for i in range(4))
                    code += f"st.shared.v4.f32 [a+{(number * PAIR + b) * self.bytes // PAIR}], {{{words}}}; "
                address = _integers(code + _all("$4"), [address, *values], "r" * 4 + "f" * 8)
            made.append(_floats(self._load(len(some)), [address], "r" * 4))
            address = _integers("bar.sync 0;" + _all("$4"), [address, made[-1]], "r" * 4 + "f" * 4)
        return made, address

    def _load(self, count: int) -> str:
        """Assembly that waits for all warps, loads what a lane owns, and sums it."""
        half, width, slices = self.bytes // PAIR, self.width, 4 // self.width
        values = self.warps * PAIR * width
        code = f".reg .b32 a, p, s, w; .reg .f32 v<{values}>; bar.sync 0; mov.u32 s, %tid.x; shr.u32 p, s, 5; "
        code += f"and.b32 s, s, {LANES - 1}; and.b32 w, p, {slices - 1}; mad.lo.u32 s, w, {LANES}, s; "
        code += f"mad.lo.u32 a, s, {4 * width}, $4; shr.u32 p, p, {slices.bit_length() - 1}; min.u32 p, p, {count - 1}; "
        code += f"mad.lo.u32 a, p, {PAIR * half}, a; "
        for i in range(self.warps * PAIR):
            warp, b = divmod(i, PAIR)
            names = ", ".join(f"v{i * width + j}" for j in range(width))
            vector, target = (f"v{width}.", f"{{{names}}}") if width > 1 else ("", names)
            code += f"ld.shared.{vector}f32 {target}, [a+{b * half + warp * LANES * 16}]; "
        distance = values
        while distance > width:
            distance //= 2
            code += " ".join(f"add.rn.f32 v{i}, v{i}, v{i + distance};" for i in range(distance))
        return code + " ".join(f"mov.f32 o{i}, v{i % width};" for i in range(4))

    def _sum(self, sums: list[Values]) -> jax.Array:
        """One round in jnp."""
        total = jnp.stack([jnp.stack(values) for values in sums]).reshape(len(sums), PAIR, self.warps, LANES * 4)
        while total.shape[2] > 1:
            total = total[:, :, : total.shape[2] // 2] + total[:, :, total.shape[2] // 2 :]
        number = jnp.arange(self.warps * LANES, dtype=jnp.int32)
        array, lane, first = self.owned(number // LANES, number % LANES)
        own = jnp.minimum(array, len(sums) - 1)[:, None], (lane * 4 + first)[:, None] + jnp.arange(4) % self.width
        return (total[:, 0, 0] + total[:, 1, 0])[own]


def _all(register: str) -> str:
    return "".join(f" mov.b32 o{i}, {register};" for i in range(4))


def _integers(code: str, args: Sequence[jax.Array], kinds: str) -> jax.Array:
    return _four(code, args, kinds, jnp.int32, "b32", "=r")


def _floats(code: str, args: Sequence[jax.Array], kinds: str) -> jax.Array:
    return _four(code, args, kinds, jnp.float32, "f32", "=f")


def _four(code: str, args: Sequence[jax.Array], kinds: str, dtype: jnp.dtype, register: str, result: str) -> jax.Array:
    """Assembly on four values of each lane that leaves its results in o0 to o3; `kinds` are the registers of $4 and following."""
    moves = " ".join(f"mov.b32 ${i}, o{i};" for i in range(4))
    shape, constraints = jax.ShapeDtypeStruct(args[0].shape, dtype), ",".join([result] * 4 + list(kinds))
    [made] = plt.elementwise_inline_asm(
        f"{{ .reg .{register} o<4>; {code} {moves} }}",
        args=list(args), constraints=constraints, pack=4, result_shape_dtypes=[shape],
    )  # fmt: skip
    return made

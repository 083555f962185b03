"""Pieces of a kernel on the int8 tensor cores: products of blocks, and sums over warps through shared memory.

A lane has four places of a product of 16 weight rows with eight rows of activations: weight rows l/4 and l/4 + 8, each with rows
2·(l mod 4) and 2·(l mod 4) + 1 of the activations. Arrays [P, 4] have a row for each lane of a program; a piece of assembly runs
once for each row. Interpret mode does the same in jnp.

Source of the fragments: PTX ISA, matrix fragments for mma.m16n8k32.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

from pallas_kernels.core import arithmetic
from pallas_kernels.core.arithmetic import LANES

# Rows of weights and of activations of one instruction.
HEIGHT, COLUMNS = 16, 8
# Blocks of a step.
STEP = 4
# Shared memory that a program takes for its sums, and what a warp stores for eight rows.
SHARED_BYTES, WARP_BYTES = 32 * 1024, LANES * STEP * 16

Values = list[jax.Array]


def scale_products(scales: Values, xs: Values, block: int, *, interpret: bool) -> jax.Array:
    """Products of the scales of a block for a lane's four places: two weight rows times two rows of activations.

    Args:
        scales, xs: float32 [P, 4], one value a block of the step; two arrays each.
    """
    if interpret:
        rows, columns = ([array[:, block] for array in arrays] for arrays in (scales, xs))
        return jnp.stack([row * column for row in rows for column in columns], axis=-1)
    code = " ".join(f"mul.rn.f32 t{i}, ${4 + 4 * (i // 2) + block}, ${12 + 4 * (i % 2) + block};" for i in range(4))
    return _four(code, "f" * 16, [*scales, *xs])


def multiply_add(weights: Values, x: jax.Array, scales: jax.Array, acc: jax.Array, *, interpret: bool) -> jax.Array:
    """acc plus the exact dot products of one block times their scales, rounded once on the GPU, float32 [P, 4].

    A lane's places are weight rows l/4 and l/4 + 8 of its warp's 16, each with rows 2·(l mod 4) and 2·(l mod 4) + 1 of the
    activations.

    Args:
        weights: int32 [P, 4], words of weight row l/4 and of row l/4 + 8; the sum is over the four lanes of a row.
        x: int32 [P, 4], words of row l/4 of the activations.
        scales: float32 [P, 4], of the places.
    """
    if interpret:
        return arithmetic.fma(_dots(weights, x), scales, acc, interpret=True)
    operands = ("$4, $8, $5, $9", "$12, $13"), ("$6, $10, $7, $11", "$14, $15")
    # 0x4b400000 is 1.5 · 2²³ as float32: plus a small integer it is that float plus the integer.
    code = "mov.b32 c0, 0x4b400000; mov.b32 c1, c0; mov.b32 c2, c0; mov.b32 c3, c0; "
    for a, b in operands:
        code += f"mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {{c0, c1, c2, c3}}, {{{a}}}, {{{b}}}, {{c0, c1, c2, c3}}; "
    for i in range(4):
        code += f"mov.b32 t{i}, c{i}; sub.rn.f32 t{i}, t{i}, 0f4B400000; fma.rn.f32 t{i}, t{i}, ${16 + i}, ${20 + i}; "
    return _four(code, "r" * 12 + "f" * 8, [*weights, x, scales, acc])


def _four(code: str, kinds: str, args: Sequence[jax.Array]) -> jax.Array:
    """Assembly on four values of each lane that leaves its results in t0 to t3, float32 [P, 4]."""
    code = "{ .reg .s32 c<4>; .reg .f32 t<4>; " + code + " ".join(f"mov.f32 ${i}, t{i};" for i in range(4)) + " }"
    shape = jax.ShapeDtypeStruct(args[0].shape, jnp.float32)
    constraints = ",".join(["=f"] * 4 + list(kinds))
    [made] = plt.elementwise_inline_asm(code, args=list(args), constraints=constraints, pack=4, result_shape_dtypes=[shape])
    return made


def _dots(weights: Values, x: jax.Array) -> jax.Array:
    """The integers of the two instructions in jnp, float32 [P, 4]. They are below 2²⁴, so the products are exact."""

    def fragment(words: jax.Array) -> jax.Array:
        values = jnp.stack([(words << shift) >> 24 for shift in (24, 16, 8, 0)], axis=-1)
        return values.astype(jnp.float32).reshape(-1, COLUMNS, 4 * 16)

    rows = jnp.stack([fragment(words) for words in weights], axis=1)
    dots = jnp.einsum("wrgk,wnk->wgrn", rows, fragment(x), precision="highest", preferred_element_type=jnp.float32)
    return jnp.moveaxis(dots.reshape(-1, COLUMNS, 2, 4, 2), 2, 3).reshape(x.shape)


def eights_a_round(warps: int, split: int) -> int:
    """How many times eight rows have their sums in shared memory at once, at most one for each warp that shares rows."""
    return min(split, SHARED_BYTES // (warps * WARP_BYTES))


def sum_warps(sums: list[Values], split: int, *, interpret: bool) -> list[jax.Array]:
    """Sum the blocks of a step over the warps that share rows, the largest distance first, and then over the four blocks.

    Triton would sum over warps four values at a time, with two barriers each. Here the values of several times eight rows go
    through shared memory at once.

    Args:
        sums: for each eight rows four arrays, float32 [P, 4].

    Returns:
        float32 [P, 4] for each round of `eights_a_round`: warp p of `split` has the sums of the round's p-th eight rows, or
        repeats the last.
    """
    lanes = sums[0][0].shape[0]
    count = eights_a_round(lanes // LANES, split)
    rounds = [sums[first : first + count] for first in range(0, len(sums), count)]
    if interpret:
        return [_sum_warps(some, split) for some in rounds]
    # A lane's address in the part of shared memory that has the first eight rows.
    code = f"{{ .shared .align 16 .b8 sums[{len(rounds[0]) * lanes // LANES * WARP_BYTES}]; .reg .b32 a, t; mov.u32 t, %tid.x; "
    code += "mov.u32 a, sums; shl.b32 t, t, 4; add.u32 a, a, t; " + " ".join(f"mov.b32 ${i}, a;" for i in range(4)) + " }"
    address, made = _integers(code, [sums[0][0]], "f" * 4), list[jax.Array]()
    kept = " ".join(f"mov.b32 ${i}, $4;" for i in range(4))
    # Each piece of assembly takes the address from the one before, so that none is moved in front of it.
    for some in rounds:
        if made:
            address = _integers(f"bar.sync 0; {kept}", [address, made[-1]], "r" * 4 + "f" * 4)
        for number, values in enumerate(some):
            code = kept
            for b in range(STEP):
                words = ", ".join(f"${8 + 4 * b + i}" for i in range(4))
                code += f" st.shared.v4.f32 [$4+{(number * STEP + b) * lanes * 16}], {{{words}}};"
            address = _integers(code, [address, *values], "r" * 4 + "f" * 16)
        made.append(_four(_load_sums(len(some), split, lanes * 16), "r" * 4, [address]))
    return made


def _sum_warps(sums: list[Values], split: int) -> jax.Array:
    """One round of `sum_warps` in jnp."""
    total = jnp.stack([jnp.stack(values) for values in sums]).reshape(len(sums), STEP, -1, split, LANES, 4)
    while total.shape[3] > 1:
        total = total[:, :, :, : total.shape[3] // 2] + total[:, :, :, total.shape[3] // 2 :]
    total = (total[:, 0] + total[:, 2]) + (total[:, 1] + total[:, 3])
    own = [total[min(part, len(sums) - 1)] for part in range(split)]
    return jnp.concatenate(own, axis=1).reshape(-1, 4)


def _load_sums(count: int, split: int, step: int) -> str:
    """Assembly that waits for all warps, loads what the warps that share rows stored, and sums it into t0 to t3."""
    warp = LANES * 16
    code = f".reg .b32 a, p; .reg .f32 v<{split * STEP * 4}>; bar.sync 0; "
    code += f"mov.u32 p, %tid.x; shr.u32 p, p, 5; and.b32 p, p, {split - 1}; "
    # The first warp of those that share rows, and the eight rows of this one.
    code += (
        f"mul.lo.u32 a, p, {warp}; sub.u32 a, $4, a; min.u32 p, p, {count - 1}; mul.lo.u32 p, p, {STEP * step}; add.u32 a, a, p; "
    )
    for part in range(split):
        for b in range(STEP):
            names = ", ".join(f"v{(part * STEP + b) * 4 + i}" for i in range(4))
            code += f"ld.shared.v4.f32 {{{names}}}, [a+{b * step + part * warp}]; "
    distance = split * STEP * 4
    while distance > 4:
        distance //= 2
        code += " ".join(f"add.rn.f32 v{i}, v{i}, v{i + distance};" for i in range(distance))
    return code + " ".join(f"mov.f32 t{i}, v{i};" for i in range(4))


def _integers(code: str, args: Sequence[jax.Array], kinds: str) -> jax.Array:
    """Assembly on four values of each lane, with integers as results, int32 [P, 4]."""
    shape = jax.ShapeDtypeStruct(args[0].shape, jnp.int32)
    constraints = ",".join(["=r"] * 4 + list(kinds))
    [made] = plt.elementwise_inline_asm(code, args=list(args), constraints=constraints, pack=4, result_shape_dtypes=[shape])
    return made

"""Fixed arithmetic for kernel bodies: PTX instructions on the GPU, the same arithmetic in jnp in interpret mode.

A row must have the same bits for any number of rows. So every float operation rounds the same way in every kernel, and the
compiler must not choose between a fused and an unfused multiply-add.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt

LANES = 32


def _asm(instruction: str, constraints: str, dtype: jnp.dtype, *args: jax.Array, after: str = "") -> jax.Array:
    operands = ", ".join(f"${i}" for i in range(len(args) + 1))
    return assembly(f"{instruction} {operands}{after};", constraints, dtype, *args)


def assembly(code: str, constraints: str, dtype: jnp.dtype, *args: jax.Array, pack: int = 1) -> jax.Array:
    """PTX that a lane runs on `pack` values at a time of arrays of one shape. GPU only."""
    shape = jax.ShapeDtypeStruct(args[0].shape, dtype)
    [result] = plt.elementwise_inline_asm(code, args=list(args), constraints=constraints, pack=pack, result_shape_dtypes=[shape])
    return result


def dp4a(a: jax.Array, b: jax.Array, c: jax.Array, *, unsigned: bool = False, interpret: bool) -> jax.Array:
    """c plus the dot product of the four int8 values in each word of a and b; exact, int32.

    Args:
        unsigned: the values of a are from 0 to 255.
    """
    if not interpret:
        return _asm(f"dp4a.{'u32' if unsigned else 's32'}.s32", "=r,r,r,r", jnp.int32, a, b, c)
    mask = 255 if unsigned else -1
    return c + sum((((a << shift) >> 24) & mask) * ((b << shift) >> 24) for shift in (24, 16, 8, 0))


def chained_dot(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> jax.Array:
    """Dot product of one block per lane, int32 [32]: eight dp4a in one piece of assembly.

    GPU only. The result equals dp4a word by word, with fewer sums and a longer chain.

    Args:
        a, b: two halves of a block, int32 [32, 4] each.
    """
    words = [f"${4 + i}" for i in range(16)]
    steps = [f"dp4a.s32.s32 t, {words[i]}, {words[8 + i]}, {'t' if i else '0'};" for i in range(8)]
    # Each lane gets the total in its first word and zeros in the other three; the sum adds them up.
    code = "{ .reg .s32 t; " + " ".join(steps) + " mov.b32 $0, t; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; }"
    shape = jax.ShapeDtypeStruct(a[0].shape, jnp.int32)
    constraints = ",".join(["=r"] * 4 + ["r"] * 16)
    [total] = plt.elementwise_inline_asm(code, args=[*a, *b], constraints=constraints, pack=4, result_shape_dtypes=[shape])
    return jnp.sum(total, axis=-1)


def dot_of_halves(numbers: jax.Array, word: jax.Array, *, interpret: bool) -> jax.Array:
    """Dot product of four numbers of each lane with the bytes of a word; exact.

    Args:
        numbers: int32 [32, 4], of 16 bits with the sign.
        word: int32 [32]; its bytes are from 0 to 255.

    Returns:
        int32 [32].
    """
    words = jnp.broadcast_to(word[:, None], numbers.shape)
    if interpret:
        return jnp.sum(numbers * ((words >> (8 * jax.lax.broadcasted_iota(jnp.int32, words.shape, 1))) & 255), axis=-1)
    code = "{ .reg .b32 a, b, t; prmt.b32 a, $4, $5, 0x5410; prmt.b32 b, $6, $7, 0x5410; "
    # The sum is over one value and three zeros, which cost nothing.
    code += "dp2a.lo.s32.u32 t, a, $8, 0; dp2a.hi.s32.u32 $0, b, $8, t; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; }"
    return jnp.sum(assembly(code, ",".join(["=r"] * 4 + ["r"] * 8), jnp.int32, numbers, words, pack=4), axis=-1)


def pick_bytes(low: int | jax.Array, high: int, selector: jax.Array, *, interpret: bool) -> jax.Array:
    """Pick four of the eight byte constants in `low` (0..3) and `high` (4..7): one int32 word.

    A permutation takes one constant; the other has to be in a register. The compiler moves a `low` that it knows there before
    each use, so a kernel that is bound by its integer work passes one that it loaded.

    The low half of `selector` has four bits per byte, the first byte's lowest: a constant's number, and above it a bit; where
    that is set, the byte is the constant's highest bit eight times.
    """
    if not interpret and isinstance(low, int):
        return assembly(f"prmt.b32 $0, {low:#x}, {high:#x}, $1;", "=r,r", jnp.int32, selector)
    if not interpret:
        word = jnp.broadcast_to(low, selector.shape)
        return assembly(f"prmt.b32 $0, $1, {high:#x}, $2;", "=r,r,r", jnp.int32, word, selector)
    low_word = signed(low) if isinstance(low, int) else low

    def byte(i: int) -> jax.Array:
        name = (selector >> (4 * i)) & 7
        found = jnp.where(name < 4, low_word >> (8 * (name & 3)), signed(high) >> (8 * (name & 3)))
        found = jnp.where((selector >> (4 * i + 3)) & 1 == 1, (found << 24) >> 31, found)
        return (found & 255) << (8 * i)

    return byte(0) | byte(1) | byte(2) | byte(3)


def mask_bytes(word: jax.Array, *, interpret: bool) -> jax.Array:
    """255 for each byte of an int32 word whose highest bit is set, and 0 for the others."""
    if not interpret:
        return assembly("prmt.b32 $0, $1, 0, 0xba98;", "=r,r", jnp.int32, word)
    return ((word >> 7) & 0x01010101) * 255


def signed(word: int) -> int:
    """The int32 with the bits of a word from 0 to 2³² − 1."""
    return word - (1 << 32) if word >> 31 else word


def fma(a: jax.Array, b: jax.Array, c: jax.Array, *, interpret: bool) -> jax.Array:
    """a · b + c in float32, rounded once on the GPU and always twice in interpret mode.

    Without the barrier a CPU compiler fuses the two for some numbers of rows and not for others.
    """
    if not interpret:
        return _asm("fma.rn.f32", "=f,f,f,f", jnp.float32, a, b, c)
    return jax.lax.optimization_barrier(a * b) + c


def multiply(a: jax.Array, b: jax.Array, *, interpret: bool) -> jax.Array:
    """a · b in float32, never fused with an addition on the GPU."""
    return a * b if interpret else _asm("mul.rn.f32", "=f,f,f", jnp.float32, a, b)


def divide(a: jax.Array, b: jax.Array, *, interpret: bool) -> jax.Array:
    """a / b in float32, correctly rounded.

    XLA replaces a division by a constant with a product, which is off by one bit in 4 % of cases. The barrier hides the constant.
    """
    if not interpret:
        return _asm("div.rn.f32", "=f,f,f", jnp.float32, a, b)
    return jax.lax.div(*jax.lax.optimization_barrier((a, b)))


def round_to_int(x: jax.Array, *, interpret: bool) -> jax.Array:
    """float32 to int32, half to even; a NaN becomes 0."""
    if not interpret:
        return _asm("cvt.rni.s32.f32", "=r,f", jnp.int32, x)
    return jnp.nan_to_num(jnp.round(x), nan=0.0).astype(jnp.int32)


def exchange(x: jax.Array, distance: int, *, interpret: bool) -> jax.Array:
    """Exchange x, float32 [32·W] with one value per lane of W warps: lane l of a warp gets the value of its lane l ^ distance.

    Raises:
        ValueError: x has another shape.
    """
    if len(x.shape) != 1 or x.shape[0] % LANES:
        raise ValueError(f"x is {list(x.shape)}; warps exchange one value per lane, [{LANES}·W]")
    if not interpret:
        return _asm("shfl.sync.bfly.b32", "=f,f", jnp.float32, x, after=f", {distance}, 0x1f, 0xffffffff")
    return jnp.flip(x.reshape(-1, 2, distance), axis=1).reshape(x.shape)


def sum_lanes(values: Sequence[jax.Array], lane: jax.Array, *, interpret: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sum each of up to 32 arrays over the 32 lanes of each of a program's warps.

    Each value is summed by a butterfly over the distances 16, 8, 4, 2, 1. As long as there are several values, half of the lanes
    continue with the first of two values and the other half with the second: 8 values need 9 exchanges instead of 40. The tree
    of additions of each value is the same as that of a single butterfly, so its bits do not depend on the number of values.

    Args:
        values: float32 [32·W] each.
        lane: int32 [32·W], each lane's own number in its warp.

    Returns:
        float32 [32·W] sums; int32 [32·W], the index of the value that a lane has the sum of; bool [32·W], true in one lane of a
        warp per value.
    """
    places = 1 << (len(values) - 1).bit_length()
    spread, distance, left = LANES // places, LANES // 2, list(values)
    for merged in range(places.bit_length() - 1):
        half, upper = places >> (merged + 1), (lane & distance) != 0
        # The second half may be shorter. Both halves of the lanes sum a value that has no partner.
        pairs = [_merge(low, high, upper, distance, interpret=interpret) for low, high in zip(left, left[half:], strict=False)]
        alone = [low + exchange(low, distance, interpret=interpret) for low in left[len(pairs) : half]]
        left, distance = pairs + alone, distance // 2
    [total] = left
    while distance:
        total, distance = total + exchange(total, distance, interpret=interpret), distance // 2
    place = lane // spread
    return total, place, (lane % spread == 0) & (place < len(values))


def _merge(low: jax.Array, high: jax.Array, upper: jax.Array, distance: int, *, interpret: bool) -> jax.Array:
    """One step of two butterflies in one exchange: `upper` lanes continue with `high`, the others with `low`."""
    kept, sent = jnp.where(upper, high, low), jnp.where(upper, low, high)
    return kept + exchange(sent, distance, interpret=interpret)

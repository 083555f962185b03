"""Instructions of one thread inside a Pallas Mosaic GPU kernel, for what its arrays cannot express: byte permutations and plain
loads and stores by address.

A value is 32 bits, integer or float as the instruction reads it; an address is 64 bits. Tests replace `Code` by an emulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

# Threads of a warpgroup.
THREADS = 128
# A float32 whose lowest bits are those of an integer that is added to it.
_OFFSET = 2.0**23


def bits_of(value: float) -> int:
    """The bits of a float32."""
    return int(np.float32(value).view(np.uint32))


class Code:
    """Emits instructions at MLIR's insertion point."""

    def __init__(self) -> None:
        self._i32, self._i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))

    def _asm(self, text: str, constraints: str, *operands: Any, results: int = 1, ordered: bool = False) -> list[Any]:
        """PTX with some 32-bit results; `ordered` instructions keep their order."""
        names = {0: "!llvm.void", 1: "i32"}
        type_ = ir.Type.parse(names.get(results, f"!llvm.struct<({', '.join(['i32'] * results)})>"))
        made: Any = llvm.inline_asm(type_, list(operands), text, constraints, has_side_effects=ordered, asm_dialect=0)
        return [made] if results < 2 else [llvm.extractvalue(self._i32, made, [i]) for i in range(results)]

    def _two(self, name: str, a: Any, b: Any) -> Any:
        """An instruction of two operands, the second a value or a constant."""
        if isinstance(b, int):
            return self._asm(f"{name} $0, $1, $2;", "=r,r,n", a, self.constant(b))[0]
        return self._asm(f"{name} $0, $1, $2;", "=r,r,r", a, b)[0]

    def constant(self, value: int) -> Any:
        """The constant with the bits of `value`."""
        signed = (value & 0xFFFFFFFF) - ((value & 0x80000000) << 1)
        return llvm.ConstantOp(self._i32, ir.IntegerAttr.get(self._i32, signed)).result

    def thread(self) -> Any:
        """The thread's number in its warpgroup."""
        return self.masked(self._asm("mov.u32 $0, %tid.x;", "=r")[0], THREADS - 1)

    def uniform(self, a: Any) -> Any:
        """a, which all threads of a warp have, in a form in which the compiler knows it."""
        return self._asm("shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;", "=r,r", a, ordered=True)[0]

    def plus(self, a: Any, b: Any) -> Any:
        """a + b of integers."""
        return arith.addi(a, self.constant(b) if isinstance(b, int) else b)

    def scaled(self, a: Any, factor: int) -> Any:
        """a · factor of integers."""
        return arith.muli(a, self.constant(factor))

    def shift_left(self, a: Any, by: Any) -> Any:
        """a shifted to the left."""
        return a if isinstance(by, int) and by == 0 else self._two("shl.b32", a, by)

    def shift_right(self, a: Any, by: Any) -> Any:
        """a shifted to the right, with zeros."""
        return a if isinstance(by, int) and by == 0 else self._two("shr.u32", a, by)

    def masked(self, a: Any, mask: int) -> Any:
        """a & mask."""
        return self._two("and.b32", a, mask)

    def masked_or(self, a: Any, mask: int, b: Any) -> Any:
        """(a & mask) | b."""
        b = self.constant(b) if isinstance(b, int) else b
        return self._asm("lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", a, self.constant(mask), b)[0]

    def masked_flipped(self, a: Any, mask: int, b: Any) -> Any:
        """(a & mask) ^ b."""
        return self._asm("lop3.b32 $0, $1, $2, $3, 0x6A;", "=r,r,r,r", a, self.constant(mask), b)[0]

    def larger(self, a: Any, b: int) -> Any:
        """The maximum of two unsigned integers."""
        return self._two("max.u32", a, b)

    def flipped(self, a: Any, mask: int) -> Any:
        """a ^ mask."""
        return self._two("xor.b32", a, mask)

    def permuted(self, a: Any, b: Any, selector: Any) -> Any:
        """The bytes of a (0 to 3) and b (4 to 7) that the four lowest nibbles of `selector` name."""
        kind = "n" if isinstance(selector, int) else "r"
        selector = self.constant(selector) if isinstance(selector, int) else selector
        return self._asm("prmt.b32 $0, $1, $2, $3;", f"=r,r,r,{kind}", a, b, selector)[0]

    def small_float(self, a: Any, mask: int) -> Any:
        """The integer a & mask, below 256, as a float32."""
        return self._without_offset(self.masked_or(a, mask, bits_of(_OFFSET)))

    def float_of_byte(self, a: Any, i: int) -> Any:
        """Byte i of a, unsigned, as a float32."""
        return self._without_offset(self.permuted(a, self.constant(bits_of(_OFFSET)), 0x7440 + i))

    def _without_offset(self, a: Any) -> Any:
        # An addition takes a quarter of a conversion's time.
        return self._two("add.rn.f32", a, self.constant(bits_of(-_OFFSET)))

    def half(self, a: Any) -> Any:
        """The float16 in the lower half of a as a float32."""
        return self._asm("{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, l; }", "=r,r", a)[0]

    def product(self, a: Any, b: Any) -> Any:
        """a · b of float32 values; b is a value or a number."""
        return self._two("mul.rn.f32", a, self.constant(bits_of(b)) if isinstance(b, float) else b)

    def product_plus(self, a: Any, b: Any, c: Any) -> Any:
        """a · b + c of float32 values, rounded once; b and c are values or numbers."""
        b, c = (self.constant(bits_of(x)) if isinstance(x, float) else x for x in (b, c))
        return self._asm("fma.rn.f32 $0, $1, $2, $3;", "=r,r,r,r", a, b, c)[0]

    def narrow_product(self, a: Any, b: Any) -> Any:
        """The products of two bfloat16 each."""
        return self._two("mul.rn.bf16x2", a, b)

    def narrowed(self, low: Any, high: Any) -> Any:
        """Two float32 values rounded to bfloat16, in one value."""
        return self._asm("cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,r,r", high, low)[0]

    def looked_up(self, table: Any, offset: Any) -> Any:
        """The word at an offset in bytes of a table in shared memory."""
        return self._asm("ld.shared.u32 $0, [$1];", "=r,r", self.plus(offset, table))[0]

    def stored_in_table(self, table: Any, offset: Any, a: Any) -> None:
        """Store a word in shared memory."""
        self._asm("st.shared.u32 [$0], $1;", "r,r", self.plus(offset, table), a, results=0, ordered=True)

    def address(self, base: Any, row: Any, pitch: int, offset: Any) -> Any:
        """The address base + row · pitch + offset, in bytes; row and offset are values."""
        wide = llvm.ConstantOp(self._i64, ir.IntegerAttr.get(self._i64, pitch)).result
        far = arith.muli(arith.extsi(self._i64, row), wide)
        return arith.addi(base, arith.addi(far, arith.extsi(self._i64, offset)))

    def near(self, base: Any, offset: Any) -> Any:
        """The address base + offset, in bytes; the offset is not negative."""
        return arith.addi(base, arith.extui(self._i64, offset))

    def loaded(self, address: Any, *, bits: int, offset: int = 0) -> list[Any]:
        """Words of global memory that no launch writes meanwhile: 16 bits in a word, or one, two, four or eight words."""
        if bits > 128:
            return [word for i in range(bits // 128) for word in self.loaded(address, bits=128, offset=offset + 16 * i)]
        words = max(1, bits // 32)
        at = f"[${words} + {offset}]"
        constraints = ",".join(["=r"] * words + ["l"])
        if words == 1:
            return self._asm(f"ld.global.nc.u{bits} $0, {at};", constraints, address, ordered=True)
        # Blocks of a row follow each other in memory, and later iterations find them in the L2.
        into = ", ".join(f"${i}" for i in range(words))
        text = f"ld.global.nc.L2::256B.v{words}.u32 {{{into}}}, {at};"
        return self._asm(text, constraints, address, results=words, ordered=True)

    def stored_if(self, smaller: Any, bound: Any, address: Any, a: Any, *, narrow: bool, offset: int = 0) -> None:
        """Store float32 a, or its bfloat16 if `narrow`, if `smaller` < `bound`."""
        store = f"st.global.b32 [$0 + {offset}], $1;"
        if narrow:
            store = f"st.global.b16 [$0 + {offset}], h;"
        text = f"{{ .reg .pred p; .reg .b16 h; cvt.rn.bf16.f32 h, $1; setp.lt.s32 p, $2, $3; @p {store} }}"
        self._asm(text, "l,r,r,r", address, a, smaller, bound, results=0, ordered=True)


Words = Sequence[Any]

"""Attention of few rows: the kernels against their meaning, rows against rows alone."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.harness import Op, check_lowers, check_meaning, check_rows, check_unread
from numerics import assert_bits_equal

from pallas_kernels.attention import decode, meaning
from pallas_kernels.attention.decode import COMBINE_NAME, SPLIT_NAME, Chosen, Leading, attend
from pallas_kernels.attention.stored_rows import narrow_rows
from pallas_kernels.core import rounding
from pallas_kernels.linear import activation

EPS = 1e-6
# Of a row's largest output; what is seen in interpret mode is a fifth.
CLOSE = 3e-6
# Tensor cores cut their sums off where a CPU rounds.
CLOSE_ON_GPU = 2e-5


def in_halves(x: Any, plain: int) -> Any:
    """Rows that float16 holds."""
    return x.astype(np.float16).astype(np.float32)


@functools.partial(jax.jit, static_argnums=1)
def as_trained(x: jax.Array, plain: int) -> jax.Array:
    """Rows as a model has them: FP8 but for the columns that rotate."""
    return jnp.concatenate([rounding.fp8(x[..., :plain]), x[..., plain:]], axis=-1)


@functools.cache
def compiled(function: Any, **options: Any) -> Any:
    return jax.jit(functools.partial(function, **options))


@dataclasses.dataclass(frozen=True)
class Case:
    """A call: `position` of each row, `end` rows in the cache, and `leading` or `chosen` compressed rows of `stored` for each.

    Rows are of one sequence, or `sequence` and `end` say for each.
    """

    position: tuple[int, ...]
    end: int | tuple[int, ...]
    sequence: tuple[int, ...] = ()
    leading: tuple[int, ...] = ()
    chosen: int = 0
    stored: int = 0
    heads: int = 4
    dim: int = 64
    rope: int = 32
    groups: int = 2
    window: int = 40
    ring: int = 47

    def operands(self, finish: Any = in_halves, normal: Any = None) -> tuple[Any, ...]:
        """Operands of `attend`, with rows as `finish` leaves them; floats are random or what `normal` makes of a shape."""
        m, random = len(self.position), np.random.default_rng([self.dim, self.stored])
        normal = normal or functools.partial(random.standard_normal, dtype=np.float32)
        position = np.asarray(self.position, np.int32)
        angle = position.astype(np.float32)[:, None] * np.exp(-np.arange(self.rope // 2, dtype=np.float32))[None, :]
        sequence = np.asarray(self.sequence or (0,) * m, np.int32)
        end = np.broadcast_to(np.asarray(self.end, np.int32), m)
        count = 1 + max(self.sequence, default=0)
        ring, rows = normal((count, self.ring, self.dim)), normal((count, self.stored, self.dim))
        ring, rows = (finish(x, self.dim - self.rope) for x in (ring, rows))
        compressed: Leading | Chosen | None = None
        if self.leading:
            compressed = Leading(rows, np.asarray(self.leading, np.int32))
        if self.chosen:
            index = np.maximum(random.integers(-self.stored // 2, self.stored, (m, self.chosen), np.int32), np.int32(-1))
            index[0] = -1
            compressed = Chosen(rows, index)
        q, sink = normal((m, self.heads * self.dim)) * 3, normal(self.heads)
        return q, sink, np.cos(angle), np.sin(angle), ring, sequence, position, end, compressed

    @property
    def options(self) -> dict[str, Any]:
        """Static arguments of `attend` and its meaning."""
        return {"window": self.window, "scale": self.dim**-0.5, "eps": EPS}

    def call(self, *args: Any, interpret: bool = True) -> Any:
        return compiled(attend, groups=self.groups, interpret=interpret, **self.options)(*args)

    @property
    def op(self) -> Op:
        """The kernel with this call's options."""

        def expected(*args: Any) -> jax.Array:
            with jax.default_matmul_precision("highest"):
                return compiled(meaning.decode, **self.options)(*args)

        return Op(f"{self}", self.call, expected, tolerance=CLOSE, compared=lambda made: made[0], take=row_of)


CASES = {
    "first row": Case((0,), 1),
    "part of the ring": Case((5, 6, 7, 7), 8),
    "a full ring": Case((46,), 47),
    "wrapped": Case((98, 99, 100), 101),
    "a clone past the live rows": Case((98, 99, 99), 100),
    "leading rows": Case((98, 99, 100), 101, leading=(33, 0, 70), stored=70),
    "several spans a split": Case((98, 99), 101, leading=(2100, 31), stored=2200, dim=32, rope=16),
    "chosen rows": Case((98, 99, 100), 101, chosen=40, stored=90),
    "golden model": Case((98, 99), 100, chosen=8, stored=30, dim=96, window=16, ring=20),
    "chunks of 128": Case((98, 99), 101, leading=(9, 20), stored=20, dim=256, rope=64),
    "twenty heads": Case((98, 99), 101, leading=(9, 20), stored=20, heads=20, groups=5),
}
FLASH = {"heads": 64, "dim": 512, "rope": 64, "groups": 8, "window": 128, "ring": 131}
FLASH_CASES = {
    "early": Case((2, 3), 4, **FLASH),
    "window alone": Case((1000, 1001, 1001), 1002, **FLASH),
    "chosen": Case((3000, 3001), 3002, chosen=512, stored=1024, **FLASH),
    "leading": Case((3000, 3001), 3002, leading=(23, 24), stored=64, **FLASH),
    "long": Case((400000, 400001), 400002, leading=(3125, 3126), stored=8192, **FLASH),
}
# Each of them reads the cache in another way.
SOME = ("golden model", "wrapped", "chosen rows")
BOTH = pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in SOME else pytest.mark.slow) for name in CASES])
ONE = pytest.mark.parametrize(
    "name", [name if name == "golden model" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
ON_GPU = pytest.mark.parametrize("name", [*CASES, *(f"flash {name}" for name in FLASH_CASES)])


def of(name: str) -> Case:
    return FLASH_CASES[name.removeprefix("flash ")] if name.startswith("flash ") else CASES[name]


def check(name: str, *, interpret: bool) -> None:
    case = of(name)
    args = case.operands()
    check_meaning(case.op, args, interpret=interpret)
    out, quantized = case.call(*args, interpret=interpret)
    # In a launch of its own: XLA's division on a GPU is not correctly rounded, the kernels' is.
    expected = compiled(activation.quantize, groups=case.groups, interpret=interpret)(out)
    assert_bits_equal(quantized.quants, expected.quants)
    assert_bits_equal(quantized.scales, expected.scales)

    check_meaning(case.op, case.operands(as_trained), interpret=interpret, tolerance=CLOSE if interpret else CLOSE_ON_GPU)


@BOTH
@pytest.mark.long
def test_equals_the_meaning(name):
    check(name, interpret=True)


@pytest.mark.parametrize(
    "name",
    ["wrapped", "chosen rows", *(pytest.param(name, marks=pytest.mark.slow) for name in ("part of the ring", "leading rows"))],
)
@pytest.mark.long
def test_what_no_row_sees_may_hold_anything(name):
    case = CASES[name]
    *args, compressed = clean = case.operands()
    position, last = args[6], case.end - 1
    held = last - (last - np.arange(case.ring)) % case.ring
    seen = (held >= 0) & (held <= position.max()) & (held > position.min() - case.window)
    args[4] = np.where(seen[None, :, None], args[4], np.float32(np.nan))
    if compressed is not None:
        unseen = np.arange(case.stored)
        unseen = unseen[max(case.leading) :] if case.leading else np.setdiff1d(unseen, compressed.index)
        rows = compressed.rows.copy()
        rows[0, unseen] = np.nan
        compressed = dataclasses.replace(compressed, rows=rows)
    assert not seen.all()
    check_unread(case.op, clean, (*args, compressed))


def row_of(args: tuple[Any, ...], rows: slice) -> tuple[Any, ...]:
    q, sink, cos, sin, ring, *where, compressed = args
    if isinstance(compressed, Leading):
        compressed = dataclasses.replace(compressed, visible=compressed.visible[rows])
    if isinstance(compressed, Chosen):
        compressed = dataclasses.replace(compressed, index=compressed.index[rows])
    return q[rows], sink, cos[rows], sin[rows], ring, *(x[rows] for x in where), compressed


def check_company(case: Case, counts: tuple[int, ...], *, interpret: bool) -> None:
    args = case.operands(as_trained)

    def alone(m: int) -> tuple[Any, ...]:
        """A row alone is also the last in the cache, with the rows that follow it not there yet."""
        *own, end, compressed = row_of(args, slice(m, m + 1))
        return *own, np.full_like(end, case.position[m] + 1), compressed

    check_rows(case.op, args, counts, interpret=interpret, alone=alone)


# Rows of a long sequence, of a short one and of the long one again.
TWO = Case((98, 5, 99), (100, 6, 100), (1, 0, 1), leading=(33, 1, 34), stored=40, dim=32, rope=16, heads=2)
TWO_CHOSEN = dataclasses.replace(TWO, leading=(), chosen=40)
TWO_CASES = pytest.mark.parametrize("case", [pytest.param(TWO, marks=pytest.mark.long), TWO_CHOSEN], ids=["leading", "chosen"])


def check_sequences(case: Case, *, interpret: bool) -> None:
    """Each row as alone with its own sequence's cache, whatever the other sequence's holds; and close to the meaning."""
    *others, ring, sequence, position, end, compressed = args = case.operands(as_trained)
    check_meaning(case.op, args, interpret=interpret, tolerance=CLOSE if interpret else CLOSE_ON_GPU)

    def alone(m: int) -> tuple[Any, ...]:
        *own, held, s, own_position, own_end, rows = row_of(args, slice(m, m + 1))
        mine = slice(s[0], s[0] + 1)
        return *own, held[mine], np.zeros(1, np.int32), own_position, own_end, dataclasses.replace(rows, rows=rows.rows[mine])

    check_rows(case.op, args, (len(sequence),), interpret=interpret, alone=alone)
    ring, rows = (np.where(np.arange(2)[:, None, None] == 0, np.float32(np.nan), x) for x in (ring, compressed.rows))
    poisoned = *others, ring, sequence, position, end, dataclasses.replace(compressed, rows=rows)
    check_unread(case.op, args, poisoned, sequence == 1, interpret=interpret)


@TWO_CASES
def test_rows_of_two_sequences_are_those_of_each_alone(case):
    check_sequences(case, interpret=True)


_narrow_rows = jax.jit(narrow_rows, static_argnums=1)


def with_narrow_rows(case: Case, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same operands, compressed rows narrow."""
    *others, compressed = args
    return *others, dataclasses.replace(compressed, rows=_narrow_rows(compressed.rows, case.rope))


def check_narrow(case: Case, *, interpret: bool) -> None:
    args = case.operands(as_trained)
    wide, narrow = (case.call(*given, interpret=interpret) for given in (args, with_narrow_rows(case, args)))
    for name, array, expected in zip(("output", "quants", "scales"), jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        np.testing.assert_array_equal(
            np.asarray(array).view(np.int32), np.asarray(expected).view(np.int32), err_msg=f"{name}, {case}"
        )


# Blocks of 64 columns in chunks of 32 and of 128, the last of which ends in columns that rotate.
NARROW = {
    "golden model": CASES["golden model"],
    "leading rows": Case((98, 99, 100), 101, leading=(33, 0, 70), stored=70, dim=128, rope=64, heads=2),
    "chosen rows": Case((98, 99, 100), 101, chosen=40, stored=90, dim=256, rope=64, heads=2),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "chosen rows" else pytest.mark.slow) for name in NARROW])
@pytest.mark.long
def test_narrow_rows_give_the_same_bits(name):
    check_narrow(NARROW[name], interpret=True)


def test_narrow_rows_have_the_columns_that_turn():
    case = NARROW["leading rows"]
    q, sink, cos, sin, *args = with_narrow_rows(case, case.operands(as_trained))
    with pytest.raises(ValueError, match="32 columns rotate; the narrow rows have 64"):
        case.call(q, sink, cos[:, :16], sin[:, :16], *args)


EIGHT = Case((95, 96, 97, 98, 99, 100, 101, 101), 102, leading=(33, 0, 70, 1, 2, 64, 65, 65), stored=70, dim=32, rope=16)
EIGHT_CHOSEN = dataclasses.replace(EIGHT, leading=(), chosen=40)
EARLY = dataclasses.replace(EIGHT, position=(26, 27, 28, 29, 30, 31, 32, 32), end=33, leading=())
EIGHT_CASES = pytest.mark.parametrize("case", [EIGHT, EIGHT_CHOSEN, EARLY], ids=["leading", "chosen", "early"])


@EIGHT_CASES
@pytest.mark.slow
def test_each_row_has_the_bits_of_the_row_alone(case):
    check_company(case, (2, 3, 8), interpret=True)


@pytest.mark.parametrize(
    "case", [EARLY, pytest.param(EIGHT, marks=pytest.mark.long), pytest.param(EIGHT_CHOSEN, marks=pytest.mark.slow)]
)
def test_groups_of_splits_have_the_bits_of_single_ones(case, monkeypatch):
    """Programs of many rows add up a group's splits themselves, in the order of the second kernel."""
    args = case.operands(as_trained)
    apart = case.call(*args)
    monkeypatch.setattr(decode, "GROUP_PROGRAMS", 1)
    # A function of its own: `compiled` has traced the other form.
    grouped = jax.jit(functools.partial(attend.__wrapped__, groups=case.groups, interpret=True, **case.options))(*args)
    for found, wanted in zip(jax.tree.leaves(grouped), jax.tree.leaves(apart), strict=True):
        assert_bits_equal(found, wanted)


@pytest.mark.long
@pytest.mark.parametrize("m", [3, 32, *(pytest.param(m, marks=pytest.mark.slow) for m in (1, 8))])
@pytest.mark.parametrize("name", FLASH_CASES)
def test_lowers_for_cuda(name, m):
    case = FLASH_CASES[name]
    case = dataclasses.replace(
        case, position=case.position[:1] * m, sequence=tuple(range(m)), leading=case.leading[:1] * m, stored=max(case.stored, 1)
    )
    args = jax.eval_shape(functools.partial(case.operands, normal=jnp.zeros))
    check_lowers(functools.partial(attend, groups=8, **case.options), args, {SPLIT_NAME: 1, COMBINE_NAME: 1})


@pytest.mark.long
@pytest.mark.parametrize("name", ["chosen", "leading", "long"])
def test_narrow_rows_lower_for_cuda(name):
    case = FLASH_CASES[name]
    args = jax.eval_shape(lambda: with_narrow_rows(case, case.operands(as_trained, jnp.zeros)))
    check_lowers(functools.partial(attend, groups=8, **case.options), args, {SPLIT_NAME: 1})


@ONE
def test_small_models_lower_for_cuda(name):
    case = CASES[name]
    check_lowers(functools.partial(attend, groups=case.groups, **case.options), case.operands(), {SPLIT_NAME: 1})


def test_a_head_of_odd_length_is_refused():
    case = Case((3,), 4, dim=48)
    with pytest.raises(ValueError, match="48 columns"):
        case.call(*case.operands())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["chosen", "leading"])
def test_rows_of_many_sequences_on_the_gpu(name):
    """Thirty-two rows, whose programs have groups of splits, and eight, whose programs have single ones, as each alone."""
    base, rows = FLASH_CASES[name], 32
    shape = {"position": tuple(2000 + m for m in range(rows)), "end": tuple(2001 + m for m in range(rows))}
    case = dataclasses.replace(base, sequence=tuple(range(rows)), leading=base.leading[:1] * rows, **shape)
    check_rows(case.op, case.operands(as_trained), (8, rows), interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*NARROW, "flash chosen", "flash leading"])
def test_narrow_rows_give_the_same_bits_on_a_gpu(name):
    check_narrow(NARROW[name] if name in NARROW else of(name), interpret=False)


@pytest.mark.gpu
def test_narrow_rows_of_many_spans_on_a_gpu():
    """A compiler joins products and sums of a loop as suits the rest of its body: the same values, in another last bit."""
    case = of("flash long")
    args = case.operands(as_trained)
    wide, narrow = (case.call(*given, interpret=False)[0] for given in (args, with_narrow_rows(case, args)))
    np.testing.assert_allclose(narrow, wide, rtol=0, atol=CLOSE_ON_GPU * np.abs(wide).max())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [{}, {**FLASH, "ring": 136}], ids=["small", "flash"])
@TWO_CASES
def test_rows_of_two_sequences_are_those_of_each_alone_on_a_gpu(case, shape):
    check_sequences(dataclasses.replace(case, **shape), interpret=False)


@pytest.mark.gpu
@ON_GPU
def test_equals_the_meaning_on_a_gpu(name):
    check(name, interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [{}, {**FLASH, "ring": 136}], ids=["small", "flash"])
@EIGHT_CASES
def test_each_row_has_the_bits_of_the_row_alone_on_a_gpu(case, shape):
    check_company(dataclasses.replace(case, **shape), (2, 3, 4, 8), interpret=False)

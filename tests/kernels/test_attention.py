"""Attention of few rows: the kernels against jnp and against the model's own parts, rows against rows alone."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import kernel_calls, lowered_for_cuda
from numerics import assert_bits_equal, golden_config

from ds4jax.cache import ring_positions
from ds4jax.model import attention as model
from ds4jax.model.layers import rms_scale
from ds4jax.model.rope import inverse_frequencies, rotate
from pallas_kernels import activation, rounding
from pallas_kernels.attention import COMBINE_NAME, SPLIT_NAME, Chosen, Leading, attend, attend_reference
from pallas_kernels.narrow import narrow_rows

EPS = 1e-6
# Of a row's largest output; what is seen in interpret mode is a fifth.
CLOSE = 3e-6
# Tensor cores cut their sums off where a CPU rounds.
CLOSE_ON_GPU = 2e-5


def in_halves(x: Any, still: int) -> Any:
    """Rows that float16 holds."""
    return x.astype(np.float16).astype(np.float32)


@functools.partial(jax.jit, static_argnums=1)
def as_trained(x: jax.Array, still: int) -> jax.Array:
    """Rows as a model has them: FP8 but for the columns that turn."""
    return jnp.concatenate([rounding.fp8(x[..., :still]), x[..., still:]], axis=-1)


@functools.cache
def compiled(function: Any, **options: Any) -> Any:
    return jax.jit(functools.partial(function, **options))


@dataclasses.dataclass(frozen=True)
class Case:
    """A call: `position` of each row, `end` rows in the cache, and `leading` or `chosen` compressed rows of `stored` for each."""

    position: tuple[int, ...]
    end: int
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
        ring, rows = normal((1, self.ring, self.dim)), normal((1, self.stored, self.dim))
        ring, rows = (finish(x, self.dim - self.rope) for x in (ring, rows))
        compressed: Leading | Chosen | None = None
        if self.leading:
            compressed = Leading(rows, np.asarray(self.leading, np.int32))
        if self.chosen:
            index = np.maximum(random.integers(-self.stored // 2, self.stored, (m, self.chosen), np.int32), np.int32(-1))
            index[0] = -1
            compressed = Chosen(rows, index)
        q, sink = normal((m, self.heads * self.dim)) * 3, normal(self.heads)
        return q, sink, np.cos(angle), np.sin(angle), ring, position, np.full(1, self.end, np.int32), compressed

    @property
    def options(self) -> dict[str, Any]:
        """Static arguments of `attend` and its reference."""
        return {"window": self.window, "scale": self.dim**-0.5, "eps": EPS}

    def call(self, *args: Any, interpret: bool = True) -> Any:
        return compiled(attend, groups=self.groups, interpret=interpret, **self.options)(*args)

    def expect(self, *args: Any) -> jax.Array:
        return compiled(attend_reference, **self.options)(*args)


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
BOTH = pytest.mark.parametrize("name", CASES)
ON_GPU = pytest.mark.parametrize("name", [*CASES, *(f"flash {name}" for name in FLASH_CASES)])


def of(name: str) -> Case:
    return FLASH_CASES[name.removeprefix("flash ")] if name.startswith("flash ") else CASES[name]


def error(out: jax.Array, expected: jax.Array) -> np.ndarray:
    """Largest difference of each row over its largest value."""
    out, expected = np.asarray(out), np.asarray(expected)
    return np.abs(out - expected).max(axis=-1) / np.abs(expected).max(axis=-1)


def check(name: str, *, interpret: bool) -> None:
    case, close = of(name), CLOSE if interpret else CLOSE_ON_GPU
    args = case.operands()
    out, quantized = case.call(*args, interpret=interpret)
    worst = error(out, case.expect(*args))
    assert (worst <= CLOSE).all(), f"{name}: rows differ by {worst} of their largest value"
    # In a launch of its own: XLA's division on a GPU is not correctly rounded, the kernels' is.
    expected = compiled(activation.quantize, groups=case.groups, interpret=interpret)(out)
    assert_bits_equal(quantized.quants, expected.quants)
    assert_bits_equal(quantized.scales, expected.scales)

    args = case.operands(as_trained)
    worst = error(case.call(*args, interpret=interpret)[0], case.expect(*args))
    assert (worst <= close).all(), f"{name}: trained rows differ by {worst} of their largest value"


@BOTH
@pytest.mark.long
def test_equals_the_reference(name):
    check(name, interpret=True)


@pytest.mark.parametrize("kind", ["window", "leading", "chosen"])
def test_the_reference_is_the_model(kind):
    config = golden_config()
    case = Case((33, 34, 35), 36, heads=config.n_heads, dim=config.head_dim, rope=config.rope_dim, window=16, ring=20, stored=12)
    case = dataclasses.replace(case, **{"leading": {"leading": (8, 0, 9)}, "chosen": {"chosen": 6}}.get(kind, {}))
    frequencies = inverse_frequencies(config, compressed=True)

    @jax.jit
    def by_the_model(q, sink, ring, position, end, compressed):
        q_THQ = q.reshape(3, config.n_heads, -1)
        q_THQ = rotate(q_THQ * rms_scale(q_THQ, EPS), position, frequencies)
        held, _ = ring_positions(case.ring, end)
        age = position[:, None] - held[None, :]
        segments = [(ring[0], (age >= 0) & (age < case.window) & (held >= 0)[None, :])]
        if isinstance(compressed, Leading):
            segments.append((compressed.rows[0], jnp.arange(12, dtype=jnp.int32)[None, :] < compressed.visible[:, None]))
        if isinstance(compressed, Chosen):
            segments.append((compressed.rows[0][jnp.maximum(compressed.index, 0)], compressed.index >= 0))
        expected, _ = model.attend(q_THQ, segments, sink, case.dim**-0.5)
        return rotate(expected, position, frequencies, inverse=True).reshape(3, -1)

    q, sink, _, _, ring, position, end, compressed = case.operands()
    angle = position.astype(np.float32)[:, None] * frequencies
    out = case.expect(q, sink, np.cos(angle), np.sin(angle), ring, position, end, compressed)
    np.testing.assert_allclose(out, by_the_model(q, sink, ring, position, end, compressed), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["part of the ring", "wrapped", "leading rows", "chosen rows"])
@pytest.mark.long
def test_what_no_row_sees_may_hold_anything(name):
    case = CASES[name]
    *args, compressed = case.operands()
    clean, _ = case.call(*args, compressed)
    position, last = args[5], case.end - 1
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
    assert_bits_equal(case.call(*args, compressed)[0], clean)


def row_of(args: tuple[Any, ...], rows: slice) -> tuple[Any, ...]:
    q, sink, cos, sin, ring, position, end, compressed = args
    if isinstance(compressed, Leading):
        compressed = dataclasses.replace(compressed, visible=compressed.visible[rows])
    if isinstance(compressed, Chosen):
        compressed = dataclasses.replace(compressed, index=compressed.index[rows])
    return q[rows], sink, cos[rows], sin[rows], ring, position[rows], end, compressed


def check_rows(case: Case, counts: tuple[int, ...], *, interpret: bool) -> None:
    args = case.operands(as_trained)

    def parts(rows: slice, end: int) -> list[np.ndarray]:
        own = row_of(args, rows)
        out, quantized = case.call(*own[:6], np.full(1, end, np.int32), own[7], interpret=interpret)
        return [np.asarray(x) for x in (out, quantized.quants, quantized.scales)]

    # A row alone is also the last in the cache, with the rows that follow it not there yet.
    alone = [parts(slice(m, m + 1), case.position[m] + 1) for m in range(8)]
    for count in counts:
        together = parts(slice(0, count), case.end)
        for m in range(count):
            for kind, one, part in zip(("output", "quants", "scales"), alone[m], together, strict=True):
                np.testing.assert_array_equal(
                    part[m : m + 1].view(np.int32), one.view(np.int32), err_msg=f"{kind} of row {m} of {count}, {case}"
                )


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


# Blocks of 64 columns in chunks of 32 and of 128, the last of which ends in columns that turn.
NARROW = {
    "golden model": CASES["golden model"],
    "leading rows": Case((98, 99, 100), 101, leading=(33, 0, 70), stored=70, dim=128, rope=64, heads=2),
    "chosen rows": Case((98, 99, 100), 101, chosen=40, stored=90, dim=256, rope=64, heads=2),
}


@pytest.mark.parametrize(
    "name", ["leading rows", *(pytest.param(name, marks=pytest.mark.long) for name in NARROW if name != "leading rows")]
)
def test_narrow_rows_give_the_same_bits(name):
    check_narrow(NARROW[name], interpret=True)


def test_narrow_rows_have_the_columns_that_turn():
    case = NARROW["leading rows"]
    q, sink, cos, sin, *args = with_narrow_rows(case, case.operands(as_trained))
    with pytest.raises(ValueError, match="32 columns turn; the narrow rows have 64"):
        case.call(q, sink, cos[:, :16], sin[:, :16], *args)


EIGHT = Case((95, 96, 97, 98, 99, 100, 101, 101), 102, leading=(33, 0, 70, 1, 2, 64, 65, 65), stored=70, dim=32, rope=16)
EIGHT_CHOSEN = dataclasses.replace(EIGHT, leading=(), chosen=40)
EARLY = dataclasses.replace(EIGHT, position=(26, 27, 28, 29, 30, 31, 32, 32), end=33, leading=())
EIGHT_CASES = pytest.mark.parametrize("case", [EIGHT, EIGHT_CHOSEN, EARLY], ids=["leading", "chosen", "early"])


@EIGHT_CASES
@pytest.mark.long
def test_each_row_has_the_bits_of_the_row_alone(case):
    check_rows(case, (2, 3, 8), interpret=True)


@pytest.mark.parametrize("m", [1, 3, 8])
@pytest.mark.parametrize("name", FLASH_CASES)
def test_lowers_for_cuda(name, m):
    case = FLASH_CASES[name]
    case = dataclasses.replace(case, position=case.position[:1] * m, leading=case.leading[:1] * m, stored=max(case.stored, 1))
    args = jax.eval_shape(functools.partial(case.operands, normal=jnp.zeros))
    text = lowered_for_cuda(jax.jit(functools.partial(attend, groups=8, **case.options)), *args)
    assert kernel_calls(text, SPLIT_NAME) == 1
    assert kernel_calls(text, COMBINE_NAME) == 1


@pytest.mark.parametrize("name", ["chosen", "leading", "long"])
def test_narrow_rows_lower_for_cuda(name):
    case = FLASH_CASES[name]
    args = jax.eval_shape(lambda: with_narrow_rows(case, case.operands(as_trained, jnp.zeros)))
    text = lowered_for_cuda(jax.jit(functools.partial(attend, groups=8, **case.options)), *args)
    assert kernel_calls(text, SPLIT_NAME) == 1


@BOTH
def test_small_models_lower_for_cuda(name):
    case = CASES[name]
    text = lowered_for_cuda(jax.jit(functools.partial(attend, groups=case.groups, **case.options)), *case.operands())
    assert kernel_calls(text, SPLIT_NAME) == 1


def test_a_head_of_odd_length_is_refused():
    case = Case((3,), 4, dim=48)
    with pytest.raises(ValueError, match="48 columns"):
        case.call(*case.operands())


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
@ON_GPU
def test_equals_the_reference_on_a_gpu(name):
    check(name, interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [{}, {**FLASH, "ring": 136}], ids=["small", "flash"])
@EIGHT_CASES
def test_each_row_has_the_bits_of_the_row_alone_on_a_gpu(case, shape):
    check_rows(dataclasses.replace(case, **shape), (2, 3, 4, 8), interpret=False)

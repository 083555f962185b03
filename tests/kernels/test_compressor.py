"""The compressor of a decode step: rows and rings against their meaning over the whole sequence, bits over the number of rows."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.harness import check_lowers
from numerics import assert_bits_equal

from ds4jax.cache.state import Rows
from pallas_kernels.attention.stored_rows import Stored, narrow_keys, narrow_rows, widen
from pallas_kernels.compressor import decode as compressor
from pallas_kernels.compressor import meaning

EPS = 1e-6
ROPE = 64
State = tuple[jax.Array, jax.Array, Stored]


@dataclasses.dataclass(frozen=True)
class Case:
    """A compressor over a sequence of `tokens`, its cache for calls of at most `most` rows; or over the sequence backwards."""

    ratio: int
    width: int
    finish: str
    tokens: int
    most: int = 8
    rope: int = ROPE
    narrow: bool = False
    backwards: bool = False

    @property
    def overlap(self) -> int:
        return 2 if self.ratio == 4 else 1

    @functools.cached_property
    def inputs(self) -> tuple[np.ndarray, ...]:
        """values, gates, ape, norm."""
        channels = self.overlap * self.width
        normal = functools.partial(np.random.default_rng([self.ratio, self.width]).standard_normal, dtype=np.float32)
        values, gates = normal((self.tokens, channels)), normal((self.tokens, channels))
        if self.backwards:
            values, gates = values[::-1], gates[::-1]
        return values, 2 * gates, normal((self.ratio, channels)), 1 + np.float32(0.2) * normal(self.width)

    def angles(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        frequency = 1 / np.float32(100) ** (np.arange(self.rope // 2, dtype=np.float32) / (self.rope // 2))
        angle = position.astype(np.float32)[:, None] * frequency
        return np.cos(angle), np.sin(angle)

    @functools.cached_property
    def expected(self) -> np.ndarray:
        """Every row of the sequence by the meaning."""
        first = self.ratio * np.arange(self.tokens // self.ratio, dtype=np.int32)
        return np.asarray(_rows(*self.inputs, *self.angles(first), ratio=self.ratio, eps=EPS, finish=self.finish))

    def state(self) -> State:
        """An empty cache, full of what must not be read."""
        ring = np.full((1, self.overlap * self.ratio + self.most, self.overlap * self.width), np.nan, np.float32)
        return ring, ring, self.kept(np.full((1, self.tokens // self.ratio + 2, self.width), np.nan, np.float32))

    def kept(self, rows: Any) -> Stored:
        """Rows in the form that the cache has."""
        if not self.narrow:
            return rows
        return _narrow_rows(rows, self.rope) if self.finish == "fp8" else _narrow_keys(rows)

    def call(self, state: State, start: int, rows: int, live: int, *, interpret: bool = True) -> State:
        """The rows from `start` on, the last of `rows` - `live` of them clones."""
        position = start + np.minimum(np.arange(rows, dtype=np.int32), live - 1)
        values, gates, ape, norm = self.inputs
        alive = (np.arange(rows) < live).astype(np.int32)
        own = (values[position], gates[position], ape, norm, *self.angles(position - (self.ratio - 1)))
        where = np.zeros(rows, np.int32), position, alive, np.full(rows, start, np.int32)
        return _compress(*own, *state, *where, self.ratio, self.finish, None, interpret)

    def run(self, rows: int, live: int, *, interpret: bool = True) -> State:
        """The whole sequence in calls of `rows` of which `live` are."""
        state = self.state()
        for start in range(0, self.tokens, live):
            state = self.call(state, start, rows, min(live, self.tokens - start), interpret=interpret)
        return state


@functools.partial(jax.jit, static_argnums=(13, 14, 15, 16))
def _compress(*args):
    *operands, ratio, finish, per_sequence, interpret = args
    return compressor.compress(*operands, ratio=ratio, eps=EPS, finish=finish, per_sequence=per_sequence, interpret=interpret)


_rows = jax.jit(meaning.rows, static_argnames=("ratio", "eps", "finish"))
_narrow_rows = jax.jit(narrow_rows, static_argnums=1)
_narrow_keys = jax.jit(narrow_keys)
_widen = jax.jit(widen)


def assert_state(case: Case, state: State, tolerance: float, what: str) -> None:
    """Rows within `tolerance` of the meaning's, rings exact: the last tokens, untouched slots still poisoned."""
    values, gates, rows = (np.asarray(array)[0] for array in state)
    count = case.tokens // case.ratio
    error = np.abs(rows[:count] - case.expected)
    assert (error <= tolerance).all(), f"{what}: rows {np.flatnonzero((~(error <= tolerance)).any(axis=1))}, {error.max()}"
    assert np.isnan(rows[count:]).all(), f"{what}: rows behind the last block"
    ring = values.shape[0]
    expected = np.full((2, *values.shape), np.nan, np.float32)
    bias = case.inputs[2]
    for t in range(max(0, case.tokens - ring), case.tokens):
        expected[:, t % ring] = case.inputs[0][t], case.inputs[1][t] + bias[t % case.ratio]
    assert_bits_equal(values, expected[0])
    assert_bits_equal(gates, expected[1])


SMALL = [
    Case(4, 128, "fp8", 26),
    Case(4, 128, "fp4", 26),
    Case(4, 128, "none", 26),
    Case(4, 32, "fp4", 13, rope=16),
    Case(128, 64, "none", 261, rope=32),
]


def in_calls(rows: int, live: int, *marks: pytest.MarkDecorator) -> Any:
    return pytest.param((rows, live), id=f"{live}of{rows}", marks=marks)


OTHERS = [in_calls(*rows, pytest.mark.slow) for rows in ((1, 1), (3, 3), (5, 5), (8, 7))]


@pytest.mark.parametrize("rows", [in_calls(5, 3), *OTHERS])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.ratio}-{case.width}-{case.finish}")
@pytest.mark.long
def test_a_sequence_in_calls_is_the_sequence_at_once(case, rows):
    if case.ratio == 128 and rows[1] < 5:
        case = dataclasses.replace(case, tokens=131)
    assert_state(case, case.run(*rows), 3e-6, f"{case}, {rows}")


@pytest.mark.parametrize("case", SMALL[1:4:2], ids=lambda case: f"{case.width}")
@pytest.mark.long
def test_a_row_has_the_bits_of_the_row_alone(case):
    state = case.run(1, 1)
    for rows, live in ((2, 2), (3, 2), (8, 8)):
        for array, alone in zip(case.run(rows, live), state, strict=True):
            assert_bits_equal(array, alone)


_step = jax.jit(Rows.step, static_argnums=1)


def check_sequences(case: Case, *, interpret: bool) -> None:
    """Two sequences in one cache, the second a step behind; steps of two rows each, of which some are clones."""
    cases = case, dataclasses.replace(case, backwards=True)
    state = jax.tree.map(lambda array: np.concatenate([array, array]), case.state())
    start = np.zeros(2, np.int32)
    while start.min() < case.tokens:
        # Of the second sequence none in the first step, then one, then two.
        count = np.minimum([2, min(start[0] // 2, 2)], case.tokens - start).astype(np.int32)
        rows = _step(start, 2, count)
        sequence, position, live = (np.asarray(array) for array in (rows.sequence, rows.position, rows.live))
        values, gates = (np.stack([cases[s].inputs[i][p] for s, p in zip(sequence, position, strict=True)]) for i in range(2))
        own = values, gates, *case.inputs[2:], *case.angles(position - (case.ratio - 1))
        where = sequence, position, live.astype(np.int32), start[sequence]
        state = _compress(*own, *state, *where, case.ratio, case.finish, 2, interpret)
        start = start + count
    for s, one in enumerate(cases):
        for array, alone in zip(jax.tree.leaves(state), jax.tree.leaves(one.run(1, 1, interpret=interpret)), strict=True):
            assert_bits_equal(array[s], alone[0])


@pytest.mark.parametrize(
    "case", [SMALL[3], pytest.param(dataclasses.replace(SMALL[0], tokens=13, narrow=True), marks=pytest.mark.long)],
    ids=["float32", "narrow"],
)  # fmt: skip
def test_two_sequences_are_each_alone(case):
    check_sequences(case, interpret=True)


@pytest.mark.parametrize("case", SMALL[:2], ids=lambda case: case.finish)
@pytest.mark.long
def test_narrow_rows_hold_the_same_values(case):
    """Codes and exponents as the modules write them, and nothing written behind the last block."""
    case = dataclasses.replace(case, tokens=13)
    wide, narrow = case.run(5, 3), dataclasses.replace(case, narrow=True).run(5, 3)
    for array, expected in zip(narrow[:2], wide[:2], strict=True):
        assert_bits_equal(array, expected)
    expected = dataclasses.replace(case, narrow=True).kept(wide[2])
    for array, leaf in zip(jax.tree.leaves(narrow[2]), jax.tree.leaves(expected), strict=True):
        assert_bits_equal(array, leaf)
    count = case.tokens // case.ratio
    assert_bits_equal(np.asarray(_widen(narrow[2]))[0, :count], np.asarray(wide[2])[0, :count])


def operands(rows: int, case: Case, sequences: int = 1) -> tuple[Any, ...]:
    """Shapes of a call's operands."""
    channels, ring = case.overlap * case.width, case.overlap * case.ratio + 8
    floats = [(rows, channels)] * 2 + [(case.ratio, channels), (case.width,)] + [(rows, case.rope // 2)] * 2
    floats += [(sequences, ring, channels)] * 2
    kept = jax.eval_shape(lambda: case.kept(jnp.zeros((sequences, case.tokens // case.ratio + 8, case.width), jnp.float32)))
    wide = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in floats]
    return *wide, kept, *[jax.ShapeDtypeStruct((rows,), jnp.int32)] * 4


FLASH = [
    Case(4, 512, "fp8", 2112),
    Case(4, 128, "fp4", 2112),
    Case(4, 512, "none", 1 << 20),
    Case(128, 512, "fp8", 2112),
    Case(4, 512, "fp8", 1 << 20, narrow=True),
    Case(4, 128, "fp4", 1 << 20, narrow=True),
]


def named(case: Case) -> str:
    return f"{case.ratio}-{case.width}-{case.finish}{'-narrow' if case.narrow else ''}"


@pytest.mark.long
@pytest.mark.parametrize("rows", [3, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (1, 8))])
@pytest.mark.parametrize("case", FLASH, ids=named)
def test_v4_flash_lowers(case, rows):
    jitted = jax.jit(functools.partial(compressor.compress, ratio=case.ratio, eps=EPS, finish=case.finish))
    check_lowers(jitted, operands(rows, case, rows), {compressor.NAME: 1})


def test_operands_that_do_not_fit():
    def call(case: Case, rows: int = 2) -> None:
        given = operands(rows, case)
        jax.eval_shape(functools.partial(compressor.compress, ratio=case.ratio, eps=EPS, finish=case.finish), *given)

    call(SMALL[0])
    with pytest.raises(ValueError, match="finish is 'fp6'"):
        call(dataclasses.replace(SMALL[0], finish="fp6"))
    with pytest.raises(ValueError, match="power of two"):
        call(dataclasses.replace(SMALL[0], width=192))
    with pytest.raises(ValueError, match="10 rows of blocks of 8 need 17"):
        call(SMALL[0], 10)
    with pytest.raises(ValueError, match="blocks of fp8"):
        call(dataclasses.replace(SMALL[0], rope=32))
    with pytest.raises(ValueError, match="NarrowKeys hold what 'fp4' leaves"):
        call(dataclasses.replace(SMALL[2], narrow=True))
    with pytest.raises(ValueError, match="multiple of 8"):
        call(Case(12, 64, "none", 24))


ON_GPU = [Case(4, 512, "fp8", 45), Case(4, 128, "fp4", 45), Case(4, 512, "none", 45), Case(128, 512, "none", 389)]


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_GPU[:2], ids=lambda case: case.finish)
def test_narrow_rows_hold_the_same_values_on_the_gpu(case):
    wide = case.run(3, 3, interpret=False)
    for rows in (1, 3, 8):
        narrow = dataclasses.replace(case, narrow=True).run(rows, rows, interpret=False)
        expected = dataclasses.replace(case, narrow=True).kept(wide[2])
        for array, leaf in zip(jax.tree.leaves(narrow[2]), jax.tree.leaves(expected), strict=True):
            same = np.asarray(array).view(np.uint8) == np.asarray(leaf).view(np.uint8)
            assert same.all(), f"{case}, {rows} rows a call: {array.dtype} {array.shape} at {np.argwhere(~same)[:4].tolist()}"


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*ON_GPU, dataclasses.replace(ON_GPU[0], narrow=True)], ids=named)
def test_two_sequences_are_each_alone_on_the_gpu(case):
    check_sequences(case, interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_GPU, ids=lambda case: f"{case.ratio}-{case.width}-{case.finish}")
def test_on_the_gpu(case):
    """The compiled kernel against its meaning, and its bits over the number of rows.

    Before a rounding the GPU's last bits differ from the meaning's; a value near the middle of two codes may take the other.
    """
    alone = case.run(1, 1, interpret=False)
    rows = np.asarray(alone[2])[0, : case.tokens // case.ratio]
    error = np.abs(rows - case.expected)
    if case.finish == "none":
        assert (error <= 1e-5).all(), f"{case}: rows {np.flatnonzero((error > 1e-5).any(axis=1))} differ by {error.max()}"
    else:
        wrong = error > np.maximum(1e-5, 1e-5 * np.abs(case.expected))
        assert wrong.mean() <= 1e-3, f"{case}: {wrong.sum()} of {wrong.size} values, rows {np.flatnonzero(wrong.any(axis=1))}"
    for count, live in ((1, 1), (2, 2), (3, 3), (5, 3), (8, 8)):
        for name, array, expected in zip(("values", "gates", "rows"), case.run(count, live, interpret=False), alone, strict=True):
            same = np.asarray(array).view(np.int32) == np.asarray(expected).view(np.int32)
            assert same.all(), f"{case}, {live} live rows of {count}: {name} at {np.flatnonzero((~same[0]).any(axis=1))}"

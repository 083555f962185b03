"""The indexer of a decode step: finished queries, scores and the choice, against plain jnp and over the number of rows."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.harness import Op, check_lowers, check_rows
from numerics import assert_bits_equal

from pallas_kernels.attention.stored_rows import Stored, narrow_keys
from pallas_kernels.core import rotary, rounding
from pallas_kernels.indexer import decode as indexer
from pallas_kernels.indexer import meaning


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of queries against `keys` keys, the last of which are copies of the first."""

    keys: int
    topk: int
    qat: bool
    rows: int = 8
    heads: int = 8
    dim: int = 64
    rope: int = 32

    @functools.cached_property
    def inputs(self) -> tuple[np.ndarray, ...]:
        """q, weights, cos, sin, keys."""
        random = np.random.default_rng([self.keys, self.topk])
        q = random.standard_normal((self.rows, self.heads * self.dim), np.float32)
        weights = random.standard_normal((self.rows, self.heads), np.float32)
        angle = random.uniform(0, 6.3, (self.rows, self.rope // 2)).astype(np.float32)
        keys = random.standard_normal((self.keys, self.dim), np.float32)
        keys = np.array(_hadamard_fp4(keys)) if self.qat else keys
        copies = self.keys // 3
        keys[-copies:] = keys[:copies]
        return q, weights, np.cos(angle), np.sin(angle), keys[None]

    def call(self, visible: list[int], *, interpret: bool = True, first: int = 0) -> np.ndarray:
        """The choice for rows from `first` on, one for each number of visible keys."""
        *rows, keys = self.inputs
        mine = [array[first : first + len(visible)] for array in rows]
        options = {"topk": self.topk, "qat": self.qat, "interpret": interpret}
        return np.asarray(_index(*mine, keys, np.zeros(len(visible), np.int32), np.asarray(visible, np.int32), **options))

    def expected(self, visible: list[int]) -> np.ndarray:
        """The choice by the meaning."""
        score = np.asarray(_scores(*self.inputs, np.zeros(self.rows, np.int32), qat=self.qat))[: len(visible)]
        return np.asarray(_best(score, np.asarray(visible, np.int32), topk=self.topk))


_index = jax.jit(indexer.index, static_argnames=("topk", "qat", "interpret"))


@functools.partial(jax.jit, static_argnames="qat")
def _scores(*operands: Any, qat: bool) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return meaning.decode_scores(*operands, qat=qat)


_best = jax.jit(meaning.select, static_argnames="topk")
_hadamard_fp4 = jax.jit(rounding.hadamard_fp4)
_select = jax.jit(indexer.select, static_argnames=("topk", "keys", "interpret"))
_narrow_keys = jax.jit(narrow_keys)
_finish_queries = jax.jit(indexer.finish_queries, static_argnames=("topk", "qat", "many", "interpret"))
ROUNDED_OR_NOT = pytest.mark.parametrize("qat", [True, pytest.param(False, marks=pytest.mark.long)])


@pytest.mark.parametrize(
    ("case", "visible"),
    [
        (Case(40, 8, True), [0, 1, 7, 8, 9, 17, 39, 40]),
        (Case(100, 16, True), [100, 99, 65, 64, 63, 17, 16, 15]),
        (Case(100, 16, False), [100, 99, 65, 64, 63, 17, 16, 15]),
        (Case(70, 12, False, heads=32, dim=32), [70, 12, 13, 60]),
        (Case(10, 16, True, heads=2), [10, 3, 0]),
    ],
    ids=lambda value: str(value.keys) if isinstance(value, Case) else "",
)
@pytest.mark.long
def test_choice(case, visible):
    np.testing.assert_array_equal(case.call(visible), case.expected(visible))


@pytest.mark.long
def test_equal_keys_keep_the_lower_index():
    """Among copies of one key beside a better and a worse one."""
    case = Case(60, 8, True, rows=1)
    *rows, keys = case.inputs
    zero = np.zeros(1, np.int32)
    score = np.asarray(_scores(*rows, keys, zero, qat=True))[0]
    low, middle, high = (int(np.argsort(score)[i]) for i in (5, 30, 55))
    copies = keys[:, [middle] * 4 + [high, middle, low] + [middle] * 33]
    chosen = _index(*rows, copies, zero, np.full(1, 40, np.int32), topk=8, qat=True, interpret=True)
    np.testing.assert_array_equal(chosen, [[0, 1, 2, 3, 4, 5, 7, 8]])


@pytest.mark.parametrize("qat", [True, False])
@pytest.mark.long
def test_each_row_has_the_bits_of_the_row_alone(qat):
    case = Case(100, 16, qat)
    operands = *case.inputs, np.zeros(8, np.int32), np.array([100, 15, 65, 90, 17, 16, 99, 50], np.int32)
    options, rows = {"topk": case.topk, "qat": case.qat}, (0, 1, 2, 3, 5, 6)
    check_rows(Op("choice", functools.partial(_index, **options), rows=rows), operands, (2, 3, 8))

    def parts(q: np.ndarray, *others: np.ndarray, interpret: bool) -> list[jax.Array]:
        return _queries_and_scores(q.reshape(-1, case.heads, case.dim), *others, **options, interpret=interpret)

    check_rows(Op("queries and scores", parts, rows=rows), operands, (8,))


def _score(
    case: Case, visible: list[int], *, first: int = 0, keys: Stored | None = None, sequence: list[int] | None = None,
    share: int = 1, interpret: bool = True,
) -> list[jax.Array]:  # fmt: skip
    """Finished queries as bits, and scores with 0 where there are none, of the case's keys or others, all of one sequence.

    `share` rows are in one program.
    """
    q, *rows = (array[first : first + len(visible)] for array in case.inputs[:4])
    q, keys = q.reshape(len(visible), case.heads, case.dim), case.inputs[4] if keys is None else keys
    options = {"topk": case.topk, "qat": case.qat, "share": share, "interpret": interpret}
    sequence = sequence or [0] * len(visible)
    return _queries_and_scores(q, *rows, keys, np.asarray(sequence, np.int32), np.asarray(visible, np.int32), **options)


@functools.partial(jax.jit, static_argnames=("topk", "qat", "share", "interpret"))
def _queries_and_scores(q, weights, cos, sin, keys, sequence, visible, *, topk, qat, interpret, share=1):
    queries = indexer.finish_queries(q, cos, sin, visible, topk=topk, qat=qat, interpret=interpret)
    score = indexer.scores(queries, weights, keys, sequence, visible, topk=topk, rows=share, interpret=interpret)
    some = (visible > topk)[:, None]
    bits = jnp.where(some[..., None, None], jax.lax.bitcast_convert_type(queries, jnp.uint16), jnp.uint16(0))
    block = jnp.arange(score.shape[1], dtype=jnp.int32)
    return [bits, jnp.where(some & (block < visible[:, None]), score, 0.0)]


@ROUNDED_OR_NOT
def test_scores(qat):
    case = Case(100, 16, qat)
    _, score = _score(case, [100] * 8)
    expected = _scores(*case.inputs, np.zeros(8, np.int32), qat=qat)
    np.testing.assert_allclose(np.asarray(score)[:, :100], expected, rtol=0, atol=1e-6)


def check_sequences(case: Case, keys: Stored, *, interpret: bool) -> None:
    """Three rows of two sequences: scores as alone with their own sequence's keys, NaN in the other ones or not."""
    sequence, visible = [1, 0, 1], [case.keys, case.topk + 8, case.topk + 1]
    _, score = _score(case, visible, keys=keys, sequence=sequence, interpret=interpret)
    for m, s in enumerate(sequence):
        own = jax.tree.map(lambda array, s=s: array[s : s + 1], keys)
        _, alone = _score(case, visible[m : m + 1], first=m, keys=own, interpret=interpret)
        assert_bits_equal(score[m : m + 1], alone)


def two_sequences(case: Case) -> np.ndarray:
    """Keys [2, S, Di]; the first sequence's are the second's backwards, with a NaN that its one row does not see."""
    keys = case.inputs[4]
    other = keys[:, ::-1].copy()
    other[0, -1] = np.nan
    return np.concatenate([other, keys])


@pytest.mark.parametrize("narrow", [False, pytest.param(True, marks=pytest.mark.long)])
def test_rows_that_share_a_program_have_the_bits_of_each_alone(narrow):
    """Among them one that sees few keys, whose scores nothing reads."""
    case = Case(100, 16, True)
    visible = [100, 15, 65, 64, 17, 16, 99, 50]
    keys = _narrow_keys(case.inputs[4]) if narrow else case.inputs[4]
    alone, shared = (_score(case, visible, keys=keys, share=share)[1] for share in (1, 4))
    assert np.any(np.asarray(alone))
    assert_bits_equal(shared, alone)


def test_rows_of_two_sequences_are_those_of_each_alone():
    case = Case(70, 12, True, dim=32, rows=3)
    keys = two_sequences(case)
    check_sequences(case, keys, interpret=True)
    sequence, visible = np.array([1, 0, 1], np.int32), np.array([70, 20, 13], np.int32)
    chosen = _index(*case.inputs[:4], keys, sequence, visible, topk=12, qat=True, interpret=True)
    score = _scores(*case.inputs[:4], keys, sequence, qat=True)
    np.testing.assert_array_equal(chosen, _best(score, visible, topk=12))


def check_narrow(case: Case, *, interpret: bool) -> None:
    """Scores of narrow keys have the bits of the float32 keys' scores, those of a NaN included."""
    keys = case.inputs[4].copy()
    keys[0, 3] = np.nan
    both = (_score(case, [case.keys] * case.rows, keys=some, interpret=interpret)[1] for some in (keys, _narrow_keys(keys)))
    wide, narrow = (np.asarray(score)[:, : case.keys] for score in both)
    if interpret:
        # A GPU's relu makes a zero of it.
        assert np.isnan(wide[:, 3]).all()
    same = (wide.view(np.int32) == narrow.view(np.int32)) | (np.isnan(wide) & np.isnan(narrow))
    assert same.all(), f"{case}: scores of rows and keys {np.argwhere(~same)[:5].tolist()}"


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(100, 16, True), marks=pytest.mark.long, id="64 values"),
        pytest.param(Case(70, 12, True, dim=32, rows=2), marks=pytest.mark.long, id="32 values"),
    ],
)
def test_narrow_keys_have_the_same_scores(case):
    check_narrow(case, interpret=True)


@pytest.mark.parametrize("many", [False, True])
def test_finished_queries(many):
    """Also on the tensor cores, where a query is the sum of three bfloat16 numbers."""
    case = Case(100, 16, True, heads=16)
    q, _, cos, sin, _ = case.inputs
    operands = q.reshape(8, case.heads, case.dim), cos, sin, np.full(8, 100, np.int32)
    made = _finish_queries(*operands, topk=16, qat=True, many=many, interpret=True)

    @jax.jit
    def by_the_model(q, cos, sin):
        rotated = rotary.rotate(q.reshape(8, case.heads, case.dim), cos, sin)
        return rounding.hadamard_fp4(rotated, precision="highest")

    assert_bits_equal(np.asarray(made)[:, 0].astype(np.float32), by_the_model(q, cos, sin))


SCORES = {
    "normal": lambda random, shape: random.normal(size=shape),
    "negative": lambda random, shape: -np.abs(random.normal(size=shape)),
    "many equal": lambda random, shape: random.integers(-3, 3, shape),
    "all equal": lambda random, shape: np.ones(shape),
    "both zeros": lambda random, shape: random.choice([0.0, -0.0, -1.0], shape),
    "far apart": lambda random, shape: random.choice([-1.0, 1.0], shape) * 2.0 ** random.integers(-140, 120, shape),
    "infinite": lambda random, shape: random.choice([-np.inf, 1.0, np.inf], shape),
}


@pytest.mark.parametrize("chunk", [pytest.param(128, marks=pytest.mark.slow), 32], ids=lambda chunk: f"chunks of {chunk}")
@pytest.mark.parametrize("name", SCORES)
@pytest.mark.long
def test_select(name, chunk, monkeypatch):
    """Of 77 scores, at once and in three chunks: the tie is kept over the chunks."""
    monkeypatch.setattr(indexer, "_chunk", lambda keys, topk: chunk)
    score = SCORES[name](np.random.default_rng(1), (8, 77)).astype(np.float32)
    visible = np.asarray([77, 76, 64, 42, 33, 11, 10, 4], np.int32)
    chosen = indexer.select(jnp.asarray(score), jnp.asarray(visible), topk=10, keys=77, interpret=True)
    np.testing.assert_array_equal(chosen, by_definition(score, visible, 10))


def by_definition(score: np.ndarray, visible: np.ndarray, topk: int) -> np.ndarray:
    """The best `topk`, -inf one of the numbers, by a stable sort."""
    chosen = np.full((len(score), topk), -1, np.int32)
    for row, count, out in zip(score, visible, chosen, strict=True):
        best = np.sort(np.argsort(-row[:count], kind="stable")[:topk])
        out[: len(best)] = best
    return chosen


def with_narrow_keys(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Shapes of the same operands, keys narrow."""
    return *given[:4], jax.eval_shape(narrow_keys, given[4]), *given[5:]


def operands(rows: int, keys: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes of V4-Flash's operands, as many sequences as rows."""
    shapes = (rows, 64 * 128), (rows, 64), (rows, 32), (rows, 32), (rows, keys, 128)
    return (*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes), *[jax.ShapeDtypeStruct((rows,), jnp.int32)] * 2)


@pytest.mark.long
@pytest.mark.parametrize("qat", [True, False])
@pytest.mark.parametrize("rows", [3, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (1, 8))])
@pytest.mark.parametrize("keys", [2112 // 4 + 8, 16384, 262144 + 8])
def test_v4_flash_lowers(keys, rows, qat):
    jitted = jax.jit(functools.partial(indexer.index, topk=512, qat=qat))
    check_lowers(jitted, operands(rows, keys), dict(zip(indexer.NAMES, [1, 1, int(keys > 2048), 1], strict=True)))


@pytest.mark.long
def test_a_chunk_of_a_prompt_lowers():
    *rows, keys, sequence, visible = operands(512, 16384)
    given = *rows, jax.ShapeDtypeStruct((1, *keys.shape[1:]), keys.dtype), sequence, visible
    check_lowers(functools.partial(indexer.index, topk=512, qat=True, one_sequence=True), given, dict.fromkeys(indexer.NAMES, 1))


@pytest.mark.long
@pytest.mark.parametrize("rows", [1, 8])
def test_narrow_keys_lower(rows):
    given = with_narrow_keys(operands(rows, 262144 + 8))
    check_lowers(functools.partial(indexer.index, topk=512, qat=True), given, dict.fromkeys(indexer.NAMES, 1))
    with pytest.raises(ValueError, match="the keys are narrow, but qat is off"):
        jax.eval_shape(functools.partial(indexer.index, topk=512, qat=False), *given)


@ROUNDED_OR_NOT
def test_few_heads_lower(qat):
    """Fewer than a tensor core's tile has."""
    case = Case(40, 8, qat)
    given = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in case.inputs]
    given += [jax.ShapeDtypeStruct((8,), jnp.int32)] * 2
    check_lowers(functools.partial(indexer.index, topk=8, qat=qat), tuple(given), {"index_scores": 1})


def test_operands_that_do_not_fit():
    def call(shapes: tuple[jax.ShapeDtypeStruct, ...]) -> None:
        jax.eval_shape(functools.partial(indexer.index, topk=512, qat=True), *shapes)

    six = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 6 * 128), (2, 6)))
    call(operands(2, 600))
    with pytest.raises(ValueError, match="need \\[2, 8192\\]"):
        call((jax.ShapeDtypeStruct((2, 4096), jnp.float32), *operands(2, 600)[1:]))
    with pytest.raises(ValueError, match="powers of two"):
        call((*six, *operands(2, 600)[2:]))
    with pytest.raises(ValueError, match="at most 32 chunks"):
        call(operands(2, 600_000))


@pytest.mark.gpu
@pytest.mark.parametrize("qat", [True, False])
@pytest.mark.parametrize("keys", [536, 5000, 40_000])
def test_on_the_gpu(keys, qat):
    """V4-Flash's shape: finished queries, scores, the choice from equal scores, and bits over the number of rows."""
    case = Case(keys, 512, qat, heads=64, dim=128, rope=64)
    visible = [keys, keys - 1, keys // 2, 513, 512, 100, 0, keys * 3 // 4]
    bits, score = _score(case, [keys] * 8, interpret=False)
    if qat:
        q, _, cos, sin, _ = case.inputs
        expected = rounding.hadamard_fp4(rotary.rotate(q.reshape(8, 64, 128), cos, sin), precision="highest")
        wrong = jax.lax.bitcast_convert_type(bits, jnp.bfloat16)[:, 0].astype(jnp.float32) != expected
        assert wrong.mean() <= 1e-4, f"{keys} keys: {wrong.sum()} values of the queries, rows {np.flatnonzero(wrong.any((1, 2)))}"
    finished = jnp.sum(jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32), axis=1)
    products = jnp.einsum("mhd,sd->mhs", finished, case.inputs[4][0], precision=jax.lax.Precision.HIGHEST)
    exact = jnp.einsum("mhs,mh->ms", jax.nn.relu(products), case.inputs[1], precision=jax.lax.Precision.HIGHEST)
    error = np.abs(np.asarray(score)[:, :keys] - np.asarray(exact) * np.float32(128**-0.5 * 64**-0.5))
    assert error.max() <= 1e-5, f"{keys} keys: scores differ by {error.max()}, rows {np.flatnonzero((error > 1e-5).any(axis=1))}"
    count = jnp.asarray(visible, jnp.int32)
    chosen = case.call(visible, interpret=False)
    expected = np.asarray(meaning.select(score[:, :keys], count, topk=512))
    wrong = np.flatnonzero((chosen != expected).any(axis=1))
    assert not wrong.size, f"{keys} keys: choice of rows {wrong} with {np.asarray(visible)[wrong]} visible keys"
    _, shown = _score(case, visible, interpret=False)
    alone = [np.asarray(_score(case, visible[m : m + 1], first=m, interpret=False)[1]) for m in range(8)]
    for rows in (1, 2, 3, 8):
        some = case.call(visible[:rows], interpret=False)
        assert (some == chosen[:rows]).all(), (
            f"{keys} keys: choice of {rows} rows, {np.flatnonzero((some != chosen[:rows]).any(1))}"
        )
    for m in range(8):
        assert_bits_equal(np.asarray(shown)[m : m + 1], alone[m])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["float32", "narrow"])
def test_rows_of_two_sequences_are_those_of_each_alone_on_the_gpu(kind):
    case = Case(5000, 512, True, heads=64, dim=128, rope=64)
    keys = two_sequences(case)
    check_sequences(case, _narrow_keys(keys) if kind == "narrow" else keys, interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [600, 20_000])
def test_narrow_keys_have_the_same_scores_on_the_gpu(keys):
    check_narrow(Case(keys, 512, True, heads=64, dim=128, rope=64), interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [700, 16384, 30_000])
@pytest.mark.parametrize("name", SCORES)
def test_select_on_the_gpu(name, keys):
    """Ties, signs and extremes at V4-Flash's k."""
    score = SCORES[name](np.random.default_rng(keys), (3, keys)).astype(np.float32)
    visible = np.asarray([keys, keys - 100, 513], np.int32)
    chosen = np.asarray(_select(score, visible, topk=512, keys=keys))
    expected = by_definition(score, visible, 512)
    wrong = np.flatnonzero((chosen != expected).any(axis=1))
    assert not wrong.size, f"{name}, {keys} scores: rows {wrong}, {chosen[wrong]} in place of {expected[wrong]}"

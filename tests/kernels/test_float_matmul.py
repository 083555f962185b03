"""Float weights for few rows, the router's choice and the shared expert's SwiGLU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.harness import Op, check_lowers, check_meaning, check_rows
from numerics import assert_bits_equal

from pallas_kernels.experts import meaning, router, swiglu
from pallas_kernels.formats import Q2_K, Q4_K
from pallas_kernels.linear import activation, activation_k
from pallas_kernels.linear import float_matmul as float_matmul_module
from pallas_kernels.linear.activation_k import quantize_k
from pallas_kernels.linear.float_matmul import float_matmul
from pallas_kernels.linear.matrices import NAME

DTYPES = ("float16", "bfloat16", "float32")
SHAPES = [((5,), 64), ((10, 7, 64), 576), ((33,), 2304)]
# float16 has a kernel of its own, the others share one; the middle shape has several weights and an odd one.
MARKS = {
    (0, "float32"): (),
    (1, "float16"): pytest.mark.long,
    (1, "bfloat16"): pytest.mark.long,
    (2, "float32"): pytest.mark.long,
}
# What one layer asks for together: rows of each weight, and K.
FLASH = {
    "ratio 4": ((1024, 1024, 256, 256, 64), 4096),
    "ratio 128": ((512, 512), 4096),
    "router": ((256,), 4096),
    "indexer q_b": ((8192,), 1024),
}


def data(rows: int, sizes: tuple[int, ...], k: int, dtype: str) -> tuple[jax.Array, list[jax.Array]]:
    keys = jax.random.split(jax.random.key(0), len(sizes) + 1)
    return jax.random.normal(keys[0], (rows, k)), [
        jax.random.normal(key, (n, k)).astype(dtype) for key, n in zip(keys[1:], sizes, strict=True)
    ]


def check(sizes: tuple[int, ...], k: int, dtype: str, *, interpret: bool) -> None:
    # A jitted function of its own: a test replaces what is read while tracing.
    jitted = jax.jit(functools.partial(float_matmul, interpret=interpret))

    def exact(x: jax.Array, weights: list[jax.Array]) -> list[np.ndarray]:
        return [np.asarray(x, np.float64) @ np.asarray(w.astype(jnp.float32), np.float64).T for w in weights]

    op = Op("product", lambda x, weights, interpret: jitted(x, weights), exact, (0,), 1e-6 * k**0.5, whole=True)
    operands = data(8, sizes, k, dtype)
    for rows in (1, 3, 8):
        check_meaning(op, op.some(operands, slice(rows)), interpret=interpret)
    check_rows(op, operands, (1, 3, 8), interpret=interpret)


@pytest.mark.parametrize(
    ("sizes", "k", "dtype"),
    [
        pytest.param(*shape, dtype, marks=MARKS.get((SHAPES.index(shape), dtype), pytest.mark.slow))
        for shape in SHAPES
        for dtype in DTYPES
    ],
)
def test_products_and_rows(sizes, k, dtype, monkeypatch):
    # A CPU's compiler contracts products and sums in a loop otherwise than in straight code, so that here the cut has to be the
    # same for every number of rows. A GPU has pinned instructions, and its test takes the cuts as they are.
    monkeypatch.setattr(float_matmul_module, "cut", lambda rows, heights, chunks: (2, min(chunks, 4), rows))
    check(sizes, k, dtype, interpret=True)


def test_groups_of_rows_with_a_rest(monkeypatch):
    monkeypatch.setattr(float_matmul_module, "cut", lambda rows, heights, chunks: (2, 1, 2))
    x, weights = data(3, (10, 7), 64, "bfloat16")
    for made, weight in zip(float_matmul(x, weights, interpret=True), weights, strict=True):
        exact = np.asarray(x, np.float64) @ np.asarray(weight.astype(jnp.float32), np.float64).T
        np.testing.assert_allclose(made, exact, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", FLASH)
def test_on_the_gpu(name, dtype):
    check(*FLASH[name], dtype, interpret=False)


@pytest.mark.long
@pytest.mark.parametrize("rows", [4, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (1, 8))])
@pytest.mark.parametrize("name", FLASH)
def test_v4_flash_lowers(name, rows):
    sizes, k = FLASH[name]
    x = jax.ShapeDtypeStruct((rows, k), jnp.float32)
    weights = [jax.ShapeDtypeStruct((n, k), jnp.float16) for n in sizes]
    check_lowers(jax.jit(float_matmul), (x, weights), {NAME: 1})


def test_the_routers_choice_by_score():
    logits, bias = 3 * jax.random.normal(jax.random.key(0), (4, 20)), jax.random.normal(jax.random.key(1), (20,))
    # Equal scores: the lower number is taken first.
    logits, bias = logits.at[3].set(0.5), bias.at[7].set(bias[11])
    chosen, share = router.route(logits, active=3, scale=1.5, bias=bias, interpret=True)
    wanted, best = meaning.choose(meaning.scores(logits), bias, active=3)
    np.testing.assert_array_equal(chosen, wanted)
    np.testing.assert_allclose(share, meaning.weigh(best, 1.5), rtol=1e-6)


def check_choice(rows: int, experts: int, active: int, *, interpret: bool) -> None:
    """Experts and their scores are those of a sort, bit by bit, and of equal scores the lower number."""
    random = np.random.default_rng(rows)
    # A few values many times, so that scores are equal.
    scores, bias = (random.integers(1, 40, size).astype(np.float32) / 7 for size in ((rows, experts), experts))
    made = jax.jit(functools.partial(router.choose, active=active, interpret=interpret))(scores, bias)
    wanted = jax.jit(functools.partial(meaning.choose, active=active))(scores, bias)
    jax.tree.map(assert_bits_equal, made, wanted)


@pytest.mark.parametrize(("experts", "active"), [(20, 3), (256, 6)])
def test_a_prompts_choice_is_that_of_a_sort(experts, active):
    check_choice(9, experts, active, interpret=True)


@pytest.mark.gpu
def test_a_prompts_choice_is_that_of_a_sort_on_a_gpu():
    check_choice(4096, 256, 6, interpret=False)


def test_the_routers_choice_by_table():
    logits = 3 * jax.random.normal(jax.random.key(0), (3, 20))
    table = jnp.asarray(np.random.default_rng(0).integers(0, 20, (9, 3)), jnp.int32)
    ids = jnp.array([1, 8, 4], jnp.int32)
    chosen, share = router.route(logits, active=3, scale=1.5, ids=ids, table=table, interpret=True)
    np.testing.assert_array_equal(chosen, table[ids])
    np.testing.assert_allclose(share, meaning.weigh(meaning.scores_of(meaning.scores(logits), chosen), 1.5), rtol=1e-6)


def test_swiglu_is_clamped_and_quantised():
    gate, up = (8 * jax.random.normal(jax.random.key(seed), (3, 96)) for seed in (0, 1))
    found = swiglu.swiglu(gate, up, limit=10.0, interpret=True)
    wanted = activation.quantize(meaning.swiglu(gate, up, 10.0), interpret=True)
    np.testing.assert_allclose(found.scales, wanted.scales, rtol=1e-6)
    bytes_of = [np.asarray(a.quants).view(np.int8).astype(np.int32) for a in (found, wanted)]
    assert np.abs(bytes_of[0] - bytes_of[1]).max() <= 1


@pytest.mark.long
def test_swiglu_in_blocks_of_256():
    """Alone and beside the routed experts' values, for a down matrix of such a format."""
    gate, up, hidden = (8 * jax.random.normal(jax.random.key(seed), (1, 256)) for seed in range(3))
    alone = swiglu.swiglu(gate, up, Q4_K, limit=10.0, interpret=True)
    shared, routed = swiglu.swiglu_beside(gate, up, hidden, Q2_K, Q4_K, limit=10.0, interpret=True)
    expected = alone, quantize_k(hidden, Q2_K, interpret=True)
    for found, wanted in zip(jax.tree.leaves((shared, routed)), jax.tree.leaves(expected), strict=True):
        assert_bits_equal(found, wanted)
    quants, scales = activation_k.plain(alone, Q4_K)
    wanted_quants, wanted_scales = activation_k.plain(quantize_k(meaning.swiglu(gate, up, 10.0), Q4_K, interpret=True), Q4_K)
    np.testing.assert_allclose(scales, wanted_scales, rtol=1e-6)
    assert np.abs(quants.astype(np.int32) - wanted_quants).max() <= 1


@pytest.mark.gpu
def test_small_kernels_on_the_gpu():
    logits, bias = 3 * jax.random.normal(jax.random.key(0), (8, 256)), jax.random.normal(jax.random.key(1), (256,))
    chosen, share = router.route(logits, active=6, scale=1.5, bias=bias)
    wanted, weights = router.route(logits, active=6, scale=1.5, bias=bias, interpret=True)
    np.testing.assert_array_equal(chosen, wanted)
    np.testing.assert_allclose(share, weights, rtol=1e-5)
    gate, up = (8 * jax.random.normal(jax.random.key(seed), (8, 2048)) for seed in (0, 1))
    together = swiglu.swiglu(gate, up, limit=10.0)
    for m in range(8):
        alone = swiglu.swiglu(gate[m : m + 1], up[m : m + 1], limit=10.0)
        assert_bits_equal(together.scales[m], alone.scales[0])
        np.testing.assert_array_equal(together.quants[m], alone.quants[0])


@pytest.mark.long
def test_small_kernels_lower():
    def shape(*sizes: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    route = jax.jit(functools.partial(router.route, active=6, scale=1.5))
    check_lowers(route, (shape(4, 256),), {router.NAME: 1}, bias=shape(256))
    table = {"ids": shape(4, dtype="int32"), "table": shape(129280, 6, dtype="int32")}
    check_lowers(route, (shape(4, 256),), {router.NAME: 1}, **table)
    choose = jax.jit(functools.partial(router.choose, active=6))
    check_lowers(choose, (shape(4096, 256), shape(256)), {router.CHOICE: 1})
    call = jax.jit(functools.partial(swiglu.swiglu, limit=10.0))
    check_lowers(call, (shape(4, 2048), shape(4, 2048)), {swiglu.NAME: 1})

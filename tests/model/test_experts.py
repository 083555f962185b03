"""Experts of every format: quantised products, strict ones, and rows that do not depend on each other."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from cuda import kernel_calls, lowered_for_cuda
from flax import nnx
from numerics import assert_bits_equal
from quantized import as_float, random_blocks

from ds4jax.config import Config
from ds4jax.model.moe import Experts, MoE
from pallas_kernels.core.limits import MAX_ROWS
from pallas_kernels.experts import router
from pallas_kernels.formats import FORMATS, Q8_0

CONFIG = Config(dim=512, moe_dim=256, n_experts=4, n_active=2, n_layers=1, compress_ratios=(0,), n_mtp=0, n_hash_layers=0)
# Types of gate and up, and of down: published files, mixed files, the official checkpoint, a small model, types without a kernel;
# or of gate, of up and of down.
KINDS = [
    ("IQ2_XXS", "Q2_K"),
    ("Q4_K", "Q4_K"),
    ("MXFP4", "MXFP4"),
    ("Q8_0", "Q8_0"),
    ("Q2_K", "IQ2_XXS"),
    ("IQ3_S", "IQ4_NL"),
    ("IQ2_XXS", "Q4_K", "Q2_K"),
]
Kind = tuple[str, ...]
ROWS = 6

EVERY = [*(pytest.param(kind, marks=pytest.mark.long) for kind in KINDS[:-1]), KINDS[-1]]
every_kind = pytest.mark.parametrize("kind", EVERY, ids="-".join)
# Products of every format have a test of their own for the same; here it is the experts around them.
SOME = [pytest.param(kind, marks={0: [], 6: pytest.mark.long}.get(i, pytest.mark.slow)) for i, kind in enumerate(KINDS)]
some_kinds = pytest.mark.parametrize("kind", SOME, ids="-".join)


@functools.cache
def experts(kind: Kind) -> tuple[nnx.GraphDef, nnx.State]:
    """Experts with random blocks, scaled so that the hidden values are of order 1 and some are clamped."""
    module = nnx.eval_shape(lambda: Experts(CONFIG, rngs=nnx.Rngs(0)))
    for seed, (stack, name) in enumerate(((module.w1, kind[0]), (module.w3, kind[-2]), (module.w2, kind[-1]))):
        shape = stack.weight.get_value().shape
        format = FORMATS[name]
        if format is Q8_0:
            weight = Q8_0.quantize(np.random.default_rng(seed).standard_normal(shape) * 0.1)
        else:
            weight = format.from_bytes(random_blocks(format, shape, seed, least=-4, most=-2))
        stack.weight.set_value(weight)
    return nnx.split(module)


def rows(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Activations [T, D], chosen experts and their weights [T, K]."""
    random = np.random.default_rng(seed)
    chosen = np.stack([random.permutation(CONFIG.n_experts)[: CONFIG.n_active] for _ in range(ROWS)]).astype(np.int32)
    x = random.standard_normal((ROWS, CONFIG.dim), np.float32)
    return x, chosen, random.uniform(0.2, 1, chosen.shape).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("graph", "strict", "decoding"))
def run(graph: nnx.GraphDef, weights: nnx.State, *args: np.ndarray, strict: bool, decoding: bool = True) -> jax.Array:
    return nnx.merge(graph, weights)(*args, strict=strict, decoding=decoding)


def exact(kind: Kind, x: np.ndarray, chosen: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Expected outputs in float64 from dequantised weights."""
    module = nnx.merge(*experts(kind))
    w1, w2, w3 = (np.asarray(as_float(s.weight.get_value()), np.float64) for s in (module.w1, module.w2, module.w3))
    y = np.zeros((ROWS, CONFIG.dim))
    for row, (row_x, ids, weights) in enumerate(zip(x.astype(np.float64), chosen, share, strict=True)):
        for expert, weight in zip(ids, weights, strict=True):
            gate, up = np.minimum(w1[expert] @ row_x, 10), np.clip(w3[expert] @ row_x, -10, 10)
            y[row] += w2[expert] @ (gate / (1 + np.exp(-gate)) * up * weight)
    return y


def distance(actual: jax.Array, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(actual) - expected) / np.linalg.norm(expected))


@every_kind
def test_strict_is_the_float_product(kind: Kind) -> None:
    args = rows()
    assert distance(run(*experts(kind), *args, strict=True), exact(kind, *args)) < 1e-6


@every_kind
def test_quantised_activations_cost_a_few_percent(kind: Kind) -> None:
    args = rows()
    off = distance(run(*experts(kind), *args, strict=False), exact(kind, *args))
    assert off < 0.04
    assert off > 1e-4 or kind[0] == "Q8_0", "activations were not quantised"


@some_kinds
@pytest.mark.parametrize("strict", [True, False])
def test_each_row_has_the_bits_of_the_row_alone(kind: Kind, strict: bool) -> None:
    """Contract 1."""
    args = rows()
    alone = [np.asarray(run(*experts(kind), *(a[i : i + 1] for a in args), strict=strict)) for i in range(ROWS)]
    for count in (2, 3, ROWS):
        assert_bits_equal(run(*experts(kind), *(a[:count] for a in args), strict=strict), np.concatenate(alone[:count]))


def repeated(args: tuple[np.ndarray, ...]) -> list[np.ndarray]:
    """More rows than a decode step of one sequence has."""
    return [np.concatenate([a] * (2 * MAX_ROWS // ROWS + 1)) for a in args]


@every_kind
def test_a_chunk_of_a_prompt_reads_every_expert_once(kind: Kind) -> None:
    """Prefill: float products, whether strict or not."""
    args = rows()
    y = np.asarray(run(*experts(kind), *repeated(args), strict=False, decoding=False))
    assert distance(y[:ROWS], exact(kind, *args)) < 1e-6
    assert_bits_equal(run(*experts(kind), *repeated(args), strict=True, decoding=False), y)


@some_kinds
def test_many_rows_of_a_decode_step_have_the_bits_of_few(kind: Kind) -> None:
    args = rows()
    y = np.asarray(run(*experts(kind), *repeated(args), strict=False))
    assert_bits_equal(y[:ROWS], run(*experts(kind), *args, strict=False))
    assert_bits_equal(y[ROWS:], np.concatenate([y[:ROWS]] * (2 * MAX_ROWS // ROWS)))


def test_the_router_weight_is_applied_before_the_hidden_values_are_quantised() -> None:
    """Twice the weight gives exactly twice the output: a power of two does not change Q8_K's rounding."""
    x, chosen, share = rows()
    graph, weights = experts(KINDS[0])
    once, twice = (np.asarray(run(graph, weights, x, chosen, share * factor, strict=False)) for factor in np.float32([1, 2]))
    assert_bits_equal(twice, once * np.float32(2))


@pytest.mark.long
def test_rows_without_a_kernel_share_their_memory() -> None:
    graph, weights = experts(("IQ3_S", "IQ4_NL"))
    few, many = (
        run.lower(graph, weights, *(a[:count] for a in rows()), strict=False).compile().memory_analysis().temp_size_in_bytes
        for count in (1, ROWS)
    )
    assert 1 << 20 < many < 1.5 * few


@pytest.mark.parametrize(
    ("kind", "strict", "hashed", "calls"),
    [("MXFP4", False, False, 1), ("MXFP4", True, False, 0), ("MXFP4", False, True, 0), (None, False, False, 0)],
)
def test_a_kernel_chooses_a_prompts_experts_where_kernels_run_them(
    kind: str | None, strict: bool, hashed: bool, calls: int
) -> None:
    """Not those of float weights, whose choice has gradients."""
    module = nnx.eval_shape(lambda: MoE(CONFIG, hashed, rngs=nnx.Rngs(0)))
    for stack in (module.experts.w1, module.experts.w2, module.experts.w3) if kind else ():
        shape = stack.weight.get_value().shape
        stack.weight.set_value(jax.eval_shape(FORMATS["MXFP4"].from_bytes, random_blocks(FORMATS["MXFP4"], shape)))
    x, ids = jax.ShapeDtypeStruct((64, CONFIG.dim), "float32"), jax.ShapeDtypeStruct((64,), "int32")
    graph, weights = nnx.split(module)
    text = lowered_for_cuda(jax.jit(lambda weights, x, ids: nnx.merge(graph, weights)(x, ids, strict=strict)), weights, x, ids)
    assert kernel_calls(text, router.CHOICE) == calls

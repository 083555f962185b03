"""The expert kernels: their arithmetic against its meaning, the bits of a row in other company, and lowering at full size."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import kernel_calls, lowered_for_cuda
from kernels.harness import Op, check_meaning, check_poisoned_row, check_rows
from numerics import assert_bits_equal
from quantized import abstract_experts, random_blocks

from pallas_kernels.core.launch import launch
from pallas_kernels.experts import many_rows, meaning
from pallas_kernels.experts.decode import DOWN, ExpertTile, experts, gate_up, gate_up_part
from pallas_kernels.experts.many_rows import GATE_UP
from pallas_kernels.formats import IQ2_S, IQ2_XXS, IQ3_XXS, MXFP4, Q2_K, Q4_K, Q5_K, Q6_K, Q8_0, Quantized
from pallas_kernels.linear import activation_k
from pallas_kernels.linear import meaning as linear

LIMIT = 10.0
PAIRS = [
    (IQ2_XXS, Q2_K),
    (IQ2_S, IQ3_XXS),
    (IQ2_S, MXFP4),
    (IQ3_XXS, IQ2_S),
    (Q4_K, Q4_K),
    (Q5_K, Q6_K),
    (Q6_K, Q5_K),
    (MXFP4, MXFP4),
    (Q8_0, Q8_0),
]
IDS = [f"{gate.__name__}-{down.__name__}" for gate, down in PAIRS]


expected = functools.partial(meaning.gathered, limit=LIMIT)


@functools.cache
def case(gate: type[Quantized], down: type[Quantized], dim: int = 512, hidden: int = 256) -> tuple:
    """Eight rows with two of five experts each; some rows share experts."""
    rng = np.random.default_rng(0)
    stacks = [gate.from_bytes(random_blocks(gate, (5, hidden, dim), seed)) for seed in (1, 2)]
    stacks.append(down.from_bytes(random_blocks(down, (5, dim, hidden), 3)))
    # Scales of random bits are large; rows this small keep gate and up within their limits for most of the hidden values.
    x = jnp.asarray(rng.standard_normal((8, dim)) * 1e-3, jnp.float32)
    chosen = jnp.asarray([rng.permutation(5)[:2] for _ in range(8)], jnp.int32)
    return x, chosen, jnp.asarray(rng.uniform(0.2, 1.0, (8, 2)), jnp.float32), *stacks


@functools.cache
def program(tile: ExpertTile | None, interpret: bool) -> Any:
    return jax.jit(functools.partial(experts, limit=LIMIT, tile=tile, interpret=interpret))


def call(*operands: Any, tile: ExpertTile | None = None, interpret: bool) -> jax.Array:
    return program(tile, interpret)(*operands)


# Integers are the same; what differs is the order of a few hundred float32 sums.
OP = Op("experts", call, expected, rows=(0, 1, 2), tolerance=1e-5, whole=True)


SMALL, LARGE = ExpertTile(1, 1, 0), ExpertTile(4, 2, 2)
# The formats of the published files; the others take the same steps.
PUBLISHED = [((IQ2_XXS, Q2_K), SMALL), ((MXFP4, MXFP4), LARGE)]


def _marks(pair: tuple, tile: ExpertTile) -> tuple:
    if (pair, tile) == ((Q8_0, Q8_0), SMALL):
        return ()
    return (pytest.mark.long if (pair, tile) in PUBLISHED else pytest.mark.slow,)


@pytest.mark.parametrize(
    ("gate", "down", "tile"),
    [
        pytest.param(*pair, tile, id=f"{name}-{tile.gate_up}", marks=_marks(pair, tile))
        for pair, name in zip(PAIRS, IDS, strict=True)
        for tile in (SMALL, LARGE)
    ],
)
def test_the_meaning(gate, down, tile):
    op = dataclasses.replace(OP, kernel=functools.partial(call, tile=tile))
    check_meaning(op, op.some(case(gate, down), slice(3)))


@pytest.mark.parametrize(("gate", "down"), [pytest.param(*PAIRS[0], marks=pytest.mark.slow), PAIRS[1]], ids=IDS[:2])
@pytest.mark.long
def test_each_row_has_the_bits_of_the_row_alone(gate, down):
    check_rows(OP, case(gate, down), (2, 8))


@pytest.mark.parametrize(("dim", "hidden"), [(256, 256), (4352, 512)])
@pytest.mark.slow
def test_odd_numbers_of_lanes(dim, hidden):
    check_meaning(OP, OP.some(case(IQ2_XXS, Q2_K, dim, hidden), slice(2)))


@pytest.mark.parametrize("format", list(activation_k.ORDERS), ids=lambda format: format.__name__)
def test_activations_in_blocks_of_256(format):
    x = np.random.default_rng(0).standard_normal((3, 1024)).astype(np.float32)
    x[1, 256:512] = 0
    x[2, 7], x[2, 9] = 5.0, -5.0
    quants, scales = activation_k.plain(activation_k.quantize_k(jnp.asarray(x), format, interpret=True), format)
    wanted_quants, wanted_scales = linear.quantize_k(jnp.asarray(x))
    np.testing.assert_array_equal(quants, np.asarray(wanted_quants).reshape(3, -1))
    assert_bits_equal(scales, wanted_scales)


@pytest.mark.parametrize("poison", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)])
@pytest.mark.long
def test_a_nan_stays_in_its_row(poison):
    x, *rest = clean = OP.some(case(IQ2_XXS, Q2_K), slice(2))
    check_poisoned_row(OP, clean, (x.at[1, 100].set(poison), *rest), 1)


@pytest.mark.long
@pytest.mark.parametrize(("gate", "down"), PAIRS, ids=IDS)
def test_v4_flash_lowers(gate, down):
    text = lowered_for_cuda(jax.jit(functools.partial(experts, limit=LIMIT)), *abstract_experts(gate, down, 3))
    assert kernel_calls(text, GATE_UP) == kernel_calls(text, DOWN) == 1
    assert kernel_calls(text, activation_k.NAME) + kernel_calls(text, "q8_activation") == 2


@pytest.mark.gpu
@pytest.mark.parametrize(("gate", "down"), PAIRS, ids=IDS)
def test_on_the_gpu(gate, down):
    arguments = case(gate, down, 4096, 2048)
    check_meaning(OP, arguments, interpret=False)
    check_rows(OP, arguments, (2, 3, 8), interpret=False)


def gate_and_up(rows: int, hidden: int) -> tuple:
    """Rows of K = 4096 for experts in IQ2_XXS, quantised, as both kernels of gate and up take them."""
    x, chosen, share, gate, up, _ = case(IQ2_XXS, Q2_K, 4096, hidden)
    return activation_k.quantize_k(x[:rows], IQ2_XXS, interpret=True), chosen[:rows], share[:rows], gate, up


def one_warp(*operands: Any, interpret: bool) -> jax.Array:
    [[hidden]] = launch([gate_up_part(*operands, limit=LIMIT, interpret=interpret)], warps=1, interpret=interpret)
    return hidden


@pytest.mark.parametrize("rows", [1, pytest.param(8, marks=pytest.mark.long)])
def test_gate_and_up_of_many_rows_have_the_bits_of_few(rows: int) -> None:
    operands = gate_and_up(rows, 256)
    assert many_rows.serves(many_rows.MANY_ROWS, IQ2_XXS, operands[3].shape)
    [[found]] = launch([many_rows.part(*operands, limit=LIMIT, interpret=True)], warps=many_rows.WARPS, interpret=True)
    assert_bits_equal(found, one_warp(*operands, interpret=True))


@pytest.mark.parametrize(("rows", "warps"), [(many_rows.MANY_ROWS - 1, 1), (many_rows.MANY_ROWS, many_rows.WARPS)])
def test_which_kernel_takes_gate_and_up(rows: int, warps: int) -> None:
    function = jax.jit(functools.partial(gate_up, limit=LIMIT, interpret=False))
    text = lowered_for_cuda(function, *gate_and_up(rows, 256))
    assert kernel_calls(text, GATE_UP) == 1
    assert re.findall(r"num_warps = (\d+)", text) == [str(warps)]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [5, 8])
def test_gate_and_up_of_many_rows_on_the_gpu(rows: int) -> None:
    operands = gate_and_up(rows, 2048)
    found = jax.jit(functools.partial(gate_up, limit=LIMIT, interpret=False))(*operands)
    assert_bits_equal(found, jax.jit(functools.partial(one_warp, interpret=False))(*operands))

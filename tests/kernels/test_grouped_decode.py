"""Gate and up of many rows with each expert read once: the pairs by expert, the bits of the kernel by pairs, and lowering."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import kernel_calls, lowered_for_cuda
from numerics import assert_bits_equal
from quantized import random_blocks

from ds4jax.config import Config
from pallas_kernels.core.launch import launch
from pallas_kernels.experts.decode import gate_up_part
from pallas_kernels.experts.grouped_decode import GROUPS, NAME, GroupedTile, by_expert, grouped_gate_up_part
from pallas_kernels.formats import IQ2_S, IQ2_XXS, IQ3_XXS, MXFP4, Q2_K, Q4_K, Q5_K, Q6_K, Q8_0, Quantized
from pallas_kernels.linear.lane_row import quantize_for

FORMATS = (IQ2_XXS, IQ2_S, IQ3_XXS, Q2_K, Q4_K, Q5_K, Q6_K, MXFP4, Q8_0)
LIMIT = 10.0


def choices(seed: int, rows: int, active: int, experts: int) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(np.stack([rng.permutation(experts)[:active] for _ in range(rows)]), jnp.int32)


@pytest.mark.parametrize(("rows", "active", "experts"), [(9, 2, 3), (32, 6, 256), (1, 1, 1)])
def test_pairs_are_in_the_order_of_the_experts(rows, active, experts):
    chosen = choices(rows, rows, active, experts)
    groups = by_expert(chosen, interpret=True)
    flat = np.asarray(chosen).reshape(-1)
    pair, count = np.asarray(groups.pair), np.asarray(groups.count)
    np.testing.assert_array_equal(pair, np.argsort(flat, kind="stable"))
    leads = np.concatenate([[True], np.diff(flat[pair]) != 0])
    np.testing.assert_array_equal(count, np.where(leads, np.bincount(flat)[flat[pair]], 0))


@functools.partial(jax.jit, static_argnames=("tile", "interpret"))
def both(
    x: jax.Array, chosen: jax.Array, share: jax.Array, gate: Quantized, up: Quantized, *, tile: GroupedTile, interpret: bool
) -> list[jax.Array]:
    """Hidden values by the kernel for groups, and by the kernel for pairs."""
    quantized = quantize_for(x, type(gate), interpret=interpret)
    operands = (quantized, chosen, share, gate, up)
    parts = [
        grouped_gate_up_part(*operands, limit=LIMIT, tile=tile, interpret=interpret),
        gate_up_part(*operands, limit=LIMIT, interpret=interpret),
    ]
    return [launch([part], warps=1, interpret=interpret)[0][0] for part in parts]


def operands(format: type[Quantized], rows: int, hidden: int, dim: int, experts: int, active: int) -> tuple[Any, ...]:
    stacks = [format.from_bytes(random_blocks(format, (experts, hidden, dim), seed)) for seed in (1, 2)]
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((rows, dim)) * 1e-3, jnp.float32)
    share = jnp.asarray(rng.uniform(0.2, 1.0, (rows, active)), jnp.float32)
    return x, choices(4, rows, active, experts), share, *stacks


CASES = [
    pytest.param(Q8_0, GroupedTile(1, 1, 2), id="q8_0"),
    pytest.param(IQ2_XXS, GroupedTile(2, 1, 3), id="iq2_xxs", marks=pytest.mark.long),
    pytest.param(MXFP4, GroupedTile(1, 0, 1), id="mxfp4", marks=pytest.mark.slow),
    pytest.param(Q2_K, GroupedTile(2, 2, 2), id="q2_k", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("format", "tile"), CASES)
def test_hidden_values_are_those_of_the_pairs(format, tile):
    found, expected = both(*operands(format, 9, 7, 512, 5, 2), tile=tile, interpret=True)
    # Compilers for CPUs fuse products with sums differently in the two programs; on a GPU the bits are equal, see below.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def abstract(format: type[Quantized], *shape: int) -> Quantized:
    *lead, k = shape
    raw = jax.ShapeDtypeStruct((*lead, k // format.BLOCK, format.BLOCK_BYTES), jnp.uint8)
    return jax.eval_shape(format.split, raw)


def hidden(x: jax.Array, chosen: jax.Array, share: jax.Array, gate: Quantized, up: Quantized) -> jax.Array:
    part = grouped_gate_up_part(quantize_for(x, type(gate)), chosen, share, gate, up, limit=LIMIT)
    return launch([part], warps=1, interpret=False)[0][0]


@pytest.mark.parametrize(
    "format", [pytest.param(format, marks=[] if format is IQ2_XXS else pytest.mark.long) for format in FORMATS]
)
def test_v4_flash_lowers(format):
    config, rows = Config(), 32
    stack = abstract(format, config.n_experts, config.moe_dim, config.dim)
    numbers = [jax.ShapeDtypeStruct((rows, config.n_active), dtype) for dtype in (jnp.int32, jnp.float32)]
    text = lowered_for_cuda(jax.jit(hidden), jax.ShapeDtypeStruct((rows, config.dim), jnp.float32), *numbers, stack, stack)
    assert kernel_calls(text, NAME) == 1
    assert kernel_calls(text, GROUPS) == 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("format", "tile"),
    [
        (IQ2_XXS, GroupedTile()),
        (IQ2_XXS, GroupedTile(2, 2, 3)),
        (IQ2_S, GroupedTile()),
        (MXFP4, GroupedTile(1, 0, 1)),
        (Q2_K, GroupedTile(2, 1, 2)),
    ],
    ids=lambda what: what.__name__ if isinstance(what, type) else str(what.rows),
)
def test_the_bits_of_the_pairs_on_a_gpu(format, tile):
    """Experts that one row chose, that several rows chose, and that none chose."""
    found, expected = both(*operands(format, 32, 250, 4096, 96, 6), tile=tile, interpret=False)
    assert_bits_equal(found, expected)

"""Rows in the order of the experts: kernels against the plan in jnp, bit by bit, and lowered for CUDA at full size."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import kernel_calls, lowered_for_cuda
from numerics import assert_bits_equal

from pallas_kernels.experts import grouping, placing
from pallas_kernels.experts.fragments import BLOCK, DECODERS

# Rows, choices of a row, experts and rows of a tile. Pairs of the last are more than a program looks at together.
SIZES = [(17, 3, 5, 16), (64, 6, 256, 64), (300, 2, 5, 40), (900, 5, 16, 128)]
MARKED = [SIZES[0], SIZES[2], *(pytest.param(size, marks=pytest.mark.long) for size in (SIZES[1], SIZES[3]))]
KINDS = ["spread", "one expert", "the ends"]


def choices(kind: str, size: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Experts int32 [T, K] and shares float32 [T, K]."""
    tokens, active, experts, _ = size
    random = np.random.default_rng(tokens)
    chosen = {
        "spread": random.integers(0, experts, (tokens, active)),
        "one expert": np.full((tokens, active), experts - 2),
        "the ends": random.choice([0, experts - 1], (tokens, active)),
    }[kind]
    return chosen.astype(np.int32), random.uniform(0.2, 1.0, chosen.shape).astype(np.float32)


def check_spans(kind: str, size: tuple[int, int, int, int], *, interpret: bool) -> None:
    chosen, share = choices(kind, size)
    made, shares = jax.jit(functools.partial(placing.spans, experts=size[2], rows=size[3], interpret=interpret))(chosen, share)
    wanted = jax.jit(functools.partial(grouping.spans, experts=size[2], rows=size[3]))(chosen)
    np.testing.assert_array_equal(made.table, wanted.table, f"tiles of {kind} {size}")
    np.testing.assert_array_equal(made.pair, wanted.pair, f"places of {kind} {size}")
    assert_bits_equal(shares, share.reshape(-1)[np.asarray(wanted.pair)])


@pytest.mark.parametrize("size", MARKED, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_places_and_tiles_are_those_of_the_plan(kind: str, size: tuple[int, int, int, int]) -> None:
    check_spans(kind, size, interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [*SIZES, (4096, 6, 256, 128)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_places_and_tiles_are_those_of_the_plan_on_a_gpu(kind: str, size: tuple[int, int, int, int]) -> None:
    check_spans(kind, size, interpret=False)


def check_rows(width: int, order: np.ndarray, *, interpret: bool) -> None:
    random = np.random.default_rng(width)
    x, pair = jnp.asarray(random.standard_normal((9, width)), jnp.bfloat16), random.integers(0, 27, 40).astype(np.int32)
    made = placing.rows_of_pairs(x, pair, 3, order, interpret=interpret)
    assert_bits_equal(made, np.asarray(x).reshape(9, -1, BLOCK)[..., order].reshape(9, -1)[pair // 3])


@pytest.mark.parametrize("width", [256, 768])
@pytest.mark.parametrize("format", DECODERS, ids=lambda format: format.__name__)
def test_rows_are_those_of_the_pairs_in_the_order_of_the_decoder(format: type, width: int) -> None:
    check_rows(width, DECODERS[format].order, interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [768, 4096])
@pytest.mark.parametrize("format", DECODERS, ids=lambda format: format.__name__)
def test_rows_are_those_of_the_pairs_on_a_gpu(format: type, width: int) -> None:
    check_rows(width, DECODERS[format].order, interpret=False)


@pytest.mark.parametrize("tokens", [64, 4096])
def test_v4_flash_lowers(tokens: int) -> None:
    order = next(iter(DECODERS.values())).order

    def run(x: jax.Array, chosen: jax.Array, share: jax.Array) -> tuple[jax.Array, ...]:
        tiles, shares = placing.spans(chosen, share, 256, 128)
        return tiles.table, shares, placing.rows_of_pairs(x, tiles.pair, 6, order)

    shapes = [jax.ShapeDtypeStruct((tokens, size), dtype) for size, dtype in ((4096, "bfloat16"), (6, "int32"), (6, "float32"))]
    text = lowered_for_cuda(jax.jit(run), *shapes)
    assert [kernel_calls(text, name) for name in (placing.COUNTS, placing.PLACES, placing.ROWS)] == [1, 1, 1]

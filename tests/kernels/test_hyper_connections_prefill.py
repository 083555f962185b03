"""The gates of a prefill's streams: against their meaning, over the number of rows, and lowered for CUDA."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.harness import Op, check_lowers, check_meaning, check_rows

from pallas_kernels.hyper_connections import meaning, prefill
from pallas_kernels.hyper_connections.gates import MIXES

SETTINGS = {"iterations": 20, "eps": 1e-6}
SPLIT = Op(
    "gates of the streams",
    jax.jit(functools.partial(prefill.split, **SETTINGS), static_argnames="interpret"),
    jax.jit(functools.partial(meaning.split, n=4, **SETTINGS)),
    rows=(0,),
    # Of a row's largest value; what is seen in interpret mode is a tenth.
    tolerance=1e-5,
)


def operands(rows: int) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(rows)
    mixes, base = random.normal(size=(rows, MIXES)), random.normal(size=MIXES)
    return mixes.astype(np.float32), np.float32([0.9, 0.7, 1.1]), base.astype(np.float32)


@pytest.mark.parametrize("rows", [130, pytest.param(3, marks=pytest.mark.long)])
def test_interpreted_like_jnp(rows: int) -> None:
    check_meaning(SPLIT, operands(rows))


@pytest.mark.long
def test_each_row_has_the_bits_of_the_row_alone() -> None:
    check_rows(SPLIT, operands(8), (1, 3, 8))


def test_v4_flash_lowers() -> None:
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4096, MIXES), (3,), (MIXES,))]
    check_lowers(functools.partial(prefill.split, **SETTINGS), tuple(shapes), {prefill.NAME: 1})


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [3, 130, 4096])
def test_compiled_like_jnp(rows: int) -> None:
    check_meaning(SPLIT, operands(rows), interpret=False)


@pytest.mark.gpu
def test_rows_have_the_bits_of_the_row_alone_on_a_gpu() -> None:
    check_rows(SPLIT, operands(8), (1, 3, 8), interpret=False)

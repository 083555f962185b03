"""Norms, rotation, rounding and the ring's update: the kernel against its meaning, rows against rows alone."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.harness import Op, check_lowers, check_rows
from numerics import assert_bits_equal

from pallas_kernels.attention import meaning
from pallas_kernels.attention.qkv import NAME, latent
from pallas_kernels.core import rounding

EPS = 1e-6
FLASH = {"width": 1024, "head": 512, "rope": 64, "ring": 131}
SHAPES = pytest.mark.parametrize(
    "shape",
    [
        pytest.param({"width": 64, "head": 96, "rope": 32, "ring": 20}, id="golden"),
        pytest.param({"width": 160, "head": 128, "rope": 64, "ring": 11}, id="odd", marks=pytest.mark.long),
        pytest.param(FLASH, id="flash", marks=pytest.mark.long),
    ],
)


_latent = jax.jit(latent, static_argnames=("eps", "qat", "interpret"))
_meaning = jax.jit(meaning.qkv, static_argnames=("eps", "qat"))
_fp8 = jax.jit(rounding.fp8)


def operands(m: int, *, width: int, head: int, rope: int, ring: int, sequences: int = 1) -> tuple[np.ndarray, ...]:
    normal = functools.partial(np.random.default_rng([width, head]).standard_normal, dtype=np.float32)
    angle = normal((8, rope // 2)) * 100
    slot = (np.arange(8, dtype=np.int32) * 3 + ring - 4) % ring
    slot[2] = ring
    return (
        normal((8, width))[:m] * 3,
        normal((8, head))[:m] * 3,
        normal(width) + 1,
        normal(head) + 1,
        np.cos(angle)[:m],
        np.sin(angle)[:m],
        normal((sequences, ring, head)),
        (np.arange(8, dtype=np.int32) * 3 % sequences)[:m],
        slot[:m],
    )


def call(*args: np.ndarray, qat: bool = True, interpret: bool = True) -> Any:
    return _latent(*args, eps=EPS, qat=qat, interpret=interpret)


def values(quants: np.ndarray, scales: np.ndarray) -> np.ndarray:
    words = np.ascontiguousarray(np.moveaxis(np.asarray(quants), 2, 3))
    return words.reshape(*words.shape[:3], 8).view(np.int8) * np.asarray(scales)[..., None]


def check(shape: dict[str, int], *, interpret: bool) -> None:
    args = operands(4, **shape)
    activation, normed, ring = call(*args, qat=False, interpret=interpret)
    (quants, scales), expected, expected_ring = _meaning(*args, eps=EPS, qat=False)
    np.testing.assert_allclose(normed, expected, rtol=1e-6, atol=1e-6, err_msg=f"queries, {shape}")
    np.testing.assert_allclose(ring, expected_ring, rtol=1e-6, atol=2e-6 if interpret else 4e-6, err_msg=f"ring, {shape}")
    # A quant may round to the other side, one step away.
    step = np.asarray(scales)[..., None] * 1.001
    assert (
        np.abs(values(activation.quants, activation.scales)[:, 0] - np.asarray(quants) * np.asarray(scales)[..., None]) <= step
    ).all()
    np.testing.assert_allclose(np.asarray(activation.scales)[:, 0], scales, rtol=1e-6)
    ring, slot = np.asarray(ring), args[8]
    untouched = np.setdiff1d(np.arange(shape["ring"]), slot)
    assert_bits_equal(ring[0, untouched], args[6][0, untouched])

    rounded = np.asarray(call(*args, interpret=interpret)[2])
    plain, inside = shape["head"] - shape["rope"], slot[slot < shape["ring"]]
    blocks = ring[0, inside, :plain].reshape(len(inside), -1, rounding.FP8_BLOCK)
    assert_bits_equal(rounded[0, inside, :plain], np.asarray(_fp8(blocks)).reshape(len(inside), plain))
    assert_bits_equal(rounded[0, inside, plain:], ring[0, inside, plain:])


@SHAPES
def test_equals_the_meaning(shape):
    check(shape, interpret=True)


def rows_of(*args: np.ndarray, interpret: bool) -> tuple[Any, ...]:
    """Everything that a row leaves: queries, and its key in the ring, zeros where it stays out."""
    activation, normed, ring = call(*args, interpret=interpret)
    sequence, slot = args[7:]
    key = jnp.asarray(ring).at[sequence, slot].get(mode="fill", fill_value=0)
    return activation, normed, key


OP = Op("queries and keys", rows_of, rows=(0, 1, 4, 5, 7, 8))


@pytest.mark.long
def test_each_row_has_the_bits_of_the_row_alone():
    check_rows(OP, operands(8, width=64, head=96, rope=32, ring=20), (2, 3, 8))


def test_rows_of_two_sequences_are_those_of_each_alone():
    """Keys go into their own sequence's ring and leave every other slot as it was; one row stays out."""
    args = operands(4, width=64, head=96, rope=32, ring=20, sequences=2)
    ring, sequence, slot = args[6:]
    assert sequence.tolist() == [0, 1, 0, 1]
    *_, made = jax.tree.map(np.asarray, call(*args))
    for s in range(2):
        own = [x[s::2] if i in (0, 1, 4, 5, 8) else x for i, x in enumerate(args)]
        own[6], own[7] = ring[s : s + 1], np.zeros(2, np.int32)
        *_, alone = call(*own)
        assert_bits_equal(made[s], alone[0])
        changed = np.flatnonzero((made[s] != ring[s]).any(axis=-1))
        assert changed.tolist() == sorted(p for p in slot[s::2] if p < 20)


@pytest.mark.parametrize("m", [3, *(pytest.param(m, marks=pytest.mark.slow) for m in (1, 8))])
@SHAPES
def test_lowers_for_cuda(shape, m):
    abstract = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands(m, **shape)]
    check_lowers(functools.partial(latent, eps=EPS, qat=True), tuple(abstract), {NAME: 1})


@pytest.mark.gpu
@SHAPES
def test_equals_the_meaning_on_a_gpu(shape):
    check(shape, interpret=False)


@pytest.mark.gpu
@SHAPES
def test_each_row_has_the_bits_of_the_row_alone_on_a_gpu(shape):
    check_rows(OP, operands(8, **shape), (2, 3, 4, 8), interpret=False)
    check_rows(OP, operands(8, **shape, sequences=3), (8,), interpret=False)

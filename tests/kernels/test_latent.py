"""Norms, rotation, rounding and the ring's update: the kernel against jnp and against the model's own parts."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import kernel_calls, lowered_for_cuda
from numerics import assert_bits_equal, golden_config

from ds4jax.cache import Rows, write_ring
from ds4jax.model import fake_quant
from ds4jax.model.layers import rms_scale
from ds4jax.model.rope import inverse_frequencies, rotate
from pallas_kernels import rounding
from pallas_kernels.latent import NAME, latent, latent_reference

EPS = 1e-6
FLASH = {"width": 1024, "head": 512, "rope": 64, "ring": 131}
SHAPES = pytest.mark.parametrize(
    "shape",
    [{"width": 64, "head": 96, "rope": 32, "ring": 20}, {"width": 160, "head": 128, "rope": 64, "ring": 11}, FLASH],
    ids=["golden", "odd", "flash"],
)


_latent = jax.jit(latent, static_argnames=("eps", "qat", "interpret"))
_latent_reference = jax.jit(latent_reference, static_argnames=("eps", "qat"))
_fp8 = jax.jit(rounding.fp8)


def operands(m: int, *, width: int, head: int, rope: int, ring: int) -> tuple[np.ndarray, ...]:
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
        normal((1, ring, head)),
        slot[:m],
    )


def call(*args: np.ndarray, qat: bool = True, interpret: bool = True) -> Any:
    return _latent(*args, eps=EPS, qat=qat, interpret=interpret)


def by_row(result: Any) -> tuple[jax.Array, ...]:
    activation, normed, _ = result
    return activation.quants, activation.scales, normed


def values(quants: np.ndarray, scales: np.ndarray) -> np.ndarray:
    words = np.ascontiguousarray(np.moveaxis(np.asarray(quants), 2, 3))
    return words.reshape(*words.shape[:3], 8).view(np.int8) * np.asarray(scales)[..., None]


def check(shape: dict[str, int], *, interpret: bool) -> None:
    args = operands(4, **shape)
    activation, normed, ring = call(*args, qat=False, interpret=interpret)
    (quants, scales), expected, expected_ring = _latent_reference(*args, eps=EPS, qat=False)
    np.testing.assert_allclose(normed, expected, rtol=1e-6, atol=1e-6, err_msg=f"queries, {shape}")
    np.testing.assert_allclose(ring, expected_ring, rtol=1e-6, atol=2e-6 if interpret else 4e-6, err_msg=f"ring, {shape}")
    # A quant may round to the other side, one step away.
    step = np.asarray(scales)[..., None] * 1.001
    assert (
        np.abs(values(activation.quants, activation.scales)[:, 0] - np.asarray(quants) * np.asarray(scales)[..., None]) <= step
    ).all()
    np.testing.assert_allclose(np.asarray(activation.scales)[:, 0], scales, rtol=1e-6)
    ring, slot = np.asarray(ring), args[7]
    untouched = np.setdiff1d(np.arange(shape["ring"]), slot)
    assert_bits_equal(ring[0, untouched], args[6][0, untouched])

    rounded = np.asarray(call(*args, interpret=interpret)[2])
    still, inside = shape["head"] - shape["rope"], slot[slot < shape["ring"]]
    blocks = ring[0, inside, :still].reshape(len(inside), -1, rounding.FP8_BLOCK)
    assert_bits_equal(rounded[0, inside, :still], np.asarray(_fp8(blocks)).reshape(len(inside), still))
    assert_bits_equal(rounded[0, inside, still:], ring[0, inside, still:])


@SHAPES
def test_equals_the_reference(shape):
    check(shape, interpret=True)


def test_the_reference_is_the_model():
    config = golden_config()
    shape = {"width": config.q_lora_rank, "head": config.head_dim, "rope": config.rope_dim, "ring": 20}
    q_low, kv, q_weight, kv_weight, *_, ring, _ = operands(4, **shape)
    frequencies = inverse_frequencies(config, compressed=True)

    @jax.jit
    def by_the_reference(q_low, kv, q_weight, kv_weight, ring, rows):
        angle = rows.position.astype(jnp.float32)[:, None] * jnp.asarray(frequencies)
        slot = jnp.where(rows.live, rows.position % 20, 20)
        return latent_reference(q_low, kv, q_weight, kv_weight, jnp.cos(angle), jnp.sin(angle), ring, slot, eps=EPS, qat=True)[1:]

    @jax.jit
    def by_the_model(q_low, kv, q_weight, kv_weight, ring, rows):
        key = rotate(kv * rms_scale(kv, EPS) * kv_weight, rows.position, frequencies)
        still = config.head_dim - config.rope_dim
        key = jnp.concatenate([fake_quant.fp8(key[:, :still]), key[:, still:]], axis=-1)
        return q_low * rms_scale(q_low, EPS) * q_weight, write_ring(ring, key, rows)

    given = q_low, kv, q_weight, kv_weight, ring, Rows.following(jnp.int32(17), 4, 3)
    for array, expected in zip(by_the_reference(*given), by_the_model(*given), strict=True):
        assert_bits_equal(array, expected)


def check_rows(shape: dict[str, int], counts: tuple[int, ...], *, interpret: bool) -> None:
    args = operands(8, **shape)
    ring, slot = args[6], args[7]

    def rows(first: int, last: int) -> Any:
        own = [x[first:last] if i in (0, 1, 4, 5, 7) else x for i, x in enumerate(args)]
        return jax.tree.map(np.asarray, call(*own, interpret=interpret))

    alone = [rows(m, m + 1) for m in range(8)]
    for count in counts:
        together = rows(0, count)
        for m in range(count):
            for name, one, part in zip(("quants", "scales", "normed"), by_row(alone[m]), by_row(together), strict=True):
                np.testing.assert_array_equal(part[m : m + 1], one, err_msg=f"{name}, row {m} of {count}, {shape}")
            if slot[m] < ring.shape[1]:
                np.testing.assert_array_equal(
                    together[2][0, slot[m]], alone[m][2][0, slot[m]], err_msg=f"ring, row {m} of {count}, {shape}"
                )


@pytest.mark.long
def test_each_row_has_the_bits_of_the_row_alone():
    check_rows({"width": 64, "head": 96, "rope": 32, "ring": 20}, (2, 3, 8), interpret=True)


@pytest.mark.parametrize("m", [1, 3, 8])
@SHAPES
def test_lowers_for_cuda(shape, m):
    abstract = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands(m, **shape)]
    text = lowered_for_cuda(jax.jit(functools.partial(latent, eps=EPS, qat=True)), *abstract)
    assert kernel_calls(text, NAME) == 1


@pytest.mark.gpu
@SHAPES
def test_equals_the_reference_on_a_gpu(shape):
    check(shape, interpret=False)


@pytest.mark.gpu
@SHAPES
def test_each_row_has_the_bits_of_the_row_alone_on_a_gpu(shape):
    check_rows(shape, (2, 3, 4, 8), interpret=False)

"""The expert kernels: their arithmetic against the reference, the bits of a row in other company, and lowering at full size."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import kernel_calls, lowered_for_cuda
from numerics import assert_bits_equal
from quantized import random_blocks

from pallas_kernels import activation_k, expert_matmul, reference
from pallas_kernels.expert_matmul import DOWN, GATE_UP, ExpertTile
from pallas_kernels.formats import IQ2_XXS, MXFP4, Q2_K, Q4_K, Q8_0, Quantized

LIMIT = 10.0
PAIRS = [(IQ2_XXS, Q2_K), (Q4_K, Q4_K), (MXFP4, MXFP4), (Q8_0, Q8_0)]
IDS = [f"{gate.__name__}-{down.__name__}" for gate, down in PAIRS]


def expected(x: jax.Array, chosen: jax.Array, share: jax.Array, gate: Quantized, up: Quantized, down: Quantized) -> jax.Array:
    g, u = (reference.expert_dot(x[:, None], stack.take(chosen)) for stack in (gate, up))
    hidden = jax.nn.silu(jnp.minimum(g, LIMIT)) * jnp.clip(u, -LIMIT, LIMIT) * share[..., None]
    return reference.expert_dot(hidden, down.take(chosen), add_up=True)


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


def run(arguments: tuple, rows: slice, *, tile: ExpertTile | None = None, interpret: bool) -> np.ndarray:
    x, chosen, share, *stacks = arguments
    call = jax.jit(functools.partial(expert_matmul.experts, limit=LIMIT, tile=tile, interpret=interpret))
    return np.asarray(call(x[rows], chosen[rows], share[rows], *stacks))


def assert_near(found: np.ndarray, wanted: jax.Array) -> None:
    wanted = np.asarray(wanted)
    assert np.isfinite(wanted).all()
    assert np.abs(wanted).max() > 0
    # Integers are the same; what differs is the order of a few hundred float32 sums.
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("tile", [ExpertTile(1, 1), ExpertTile(4, 2)], ids=["1", "4-2"])
@pytest.mark.parametrize(("gate", "down"), PAIRS, ids=IDS)
@pytest.mark.long
def test_the_reference(gate, down, tile):
    arguments = case(gate, down)
    assert_near(run(arguments, slice(0, 3), tile=tile, interpret=True), expected(*(a[:3] for a in arguments[:3]), *arguments[3:]))


@pytest.mark.parametrize(("gate", "down"), PAIRS[:2], ids=IDS[:2])
@pytest.mark.long
def test_each_row_has_the_bits_of_the_row_alone(gate, down):
    arguments = case(gate, down)
    together = {rows: run(arguments, slice(0, rows), interpret=True) for rows in (2, 8)}
    for m in range(2):
        alone = run(arguments, slice(m, m + 1), interpret=True)
        for found in together.values():
            assert_bits_equal(found[m], alone[0])


@pytest.mark.parametrize(("dim", "hidden"), [(256, 256), (4352, 512)])
@pytest.mark.long
def test_odd_numbers_of_lanes(dim, hidden):
    arguments = case(IQ2_XXS, Q2_K, dim, hidden)
    assert_near(run(arguments, slice(0, 2), interpret=True), expected(*(a[:2] for a in arguments[:3]), *arguments[3:]))


@pytest.mark.parametrize("format", list(activation_k.ORDERS), ids=lambda format: format.__name__)
def test_activations_in_blocks_of_256(format):
    x = np.random.default_rng(0).standard_normal((3, 1024)).astype(np.float32)
    x[1, 256:512] = 0
    x[2, 7], x[2, 9] = 5.0, -5.0
    quants, scales = activation_k.plain(activation_k.quantize_k(jnp.asarray(x), format, interpret=True), format)
    wanted_quants, wanted_scales = reference.quantize_k(jnp.asarray(x))
    np.testing.assert_array_equal(quants, np.asarray(wanted_quants).reshape(3, -1))
    assert_bits_equal(scales, wanted_scales)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.long
def test_a_nan_stays_in_its_row(poison):
    x, *rest = case(IQ2_XXS, Q2_K)
    clean = run((x, *rest), slice(0, 2), interpret=True)
    found = run((x.at[1, 100].set(poison), *rest), slice(0, 2), interpret=True)
    assert_bits_equal(found[0], clean[0])
    assert np.isnan(found[1]).all()


def abstract(format: type[Quantized], *shape: int) -> Quantized:
    *lead, k = shape
    raw = jax.ShapeDtypeStruct((*lead, k // format.BLOCK, format.BLOCK_BYTES), jnp.uint8)
    return jax.eval_shape(format.split, raw)


@pytest.mark.parametrize(("gate", "down"), PAIRS, ids=IDS)
def test_v4_flash_lowers(gate, down):
    call = jax.jit(functools.partial(expert_matmul.experts, limit=LIMIT))
    numbers = (
        jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (((3, 4096), "float32"), ((3, 6), "int32"), ((3, 6), "float32"))
    )
    stacks = abstract(gate, 256, 2048, 4096), abstract(gate, 256, 2048, 4096), abstract(down, 256, 4096, 2048)
    text = lowered_for_cuda(call, *numbers, *stacks)
    assert kernel_calls(text, GATE_UP) == kernel_calls(text, DOWN) == 1
    assert kernel_calls(text, activation_k.NAME) + kernel_calls(text, "q8_activation") == 2


@pytest.mark.gpu
@pytest.mark.parametrize(("gate", "down"), PAIRS, ids=IDS)
def test_on_the_gpu(gate, down):
    arguments = case(gate, down, 4096, 2048)
    together = {rows: run(arguments, slice(0, rows), interpret=False) for rows in (2, 3, 8)}
    assert_near(together[8], expected(*arguments))
    for m in range(8):
        alone = run(arguments, slice(m, m + 1), interpret=False)
        for rows, found in together.items():
            if m < rows:
                assert (found[m].view(np.int32) == alone[0].view(np.int32)).all(), f"row {m} of {rows} differs from the row alone"

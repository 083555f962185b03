"""Experts of a prompt on Hopper: decoders and tiles emulated in NumPy, lowering at full size, and the products on the card."""

from __future__ import annotations

import functools
import operator

import jax
import ml_dtypes
import numpy as np
import pytest
from cuda import lowered_for_cuda
from numerics import assert_bits_equal
from quantized import abstract, abstract_experts, as_float, random_blocks
from thread_emulation import decoded

from ds4jax.model.paths import HOPPER
from pallas_kernels.experts import grouping, hopper
from pallas_kernels.experts.fragments import BLOCK, DECODERS
from pallas_kernels.formats import IQ2_S, IQ2_XXS, IQ3_XXS, MXFP4, Q2_K, Q4_K, Quantized
from pallas_kernels.formats.mxfp4 import E2M1

LIMIT, EXPERTS = 10.0, 5
PAIRS = [(IQ2_XXS, Q2_K), (IQ2_S, IQ3_XXS), (Q4_K, Q4_K), (MXFP4, MXFP4)]
# The layout of two bits; the others take the same steps and differ in what the tests of decoders show.
SOME = [pytest.param(*pair, marks=() if pair == PAIRS[0] else pytest.mark.long) for pair in PAIRS]
IDS = [f"{gate.__name__}-{down.__name__}" for gate, down in PAIRS]
FORMATS = pytest.mark.parametrize("format", DECODERS, ids=lambda format: format.__name__)


def stack(format: type[Quantized], shape: tuple[int, ...], seed: int, least: int = -3, most: int = -2) -> Quantized:
    return format.from_bytes(random_blocks(format, shape, seed, least=least, most=most))


def as_bits(weight: Quantized) -> np.ndarray:
    return np.asarray(as_float(weight, "bfloat16")).view(np.uint16)


@FORMATS
def test_a_quad_decodes_every_weight_with_one_rounding(format: type[Quantized]) -> None:
    weight, order = stack(format, (24, 512), 1, -7, 0), DECODERS[format].order
    assert sorted(order) == list(range(BLOCK))
    wanted, found = as_bits(weight).reshape(24, -1, BLOCK)[..., order], decoded(weight)
    zero = ((found | wanted) & 0x7FFF) == 0
    assert ((found == wanted) | zero).all()


def test_the_smallest_and_largest_powers_of_mxfp4() -> None:
    raw = random_blocks(MXFP4, (4, 256)).reshape(4, 8, MXFP4.BLOCK_BYTES)
    raw[..., 0] = [0, 1, 2, 3, 127, 250, 251, 252]
    weight = MXFP4.from_bytes(raw.reshape(4, -1))
    exact = weight.to_bytes().reshape(4, 8, -1)
    low, high = exact[..., 1:] & 15, exact[..., 1:] >> 4
    values = E2M1.astype(np.float64)[np.concatenate([low, high], -1)] * np.ldexp(1.0, raw[..., :1].astype(int) - 127)
    wanted = values.astype(ml_dtypes.bfloat16).view(np.uint16).reshape(4, 1, BLOCK)[..., DECODERS[MXFP4].order]
    np.testing.assert_array_equal(decoded(weight), wanted)


@FORMATS
def test_a_thread_s_second_row_is_at_one_distance_from_its_first(format: type[Quantized]) -> None:
    first, second = DECODERS[format].order.reshape(-1, 2, 8).transpose(1, 0, 2)
    assert len(set((second - first).flat)) == 1


@pytest.mark.parametrize("rows", [8, 16])
@pytest.mark.parametrize("name", ["spread", "one expert", "some unused"])
def test_tiles_hold_each_pair_once(name: str, rows: int) -> None:
    chosen = {
        "spread": np.random.default_rng(0).integers(0, EXPERTS, (40, 3)),
        "one expert": np.full((40, 3), 3),
        "some unused": np.random.default_rng(1).choice([0, 4], (17, 3)),
    }[name].astype(np.int32)
    made = jax.tree.map(np.asarray, jax.jit(grouping.spans, static_argnums=(1, 2))(chosen, EXPERTS, rows))
    spans = [(e, made.pair[first : first + n]) for e, first, n in zip(made.expert, made.first, made.count, strict=True) if n]
    assert sorted(np.concatenate([pairs for _, pairs in spans])) == list(range(chosen.size))
    for expert, pairs in spans:
        assert (chosen.reshape(-1)[pairs] == expert).all()
        assert (np.diff(pairs) > 0).all()
        assert len(pairs) <= rows
    assert (made.first % grouping.ALIGNMENT == 0).all()
    assert (np.diff(made.count) <= 0).all()
    assert (made.first + rows <= made.pair.size).all()
    for expert in range(EXPERTS):
        sizes = [len(pairs) for e, pairs in spans if e == expert]
        assert len(sizes) == -(-(chosen == expert).sum() // rows)
        # Equal tiles but the last.
        assert len(set(sizes[:-1])) <= 1


@functools.cache
def case(gate: type[Quantized], down: type[Quantized], dim: int = 256, hidden: int = 256, tokens: int = 12) -> tuple:
    rng = np.random.default_rng(0)
    stacks = (
        stack(gate, (EXPERTS, hidden, dim), 1),
        stack(gate, (EXPERTS, hidden, dim), 2),
        stack(down, (EXPERTS, dim, hidden), 3),
    )
    x, share = rng.standard_normal((tokens, dim)).astype(np.float32), rng.uniform(0.2, 1.0, (tokens, 2)).astype(np.float32)
    return x, rng.integers(0, EXPERTS, (tokens, 2)).astype(np.int32), share, stacks


def rounded(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def meaning_of(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    gate = np.minimum(gate, LIMIT)
    return gate / (1 + np.exp(-gate)) * np.clip(up, -LIMIT, LIMIT)


def modelled(x: np.ndarray, chosen: np.ndarray, share: np.ndarray, stacks: tuple) -> np.ndarray:
    """The result when activations, weights and hidden values are rounded to bfloat16, and all else is exact: float64 [T, D]."""
    g, u, d = (np.asarray(as_float(weight, "bfloat16"), np.float64)[chosen] for weight in stacks)
    gate, up = np.einsum("td,tkfd->tkf", rounded(x), g), np.einsum("td,tkfd->tkf", rounded(x), u)
    return np.einsum("tkf,tkdf->td", rounded(meaning_of(gate, up) * share[..., None]), d)


def weights_of(one: Quantized) -> list[np.ndarray]:
    """The decoded matrices of a stack, each float64 [N, K/256, 256]."""
    matrices = (jax.tree.map(operator.itemgetter(e), one) for e in range(EXPERTS))
    return [decoded(matrix).view(ml_dtypes.bfloat16).astype(np.float64) for matrix in matrices]


@pytest.mark.parametrize(("gate", "down"), SOME, ids=IDS)
def test_positions_of_hidden_values_are_those_of_down(gate: type[Quantized], down: type[Quantized]) -> None:
    """The two launches in NumPy, with decoded weights and columns where the launches have them."""
    x, chosen, share, stacks = case(gate, down)
    tiles = jax.tree.map(np.asarray, grouping.spans(chosen, EXPERTS, 8))
    order = DECODERS[down].order
    g, u, d = (weights_of(one) for one in stacks)
    rows = rounded(x).reshape(len(x), -1, BLOCK)[..., DECODERS[gate].order][tiles.pair // 2]
    y = np.full((chosen.size, x.shape[1]), np.nan)
    for expert, first, count in zip(tiles.expert, tiles.first, tiles.count, strict=True):
        pair, here = tiles.pair[first : first + count], rows[first : first + count]
        # Position p of a block of hidden values is row order[p] of gate and up.
        here_g, here_u = (w[expert].reshape(-1, BLOCK, *w[expert].shape[1:])[:, order].reshape(w[expert].shape) for w in (g, u))
        a, b = (np.einsum("nbp,fbp->nf", here, w) for w in (here_g, here_u))
        hidden = rounded(meaning_of(a, b) * share.reshape(-1)[pair][:, None])
        y[pair] = np.einsum("nbp,dbp->nd", hidden.reshape(count, d[expert].shape[1], BLOCK), d[expert])
    found = y.reshape(len(x), 2, -1).sum(axis=1)
    np.testing.assert_allclose(found, modelled(x, chosen, share, stacks), rtol=1e-9, atol=1e-9 * np.abs(found).max())


@pytest.mark.parametrize("tokens", [64, pytest.param(4096, marks=pytest.mark.long)])
@pytest.mark.parametrize(("gate", "down"), SOME, ids=IDS)
def test_v4_flash_lowers(gate: type[Quantized], down: type[Quantized], tokens: int) -> None:
    call = jax.jit(functools.partial(hopper.experts, limit=LIMIT, processors=132))
    with jax.default_matmul_precision("highest"):
        text = lowered_for_cuda(call, *abstract_experts(gate, down, tokens))
    assert text.count("custom_call @mosaic_gpu") == 2


def test_any_number_of_pairs_lowers() -> None:
    """Copies address units of eight rows."""
    call = functools.partial(hopper.experts, limit=LIMIT, processors=132)
    numbers = [jax.ShapeDtypeStruct((37, size), dtype) for size, dtype in ((512, "float32"), (5, "int32"), (5, "float32"))]
    stacks = abstract(IQ2_XXS, 5, 256, 512), abstract(IQ2_XXS, 5, 256, 512), abstract(Q2_K, 5, 512, 256)
    assert lowered_for_cuda(jax.jit(call), *numbers, *stacks).count("custom_call @mosaic_gpu") == 2


@pytest.mark.gpu
@pytest.mark.parametrize(("gate", "down"), PAIRS, ids=IDS)
def test_on_the_gpu(gate: type[Quantized], down: type[Quantized]) -> None:
    if not any(name in jax.devices()[0].device_kind for name in HOPPER):
        pytest.skip("the products are for Hopper")
    x, chosen, share, stacks = case(gate, down, 512, 256, 300)
    narrow = hopper.Tile((16, 40), 2)
    found = np.asarray(hopper.experts(x, chosen, share, *stacks, limit=LIMIT))
    wanted = modelled(x, chosen, share, stacks)
    # Sums are float32, and a hidden value may be rounded the other way.
    assert np.linalg.norm(found - wanted) <= 2.0**-10 * np.linalg.norm(wanted)
    other = np.asarray(hopper.experts(x, chosen, share, *stacks, limit=LIMIT, tile=narrow))
    rows = np.flatnonzero((other != found).any(axis=1))
    assert not rows.size, f"{gate.__name__} {down.__name__} {narrow}: rows {rows.tolist()} have other bits"
    order = np.random.default_rng(1).permutation(len(x))
    shuffled = hopper.experts(x[order], chosen[order], share[order], *stacks, limit=LIMIT)
    assert_bits_equal(shuffled, found[order])
    holed = x.copy()
    holed[0, 100] = np.nan
    poisoned = np.asarray(hopper.experts(holed, chosen, share, *stacks, limit=LIMIT))
    assert np.isnan(poisoned[0]).all()
    assert_bits_equal(poisoned[1:], found[1:])

"""Experts of many rows: the plan, weights multiplied out, both products in interpret mode, and lowering at full size."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import kernel_calls, lowered_for_cuda
from numerics import assert_bits_equal
from quantized import abstract_experts, as_float, random_blocks

from pallas_kernels.experts import grouping
from pallas_kernels.experts import prefill as experts_prefill
from pallas_kernels.experts.prefill import DOWN, GATE_UP, GroupedTile
from pallas_kernels.formats import IQ2_S, IQ2_XXS, IQ3_XXS, MXFP4, Q2_K, Q4_K, Q5_K, Q6_K, Q8_0, Quantized
from pallas_kernels.linear.dequantise import NAME, dequantise

LIMIT = 10.0
SMALL = GroupedTile(rows=16, columns=128, depth=64)
FORMATS = [IQ2_XXS, IQ2_S, IQ3_XXS, Q2_K, Q4_K, Q5_K, Q6_K, MXFP4, Q8_0]
PAIRS = [(IQ2_XXS, Q2_K), (IQ2_S, IQ3_XXS), (IQ2_S, MXFP4), (Q4_K, Q4_K), (Q5_K, Q6_K), (MXFP4, MXFP4), (Q8_0, Q8_0)]
IDS = [f"{gate.__name__}-{down.__name__}" for gate, down in PAIRS]
# Half a unit in the last place of bfloat16's eight digits.
UNIT = 2.0**-9
EXPERTS = 5
# Every tile that a device may be given: for many rows of an expert, for few, and with little shared memory.
H100 = "NVIDIA H100 80GB HBM3"
TILES = [GroupedTile.of(24_576, 256, H100), GroupedTile.of(3072, 256, H100), GroupedTile.of(24_576, 256, "NVIDIA GB10")]

# The choices of twelve rows: spread, all of one expert, an expert twice in a row's choice and two that nobody chose.
CHOICES = {
    "spread": [[row % EXPERTS, (row * 2 + 1) % EXPERTS] for row in range(12)],
    "one expert": [[3, 3]] * 12,
    "twice": [[row % 2, row % 2] for row in range(5)] + [[4, 0]] * 7,
}


def choice(name: str) -> np.ndarray:
    return np.asarray(CHOICES[name], np.int32)


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("rows", [4, 16])
def test_a_plan_holds_each_pair_once_among_its_experts(name, rows):
    chosen = choice(name)
    made = jax.tree.map(np.asarray, jax.jit(grouping.plan, static_argnums=(1, 2))(chosen, EXPERTS, rows))
    pair, expert = made.pair.reshape(-1, rows), made.expert
    assert sorted(pair[pair >= 0]) == list(range(chosen.size))
    for tile, owner in zip(pair, expert, strict=True):
        held = tile[tile >= 0]
        assert (held.size > 0) == (owner >= 0)
        assert (chosen.reshape(-1)[held] == owner).all()
        # Whole tiles but the last of an expert, in order.
        assert (tile[: held.size] == held).all()
        assert (np.diff(held) > 0).all()
    for one in range(EXPERTS):
        span = slice(made.first_tile[one], made.first_tile[one + 1])
        assert (expert[span] == one).all()
        assert (expert == one).sum() == span.stop - span.start == -(-(chosen == one).sum() // rows)


def test_no_choice_needs_more_tiles_than_the_bound():
    for pairs, experts, rows in [(12, 5, 4), (3, 5, 4), (24_576, 256, 128)]:
        bound = grouping.max_tiles(pairs, experts, rows)
        worst = np.ones(min(pairs, experts), int)
        worst[0] += pairs - worst.sum()
        assert -(-worst // rows).sum() <= bound <= pairs // rows + experts


def test_pairs_that_cannot_be_numbered():
    with pytest.raises(ValueError, match="31 bits"):
        jax.eval_shape(lambda x: grouping.plan(x, 256, 128), jax.ShapeDtypeStruct((1 << 21, 6), jnp.int32))


def stack(format: type[Quantized], shape: tuple[int, ...], seed: int, least: int = -3, most: int = -2) -> Quantized:
    return format.from_bytes(random_blocks(format, shape, seed, least=least, most=most))


def _marks(pair: tuple) -> tuple:
    if Q8_0 in pair:
        return ()
    return (pytest.mark.long if pair in ((IQ2_XXS, Q2_K), (MXFP4, MXFP4)) else pytest.mark.slow,)


# One format with a codebook, and two without; every format takes the same steps.
FEW = {IQ3_XXS: (), Q6_K: pytest.mark.long, Q8_0: pytest.mark.long}
SOME = [pytest.param(format, marks=FEW.get(format, pytest.mark.slow)) for format in FORMATS]


@pytest.mark.parametrize("format", SOME, ids=lambda format: format.__name__)
def test_weights_are_multiplied_out_with_one_rounding_after_the_format_s_own(format):
    weight = stack(format, (3, 128, 256), 1, -7, 0)
    found = jax.jit(functools.partial(dequantise, count=2, interpret=True))(weight, jnp.int32(1))
    assert_bits_equal(found, np.asarray(as_float(weight, "bfloat16"))[1:])


def test_widths_that_do_not_divide():
    with pytest.raises(ValueError, match="128"):
        dequantise(stack(Q8_0, (1, 8, 64), 1), jnp.int32(0), 1, interpret=True)


@functools.cache
def case(gate: type[Quantized], down: type[Quantized], dim: int = 256, hidden: int = 256, experts: int = EXPERTS) -> tuple:
    rng = np.random.default_rng(0)
    stacks = (
        stack(gate, (experts, hidden, dim), 1),
        stack(gate, (experts, hidden, dim), 2),
        stack(down, (experts, dim, hidden), 3),
    )
    x = rng.standard_normal((12, dim)).astype(np.float32)
    return x, rng.uniform(0.2, 1.0, (12, 2)).astype(np.float32), stacks


def wide(array: np.ndarray | Quantized) -> np.ndarray:
    return np.asarray(as_float(array) if isinstance(array, Quantized) else array, np.float64)


def expected(x: np.ndarray, chosen: np.ndarray, share: np.ndarray, gate: Quantized, up: Quantized, down: Quantized) -> tuple:
    """The exact result, and how far roundings to bfloat16 may take another from it.

    A product of two rounded factors is off by two units of its terms' magnitudes. What that does to the hidden value: SwiGLU's
    derivative by the gate is below 1.1 |up| and by up below |silu(gate)|; then the hidden value is rounded itself.
    """
    x64, share64, (g64, u64, d64) = wide(x), wide(share), (wide(w)[chosen] for w in (gate, up, down))
    g, u = np.einsum("td,tkfd->tkf", x64, g64), np.einsum("td,tkfd->tkf", x64, u64)
    off_g, off_u = (np.einsum("td,tkfd->tkf", abs(x64), abs(w)) * 2 * UNIT for w in (g64, u64))
    g, clipped = np.minimum(g, LIMIT), np.clip(u, -LIMIT, LIMIT)
    silu = g / (1 + np.exp(-g))
    hidden = silu * clipped * share64[..., None]
    off = (1.1 * off_g * (abs(clipped) + off_u) + (abs(silu) + 1.1 * off_g) * off_u) * share64[..., None]
    off_y = np.einsum("tkf,tkdf->td", off + UNIT * (abs(hidden) + off), abs(d64))
    off_y += UNIT * np.einsum("tkf,tkdf->td", abs(hidden) + off, abs(d64))
    # A hundredth on top for the products of roundings and the sums in float32.
    return np.einsum("tkf,tkdf->td", hidden, d64), 1.01 * off_y


@functools.cache
def program(tile: GroupedTile, interpret: bool, max_values: int) -> Callable[..., jax.Array]:
    """One for each value that MAX_VALUES has in a test, since it is read while tracing."""
    assert max_values == experts_prefill.MAX_VALUES
    return jax.jit(functools.partial(experts_prefill.experts, limit=LIMIT, tile=tile, interpret=interpret))


def run(arguments: tuple, chosen: np.ndarray, *, tile: GroupedTile = SMALL, interpret: bool = True) -> np.ndarray:
    x, share, stacks = arguments
    return np.asarray(program(tile, interpret, experts_prefill.MAX_VALUES)(x, chosen, share, *stacks))


@pytest.mark.parametrize(
    ("gate", "down"),
    [pytest.param(*pair, id=name, marks=_marks(pair)) for pair, name in zip(PAIRS, IDS, strict=True)],
)
def test_the_reference(gate, down):
    arguments, chosen = case(gate, down), choice("spread")
    x, share, stacks = arguments
    wanted, off = expected(x, chosen, share, *stacks)
    found = run(arguments, chosen)
    assert (abs(found - wanted) <= off).all()
    # The bound holds for every possible rounding; those that happen mostly cancel.
    assert np.linalg.norm(found - wanted) <= 8 * UNIT * np.linalg.norm(wanted)


@pytest.mark.parametrize("name", ["one expert", pytest.param("twice", marks=pytest.mark.long)])
def test_uneven_choices_some_experts_at_a_time(name, monkeypatch):
    monkeypatch.setattr(experts_prefill, "MAX_VALUES", 256 * 256)
    arguments, chosen = case(Q8_0, Q8_0), choice(name)
    x, share, stacks = arguments
    wanted, off = expected(x, chosen, share, *stacks)
    found = run(arguments, chosen)
    assert (abs(found - wanted) <= off).all()
    assert_bits_equal(found, run(arguments, chosen))


def test_a_row_has_the_same_bits_in_other_company():
    arguments, chosen = case(Q8_0, Q8_0), choice("spread")
    x, share, stacks = arguments
    together, order = run(arguments, chosen), np.random.default_rng(1).permutation(12)
    shuffled = run((x[order], share[order], stacks), chosen[order])
    assert_bits_equal(shuffled, together[order])


def test_a_nan_stays_in_its_row():
    arguments, chosen = case(Q8_0, Q8_0), choice("spread")
    x, share, stacks = arguments
    holed = x.copy()
    holed[0, 100] = np.nan
    clean, poisoned = run(arguments, chosen), run((holed, share, stacks), chosen)
    assert np.isnan(poisoned[0]).all()
    assert_bits_equal(poisoned[1:], clean[1:])


def test_tiles_fit_into_shared_memory():
    assert len(set(TILES)) == 3
    assert [tile.shared_bytes <= limit << 10 for tile, limit in zip(TILES, (160, 160, 99), strict=True)] == [True] * 3


@pytest.mark.long
@pytest.mark.parametrize(
    ("tokens", "tile"), [(4096, TILES[0]), *(pytest.param(512, tile, marks=pytest.mark.slow) for tile in TILES[1:])]
)
@pytest.mark.parametrize(("gate", "down"), PAIRS, ids=IDS)
def test_v4_flash_lowers(gate, down, tokens, tile):
    call = jax.jit(functools.partial(experts_prefill.experts, limit=LIMIT, tile=tile))
    with jax.default_matmul_precision("highest"):
        text = lowered_for_cuda(call, *abstract_experts(gate, down, tokens))
    assert kernel_calls(text, GATE_UP) == kernel_calls(text, DOWN) == 1
    assert kernel_calls(text, f"{NAME}_{gate.__name__.lower()}") >= 1
    assert kernel_calls(text, f"{NAME}_{down.__name__.lower()}") >= 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize(("gate", "down"), PAIRS, ids=IDS)
def test_on_the_gpu(gate, down, name):
    arguments, chosen = case(gate, down, 512, 256), choice(name)
    x, share, stacks = arguments
    for weight in (stacks[0], stacks[2]):
        made = jax.jit(functools.partial(dequantise, count=EXPERTS - 1))(weight, jnp.int32(1))
        differ = np.asarray(made != as_float(weight, "bfloat16")[1:]).sum()
        assert not differ, f"{differ} of {made.size} weights of {type(weight).__name__} differ"
    wanted, off = expected(x, chosen, share, *stacks)
    for tile in TILES:
        found = run(arguments, chosen, tile=tile, interpret=False)
        rows = np.flatnonzero((abs(found - wanted) > off).any(axis=1) | np.isnan(found).any(axis=1))
        assert not rows.size, f"{gate.__name__} {down.__name__} {name} {tile}: rows {rows.tolist()} are off"
        again = run(arguments, chosen, tile=tile, interpret=False)
        assert (found.view(np.int32) == again.view(np.int32)).all(), f"{tile}: another run has other bits"

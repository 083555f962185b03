"""The hyper-connections' launches: against their meaning, over the number of rows, and lowered for V4-Flash."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.harness import Op, check_lowers, check_meaning, check_rows
from numerics import assert_bits_equal

from pallas_kernels.core.launch import launch
from pallas_kernels.core.norm import rms_norm
from pallas_kernels.formats import IQ2_XXS, Q2_K, Q4_K, Q8_0
from pallas_kernels.hyper_connections import decode as hc
from pallas_kernels.hyper_connections import meaning
from pallas_kernels.linear.lane_row import quantize_for

ROWS = 8
SETTINGS = {"eps": 1e-6, "norm_eps": 1e-6}
SINKHORN = 20
# Of a row's largest value; what is seen in interpret mode is a tenth.
CLOSE = 1e-5
ENTER, LEAVE = 24, 4
# Formats of an input's weights: in blocks of 32 alone, of two more orders, and of one.
FORMATS = {None: (Q8_0,), IQ2_XXS: (Q2_K, IQ2_XXS, Q2_K), Q4_K: (Q8_0, Q4_K)}


@functools.cache
def case(d: int, kind: int, dtype: str) -> dict[str, Any]:
    """Eight rows of streams, two outputs, and parameters with so many rows of fn."""
    draw = (np.float32(np.random.default_rng([d, i]).normal(size=size)) for i, size in enumerate([
        (ROWS, 4, d), (kind, 4 * d), kind, d, (2, ROWS, d), (ROWS, 4), (ROWS, 4, 4),
    ]))  # fmt: skip
    h, fn, base, weight, outputs, post, comb = draw
    comb = np.exp(comb)
    scale = np.float32([0.9, 0.7, 1.1][: 3 if kind == ENTER else 1])
    return {
        "state": (h, outputs[0], outputs[1], 1 + np.tanh(post), comb / comb.sum(1, keepdims=True)),
        "parameters": (np.float32(fn / np.sqrt(d)).astype(jnp.dtype(dtype)), scale, base, weight),
    }


@functools.partial(jax.jit, static_argnames=("format", "interpret"))
def call(h, ys, post, comb, parameters, format, interpret):
    options = {"outputs": ys, "post": post, "comb": comb, "interpret": interpret, **SETTINGS}
    if parameters[0].shape[0] == LEAVE:
        return dict(zip(("h", "x", "quantized"), hc.leave(h, *parameters, format=format or Q8_0, **options), strict=True))
    made = hc.enter(h, *parameters, formats=FORMATS[format], **options)
    part = hc.mixing_part(made, *parameters[1:3], iterations=SINKHORN, **SETTINGS)
    [(post, comb)] = launch([part], warps=1, interpret=interpret)
    arrays = {name: value for name, value in vars(made).items() if name != "orders"}
    return {**arrays, "post": post, "comb": comb}


def kernels(given: dict[str, Any], outputs: int, format: Any, *, interpret: bool = True) -> dict[str, Any]:
    """What `enter` or `leave`, whichever the parameters are for, makes of a case."""
    h, *ys, post, comb = given["state"]
    mixing = (post, comb) if outputs else (None, None)
    return call(h, tuple(ys[:outputs]), *mixing, given["parameters"], format, interpret)


@functools.partial(jax.jit, static_argnames="outputs")
def expected(state, parameters, outputs):
    h, *ys, post, comb = state
    fn, scale, base, weight = parameters
    with jax.default_matmul_precision("highest"):
        if outputs:
            h = meaning.write_back(sum(ys[1:outputs], start=ys[0]), h, post, comb)
        if fn.shape[0] == LEAVE:
            x = meaning.head(h, fn, scale, base, **SETTINGS)
            return {"h": h, "x": rms_norm(x, weight, SETTINGS["norm_eps"])}
        mixes = meaning.mixes(h, fn, SETTINGS["norm_eps"])
        pre, post, comb = meaning.split(mixes, scale, base, n=4, iterations=SINKHORN, eps=SETTINGS["eps"])
    x = rms_norm(meaning.collapse(h, pre), weight, SETTINGS["norm_eps"])
    return {"h": h, "post": post, "comb": comb, "x": x}


def op(given: dict[str, Any], outputs: int, format: Any) -> tuple[Op, tuple[np.ndarray, ...]]:
    """`enter` or `leave`, whichever the parameters are for, and its operands by row: streams, outputs, mixing."""

    def call(*state: np.ndarray, interpret: bool) -> dict[str, Any]:
        return kernels({**given, "state": state}, outputs, format, interpret=interpret)

    def means(*state: np.ndarray) -> dict[str, jax.Array]:
        return expected(state, given["parameters"], outputs)

    kind = given["parameters"][0].shape[0]
    names = ("h", "x") if kind == LEAVE else ("h", "post", "comb", "x")
    shown = f"{'leave' if kind == LEAVE else 'enter'} of {outputs} outputs, "
    state = given["state"]
    made = Op(shown, call, means, tuple(range(len(state))), CLOSE, compared=lambda made: {name: made[name] for name in names})
    return made, state


def check_blocks(given: dict[str, Any], outputs: int, format: Any, *, interpret: bool) -> None:
    """Quants, scales and sums are those of x in a launch of its own."""
    made = kernels(given, outputs, format, interpret=interpret)
    if "quantized_k" not in made:
        found, expected = made["quantized"], quantize_for(made["x"], format or Q8_0, interpret=interpret)
    else:
        orders = list(dict.fromkeys(one for one in FORMATS[format] if one is not Q8_0))
        found = [made["quantized"], *made["quantized_k"]]
        expected = [quantize_for(made["x"], one, interpret=interpret) for one in (Q8_0, *orders)]
    for array, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_bits_equal(array, want)


# What is compiled in interpret mode, which takes seconds: twelve slices, of which the second launch loads sixteen, and three
# blocks of 256. The tests below share these programs.
DRAFTING = {"given": case(768, ENTER, "float16"), "outputs": 2, "format": IQ2_XXS}
PLAIN = {"given": case(768, ENTER, "float32"), "outputs": 0, "format": Q4_K}
BARE = {"given": case(256, ENTER, "bfloat16"), "outputs": 1, "format": None}
HEAD = {"given": case(768, LEAVE, "float16"), "outputs": 2, "format": None}
PLAIN_HEAD = {"given": case(256, LEAVE, "float32"), "outputs": 0, "format": Q4_K}
NAMES = ["drafting", "plain", "bare", "head", "plain head"]
SOME = [
    pytest.param(program, marks=mark)
    for program, mark in ((DRAFTING, pytest.mark.long), (BARE, pytest.mark.slow), (PLAIN_HEAD, pytest.mark.slow))
]
ALL = pytest.mark.parametrize("programs", [SOME[0], PLAIN, SOME[1], HEAD, SOME[2]], ids=NAMES)


@ALL
def test_kernels_equal_the_meaning(programs):
    check_meaning(*op(**programs))


@ALL
def test_blocks_are_those_of_x(programs):
    check_blocks(**programs, interpret=True)


@pytest.mark.parametrize(("programs", "counts"), [(DRAFTING, (2, 3, 8)), (HEAD, (8,))], ids=["enter", "leave"])
@pytest.mark.long
def test_each_row_has_the_bits_of_the_row_alone(programs, counts):
    check_rows(*op(**programs), counts)


def test_streams_after_the_last_layer():
    h, *ys, post, comb = DRAFTING["given"]["state"]
    made = jax.jit(hc.write_back)(h, outputs=tuple(ys), post=post, comb=comb)
    np.testing.assert_allclose(made, meaning.write_back(ys[0] + ys[1], h, post, comb), rtol=CLOSE, atol=CLOSE)


def test_streams_that_cancel_stay_finite():
    """Equal and opposite streams: Σ preᵢ preⱼ hᵢ·hⱼ is a small difference of large numbers, and may come out below zero."""
    h, *state = PLAIN["given"]["state"]
    fn, scale, base, weight = PLAIN["given"]["parameters"]
    h = np.float32(1e3) * h
    h[:, 1], h[:, 3] = -h[:, 0], -h[:, 2]
    given = {"state": (h, *state), "parameters": (fn, np.zeros_like(scale), np.zeros_like(base), weight)}
    assert np.isfinite(kernels(**PLAIN | {"given": given})["x"]).all()


@pytest.mark.parametrize("change", [{"h": np.zeros(shape, np.float32)} for shape in ((1, 4, 96), (1, 2, 512), (1, 4, 512))])
def test_shapes_that_do_not_fit_are_named(change):
    fn, scale, base, weight = case(256, ENTER, "float32")["parameters"]
    arguments = {**SETTINGS, **change}
    with pytest.raises(ValueError, match=r"h is .* and fn \[24, 1024\]"):
        hc.enter(fn=fn, scale=scale, base=base, norm_weight=weight, **arguments)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "m", "outputs", "dtype", "format"),
    [
        (ENTER, 1, 0, "float16", None),
        (ENTER, 3, 1, "float32", Q4_K),
        (ENTER, 8, 2, "float16", IQ2_XXS),
        (LEAVE, 1, 0, "float32", Q4_K),
        (LEAVE, 8, 2, "float16", None),
    ],
)
def test_lowers_for_v4_flash(kind, m, outputs, dtype, format):
    def array(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    d = 4096
    mixing = (array(m, 4), array(m, 4, 4)) if outputs else (None, None)
    parameters = (array(kind, 4 * d, dtype=dtype), array(3 if kind == ENTER else 1), array(kind), array(d))
    operands = array(m, 4, d), (array(m, d),) * outputs, *mixing, parameters
    calls = {hc.MIX: 1, hc.ENTER: 1, hc.SINKHORN: int(kind == ENTER)}
    check_lowers(call, operands, calls, format=format, interpret=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("d", [256, 768, 4096])
@pytest.mark.parametrize(
    ("kind", "format"),
    [(ENTER, None), (ENTER, IQ2_XXS), (ENTER, Q4_K), (LEAVE, None), (LEAVE, Q4_K)],
    ids=["enter", "iq2", "q4", "leave", "leave q4"],
)
def test_on_a_gpu(kind, format, d, dtype):
    for outputs in (0, 1, 2):
        programs = {"given": case(d, kind, dtype), "outputs": outputs, "format": format}
        check_meaning(*op(**programs), interpret=False)
        check_blocks(**programs, interpret=False)
        check_rows(*op(**programs), (2, 3, 4, 8), interpret=False)

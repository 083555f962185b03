"""The hyper-connections' launches: against the reference and the model, over the number of rows, and lowered for V4-Flash."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import kernel_calls, lowered_for_cuda
from numerics import assert_bits_equal, golden_config

from ds4jax.model import hyper_connections as model
from ds4jax.model.layers import rms_scale
from pallas_kernels import activation, activation_k, hyper_reference
from pallas_kernels import hyper_connections as hc
from pallas_kernels.bundle import launch
from pallas_kernels.formats import IQ2_XXS, Q4_K

ROWS = 8
SETTINGS = {"eps": 1e-6, "norm_eps": 1e-6}
SINKHORN = 20
# Of a row's largest value; what is seen in interpret mode is a tenth.
CLOSE = 1e-5
ENTER, LEAVE = 24, 4


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
        return dict(zip(("h", "x", "quantized"), hc.leave(h, *parameters, **options), strict=True))
    made = hc.enter(h, *parameters, format=format, **options)
    part = hc.mixing_part(made, *parameters[1:3], iterations=SINKHORN, **SETTINGS)
    [(post, comb)] = launch([part], warps=1, interpret=interpret)
    return {**vars(made), "post": post, "comb": comb}


def kernels(
    given: dict[str, Any], outputs: int, format: Any, *, rows: slice = slice(None), interpret: bool = True
) -> dict[str, Any]:
    """What `enter` or `leave`, whichever the parameters are for, makes of some of a case's rows."""
    h, *ys, post, comb = (array[rows] for array in given["state"])
    mixing = (post, comb) if outputs else (None, None)
    return call(h, tuple(ys[:outputs]), *mixing, given["parameters"], format, interpret)


@functools.partial(jax.jit, static_argnames="outputs")
def reference(state, parameters, outputs):
    h, *ys, post, comb = state
    if outputs:
        h = hyper_reference.written(h, outputs=tuple(ys[:outputs]), post=post, comb=comb)
    if parameters[0].shape[0] == LEAVE:
        return {"h": h, "x": hyper_reference.leave(h, *parameters, **SETTINGS)}
    made = hyper_reference.enter(h, *parameters, iterations=SINKHORN, **SETTINGS)
    return {"h": h, **dict(zip(("post", "comb", "x"), made, strict=True))}


def check(given: dict[str, Any], outputs: int, format: Any, *, interpret: bool) -> None:
    made = kernels(given, outputs, format, interpret=interpret)
    for name, want in reference(given["state"], given["parameters"], outputs).items():
        array, want = np.asarray(made[name]), np.asarray(want)
        assert array.shape == want.shape
        rows = np.abs(array - want).reshape(ROWS, -1).max(1) / np.abs(want).reshape(ROWS, -1).max(1)
        assert (rows <= CLOSE).all(), f"{name} of {array.shape}, {outputs} outputs: relative error of the rows {rows}"


def check_rows(given: dict[str, Any], outputs: int, format: Any, *, counts: tuple[int, ...], interpret: bool) -> None:
    def parts(rows: slice) -> list[Any]:
        made = kernels(given, outputs, format, rows=rows, interpret=interpret)
        return jax.tree_util.tree_leaves_with_path(jax.tree.map(np.asarray, made))

    alone = [parts(slice(m, m + 1)) for m in range(max(counts))]
    for count in counts:
        for i, (path, array) in enumerate(parts(slice(count))):
            differing = [m for m in range(count) if array[m].tobytes() != alone[m][i][1][0].tobytes()]
            name = f"{jax.tree_util.keystr(path)} of {array.shape}, {outputs} outputs"
            assert not differing, f"{name}: rows {differing} of {count} differ from the same rows alone"


def check_blocks(given: dict[str, Any], outputs: int, format: Any, *, interpret: bool) -> None:
    """Quants, scales and sums are those of x in a launch of its own."""
    made = kernels(given, outputs, format, interpret=interpret)
    found, expected = [made["quantized"]], [activation.quantize(made["x"], interpret=interpret)]
    if format:
        found, expected = (
            [*found, made["quantized_k"]],
            [*expected, activation_k.quantize_k(made["x"], format, interpret=interpret)],
        )
    for array, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_bits_equal(array, want)


# What is compiled in interpret mode, which takes seconds: twelve slices, of which the second launch loads sixteen, and three
# blocks of 256. The tests below share these programs.
DRAFTING = {"given": case(768, ENTER, "float16"), "outputs": 2, "format": IQ2_XXS}
PLAIN = {"given": case(768, ENTER, "float32"), "outputs": 0, "format": Q4_K}
BARE = {"given": case(256, ENTER, "bfloat16"), "outputs": 1, "format": None}
HEAD = {"given": case(768, LEAVE, "float16"), "outputs": 2, "format": None}
PLAIN_HEAD = {"given": case(256, LEAVE, "float32"), "outputs": 0, "format": None}
NAMES = ["drafting", "plain", "bare", "head", "plain head"]
ALL = pytest.mark.parametrize("programs", [DRAFTING, PLAIN, BARE, HEAD, PLAIN_HEAD], ids=NAMES)


@ALL
def test_kernels_equal_the_reference(programs):
    check(**programs, interpret=True)


@ALL
def test_blocks_are_those_of_x(programs):
    check_blocks(**programs, interpret=True)


@pytest.mark.parametrize(("programs", "counts"), [(DRAFTING, (2, 3, 8)), (HEAD, (8,))], ids=["enter", "leave"])
@pytest.mark.long
def test_each_row_has_the_bits_of_the_row_alone(programs, counts):
    check_rows(**programs, counts=counts, interpret=True)


@pytest.mark.long
def test_the_kernels_are_the_model():
    config = golden_config()
    made = kernels(**DRAFTING)
    h, first, second, post, comb = DRAFTING["given"]["state"]

    @jax.jit
    def by_the_model(h, first, second, post, comb, parameters):
        fn, scale, base, weight = parameters
        h = model.expand(first + second, h, post, comb)
        pre, post, comb = model.split(model.mixes(h, fn, 1e-6), scale, base, config)
        x = model.collapse(h, pre)
        return {"h": h, "post": post, "comb": comb, "x": x * rms_scale(x, 1e-6) * weight}

    expected = by_the_model(h, first, second, post, comb, DRAFTING["given"]["parameters"])
    alone = jax.jit(hc.expand)(h, outputs=(first, second), post=post, comb=comb)
    np.testing.assert_allclose(alone, expected["h"], rtol=CLOSE, atol=CLOSE)
    assert (config.hc_iters, config.hc_eps) == (SINKHORN, SETTINGS["eps"])
    for name, want in expected.items():
        np.testing.assert_allclose(made[name], want, rtol=CLOSE, atol=CLOSE, err_msg=name)


def test_the_kernels_are_the_models_head():
    config = dataclasses.replace(golden_config(), norm_eps=1e-6)

    @jax.jit
    def by_the_model(h, fn, scale, base, weight):
        x = model.head(h, fn, scale, base, config)
        return x * rms_scale(x, 1e-6) * weight

    expected = by_the_model(PLAIN_HEAD["given"]["state"][0], *PLAIN_HEAD["given"]["parameters"])
    np.testing.assert_allclose(kernels(**PLAIN_HEAD)["x"], expected, rtol=CLOSE, atol=CLOSE)


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


@pytest.mark.parametrize(
    ("kind", "m", "outputs", "dtype", "format"),
    [
        (ENTER, 1, 0, "float16", None),
        (ENTER, 3, 1, "float32", Q4_K),
        (ENTER, 8, 2, "float16", IQ2_XXS),
        (LEAVE, 1, 0, "float32", None),
        (LEAVE, 8, 2, "float16", None),
    ],
)
def test_lowers_for_v4_flash(kind, m, outputs, dtype, format):
    def array(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    d = 4096
    mixing = (array(m, 4), array(m, 4, 4)) if outputs else (None, None)
    parameters = (array(kind, 4 * d, dtype=dtype), array(3 if kind == ENTER else 1), array(kind), array(d))
    text = lowered_for_cuda(call, array(m, 4, d), (array(m, d),) * outputs, *mixing, parameters, format, interpret=False)
    assert kernel_calls(text, hc.MIX) == 1
    assert kernel_calls(text, hc.ENTER) == 1
    assert kernel_calls(text, hc.SINKHORN) == int(kind == ENTER)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("d", [256, 768, 4096])
@pytest.mark.parametrize(
    ("kind", "format"), [(ENTER, None), (ENTER, IQ2_XXS), (ENTER, Q4_K), (LEAVE, None)], ids=["enter", "iq2", "q4", "leave"]
)
def test_on_a_gpu(kind, format, d, dtype):
    for outputs in (0, 1, 2):
        programs = {"given": case(d, kind, dtype), "outputs": outputs, "format": format}
        check(**programs, interpret=False)
        check_blocks(**programs, interpret=False)
        check_rows(**programs, counts=(2, 3, 4, 8), interpret=False)

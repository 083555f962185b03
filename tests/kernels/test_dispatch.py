"""The gate: which path, with which reason, and proof in the lowered program that the kernel runs where it should."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import executed_calls, kernel_calls, lowered_for_cuda, pallas_calls
from flax import nnx
from jax.typing import DTypeLike
from numerics import assert_bits_equal
from quantized import as_float, random_blocks

import ds4jax
from ds4jax.cache import state as caches
from ds4jax.decode import loop as decode
from ds4jax.decode.depth import Policy
from ds4jax.decode.drafters.mtp import MTPDrafter
from ds4jax.decode.loop import Limits
from ds4jax.decode.sampling import Filters, Sampling
from ds4jax.decode.scoring import extend
from ds4jax.model.moe import Experts
from ds4jax.random_models.layouts import SMALL_Q2
from pallas_kernels import ops
from pallas_kernels.attention import prefill as attention_prefill
from pallas_kernels.core.dispatch import DECODE_ROWS, OPT_OUT, Choice, choose
from pallas_kernels.core.limits import MAX_ROWS
from pallas_kernels.experts import prefill as experts_prefill
from pallas_kernels.formats import BLOCK, IQ2_XXS, Q2_K, Q4_K, Q8_0
from pallas_kernels.linear.q8_matmul import NAME

matmul = jax.jit(ops.matmul, static_argnames="strict")

# Per layer: q_a + kv, q_b, o_a, o_b, shared gate + up, shared down.
CALLS_A_LAYER = 6
# A format without a kernel.
NO_KERNEL = type("Plain", (Q4_K,), {})


@pytest.fixture(scope="module")
def model() -> ds4jax.LanguageModel:
    return ds4jax.load()


def decode_step(model: ds4jax.LanguageModel, *, strict: bool, max_draft: int = 0) -> str:
    """The compiled loop's program for CUDA."""
    drafter = MTPDrafter() if max_draft else None

    def inputs() -> tuple:
        state = decode.start(model.config, 512, [0], drafter=drafter, max_draft=max_draft)
        limits = Limits.of([1], [1], [[0]])
        return state, limits, Filters.of([Sampling()]), Policy(jnp.zeros(1, jnp.int32), jnp.ones(1 + max_draft, jnp.float32))

    arguments = (model.graph, model.weights, *jax.eval_shape(inputs))

    # A function of its own: the gate is read while tracing, and a cached trace would hide what the environment says now.
    def fresh(*arguments, **options):
        return decode.run.__wrapped__.__wrapped__(*arguments, **options)

    jitted = jax.jit(fresh, static_argnums=0, static_argnames=("strict", "drafter", "max_draft"))
    return lowered_for_cuda(jitted, *arguments, strict=strict, drafter=drafter, max_draft=max_draft)


def dense_shapes(model: ds4jax.LanguageModel) -> set[tuple[int, ...]]:
    """Shapes of the Q8_0 matrices that are no expert stacks; those are multiplied out for the chosen experts alone."""
    leaves = jax.tree.leaves(model.weights, is_leaf=lambda leaf: isinstance(leaf, Q8_0))
    return {leaf.shape for leaf in leaves if isinstance(leaf, Q8_0) and len(leaf.shape) == 2}


def multiplied_out(text: str) -> set[tuple[int, ...]]:
    """Shapes [N, K] of the Q8_0 matrices whose words a lowered program takes apart; stacks of experts have more axes."""
    blocks = re.findall(r"bitcast_convert .*-> tensor<(\d+)x(\d+)x2x4x4xi8>", text)
    return {(int(n), int(count) * BLOCK) for n, count in blocks}


def test_the_kernel_runs_in_the_decode_step(model):
    text = decode_step(model, strict=False)
    assert executed_calls(text, NAME) == CALLS_A_LAYER * model.config.n_layers + 1
    # The head's input comes quantised out of the hyper-connections before it.
    assert executed_calls(text, "q8_activation") == CALLS_A_LAYER * model.config.n_layers
    assert not multiplied_out(text) & dense_shapes(model), "a product reads a dequantised weight"


@pytest.mark.long
@pytest.mark.parametrize("max_draft", [1, 3])
def test_the_kernel_runs_in_draft_verify_and_commit(model, max_draft):
    """One program holds the target, the block over what was committed, and each draft."""
    text = decode_step(model, strict=False, max_draft=max_draft)
    target = CALLS_A_LAYER * model.config.n_layers + 1
    # The block is a layer, e_proj, and h_proj with a row for each stream, at most eight rows a launch.
    committed = CALLS_A_LAYER + 1 + math.ceil(model.config.hc_mult * (1 + max_draft) / MAX_ROWS)
    # The first draft needs the head alone; those after it are a loop over block and head.
    deeper = (CALLS_A_LAYER + 2 + 1) * (max_draft > 1)
    assert executed_calls(text, NAME) == target + committed + 1 + deeper
    assert not multiplied_out(text) & dense_shapes(model), "a product reads a dequantised weight"


@pytest.mark.long
@pytest.mark.parametrize("max_draft", [0, 2])
def test_strict_has_no_pallas_kernel_at_all(model, max_draft):
    text = decode_step(model, strict=True, max_draft=max_draft)
    assert pallas_calls(text) == 0
    assert dense_shapes(model) <= multiplied_out(text), "every weight is multiplied out"


def test_the_opt_out_flips_it(model, monkeypatch):
    monkeypatch.setenv(OPT_OUT, "1")
    assert pallas_calls(decode_step(model, strict=False)) == 0


def test_prefill_of_many_rows_takes_the_library_product(model):
    cache = jax.eval_shape(lambda: caches.empty(model.config, 512))
    ids, count = np.zeros(128, np.int32), np.int32(128)
    arguments = (model.graph, model.weights, cache, None, ids, ids, count, count)
    text = lowered_for_cuda(extend.__wrapped__, *arguments, strict=False, want_logits=False)
    assert executed_calls(text, NAME) == 0
    # Nobody wants the streams after the last layer, of which only the cache is kept.
    assert executed_calls(text, attention_prefill.NAME) == model.config.n_layers - 1


@pytest.mark.parametrize(
    ("rows", "format", "strict", "implementation", "cuda", "default", "reason"),
    [
        (1, Q8_0, False, None, "pallas", "xla", "Q8_0"),
        (DECODE_ROWS, Q8_0, False, None, "pallas", "xla", "Q8_0"),
        (DECODE_ROWS + 1, Q8_0, False, None, "bfloat16", "dot", "rows"),
        (DECODE_ROWS + 1, Q8_0, True, None, "dot", "dot", "strict"),
        (1, Q4_K, False, None, "pallas", "xla", "Q4_K, at most 32 rows"),
        (1, NO_KERNEL, False, None, "xla", "xla", "Plain has no kernel"),
        (DECODE_ROWS + 1, NO_KERNEL, False, None, "bfloat16", "dot", "Plain, more than 32 rows"),
        (1, NO_KERNEL, True, None, "dot", "dot", "strict"),
        (DECODE_ROWS + 1, None, False, None, "dot", "dot", "float"),
        (1, None, False, None, "dot", "dot", "float"),
        (1, Q8_0, True, None, "dot", "dot", "strict"),
        (4, Q8_0, False, "pallas", "pallas", "pallas", "asked"),
        (4, Q8_0, False, "interpret", "interpret", "interpret", "asked"),
        (4, Q8_0, False, "xla", "xla", "xla", "asked"),
        (4, Q8_0, True, "xla", "dot", "dot", "asked"),
        (4, None, False, "xla", "dot", "dot", "asked"),
    ],
)
def test_choices(rows, format, strict, implementation, cuda, default, reason):
    choice = choose(rows, format, strict=strict, implementation=implementation)
    assert (choice.cuda, choice.default) == (cuda, default)
    assert reason in choice.reason


@pytest.mark.parametrize(
    ("format", "cuda", "default", "reason"),
    [
        (Q8_0, "pallas", "xla", "Q8_0, a decode step"),
        (NO_KERNEL, "xla", "xla", "Plain has no kernel, a decode step"),
        (None, "dot", "dot", "float weights"),
    ],
)
def test_many_rows_of_a_decode_step_take_the_path_of_one(format, cuda, default, reason):
    assert choose(DECODE_ROWS + 1, format, strict=False, decoding=True) == Choice(cuda, default, reason)
    assert choose(DECODE_ROWS + 1, None, half=True, strict=False, decoding=True).cuda == "dot"


@pytest.mark.parametrize(("rows", "strict", "cuda"), [(33, False, "three bfloat16"), (32, False, "dot"), (33, True, "dot")])
def test_choices_of_half_floats(rows, strict, cuda):
    choice = choose(rows, None, half=True, strict=strict)
    assert (choice.cuda, choice.default) == (cuda, "dot")


@pytest.mark.parametrize(("rows", "path"), [(1, "xla"), (DECODE_ROWS + 1, "dot")])
def test_the_opt_out_is_a_reason(monkeypatch, rows, path):
    monkeypatch.setenv(OPT_OUT, "1")
    assert choose(rows, Q8_0, strict=False) == Choice(path, path, f"{OPT_OUT}=1")


def ones(*shape: int, dtype: DTypeLike = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def weight(n: int = 8, k: int = 64) -> Q8_0:
    return Q8_0.quantize(np.ones((n, k)))


@pytest.mark.parametrize(
    ("x", "w", "options", "said"),
    [
        (ones(2, 32), weight(), {}, "weight"),
        (ones(64), weight(), {}, "x is"),
        (ones(0, 64), weight(), {}, "x is"),
        (ones(2, 64, dtype=jnp.bfloat16), weight(), {}, "x is"),
        (ones(2, 64, dtype=np.int32), weight(), {}, "x is"),
        (ones(2, 64), ones(8, 2, 64), {}, "weight"),
        (ones(2, 64), weight(), {"implementation": "cuda"}, "implementation"),
        (ones(2, 64), ones(8, 64), {"implementation": "pallas"}, "implementation"),
        (ones(40, 64), weight(), {"implementation": "interpret"}, "implementation"),
        (ones(2, 64), weight(), {"implementation": "pallas", "strict": True}, "implementation"),
    ],
)
def test_bad_arguments_are_named(x, w, options, said):
    with pytest.raises(ValueError, match=said):
        ops.matmul(x, w, **({"strict": False} | options))


def test_bad_groups():
    with pytest.raises(ValueError, match="groups"):
        ops.grouped_matmul(ones(1, 3, 64), weight(8), strict=False)
    with pytest.raises(ValueError, match="x is"):
        ops.grouped_matmul(ones(3, 64), weight(9), strict=False)


@pytest.mark.parametrize("shape", [(8, 33), (8,), (4, 48)])
def test_quantize_needs_whole_blocks(shape):
    with pytest.raises(ValueError, match="weight"):
        Q8_0.quantize(np.ones(shape))


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 20, 40])
def test_strict_is_the_float_product(rows):
    w = Q8_0.quantize(np.random.default_rng(0).normal(size=(48, 64)))
    x = normal(1, rows, 64)
    expected = np.asarray(x, np.float64) @ np.asarray(as_float(w), np.float64).T
    np.testing.assert_allclose(matmul(x, w, strict=True), expected, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 8, 40])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_a_narrow_float_weight_is_widened_before_the_product(dtype, strict, rows):
    w, x = normal(1, 24, 64).astype(dtype), normal(0, rows, 64)
    found = matmul(x, w, strict=strict)
    assert_bits_equal(found, matmul(x, w.astype(np.float32), strict=strict))
    np.testing.assert_allclose(found, x.astype(np.float64) @ w.astype(np.float64).T, atol=1e-5)


def test_a_large_weight_is_multiplied_out_in_tiles(monkeypatch):
    monkeypatch.setattr(ops, "MAX_TILE_VALUES", 64 * 12)
    w = Q8_0.quantize(np.random.default_rng(0).normal(size=(48, 64)))
    x = normal(1, DECODE_ROWS + 8, 64)
    expected = np.asarray(x, np.float64) @ np.asarray(as_float(w), np.float64).T
    # Jitted here, since the bound is read while tracing.
    tiled = jax.jit(lambda x, w: ops.matmul(x, w, strict=False))
    np.testing.assert_allclose(tiled(x, w), expected, atol=1e-4)


def dots(text: str) -> set[tuple[str, str]]:
    """Operand type and precision of a lowered program's products."""
    found = re.findall(r"dot_general (.*?) : \(tensor<[^>]*x(\w+)>", text)
    assert found
    names = {"HIGHEST": "HIGHEST", "num_primitive_operations = 3": "THREE"}
    return {(dtype, next((told for name, told in names.items() if name in options), "DEFAULT")) for options, dtype in found}


@pytest.mark.parametrize("strict", [False, True])
def test_many_rows_take_the_tensor_cores_with_narrow_weights_only(strict):
    x, call = jax.ShapeDtypeStruct((DECODE_ROWS + 8, 64), "float32"), jax.jit(functools.partial(ops.matmul, strict=strict))
    quantised = jax.eval_shape(lambda: Q8_0.split(jnp.zeros((8, 2, 34), jnp.uint8)))
    with jax.default_matmul_precision("highest"):
        assert dots(lowered_for_cuda(call, x, quantised)) == {("f32", "HIGHEST") if strict else ("bf16", "DEFAULT")}
        for dtype in ("float16", "bfloat16", "float32"):
            way = "HIGHEST" if strict or dtype == "float32" else "THREE"
            assert dots(lowered_for_cuda(call, x, jax.ShapeDtypeStruct((8, 64), dtype))) == {("f32", way)}
        assert dots(call.lower(x, quantised).as_text()) == {("f32", "HIGHEST")}, "a CPU keeps float32"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_a_product_of_sums_of_two_bfloat16_on_a_gpu(dtype):
    """Of each operand sixteen digits are kept, and of their product what two small parts make is left out."""
    w, x = normal(1, 256, 1024).astype(dtype), normal(0, 512, 1024)
    found = np.asarray(matmul(x, w, strict=False))
    wide, x = np.asarray(w, np.float64), np.asarray(x, np.float64)
    assert (abs(found - x @ wide.T) <= 4 * 2.0**-17 * (abs(x) @ abs(wide).T)).all()


@pytest.mark.parametrize("groups", [1, 3])
def test_a_product_in_bfloat16(monkeypatch, groups):
    monkeypatch.setattr(ops, "MAX_TILE_VALUES", 64 * 12)
    w = Q8_0.quantize(np.random.default_rng(0).normal(size=(48, 64)))
    x = normal(1, DECODE_ROWS + 8, groups, 64)
    found = np.asarray(jax.jit(lambda x, w: ops._narrow_dots(x, (w,))[0])(x, w))
    wide = np.asarray(as_float(w), np.float64).reshape(groups, -1, 64)
    expected, terms = (np.einsum("mck,cnk->mcn", a, b) for a, b in ((np.asarray(x, np.float64), wide), (abs(x), abs(wide))))
    # Each factor is rounded to eight digits; a hundredth on top for the product of both errors and the sums in float32.
    assert (abs(found - expected) <= 1.01 * 2 * 2.0**-9 * terms).all()


def experts(form: str) -> tuple[Experts, tuple[jax.ShapeDtypeStruct, ...]]:
    """Experts of 256 by 256 with weights of a type, and abstract rows, choices and weights of a prefill."""
    config = dataclasses.replace(SMALL_Q2, dim=256, moe_dim=256)
    made = nnx.eval_shape(lambda: Experts(config, rngs=nnx.Rngs(0)))
    for seed, (name, one) in enumerate((("w1", made.w1), ("w2", made.w2), ("w3", made.w3))):
        shape, format = one.weight.get_value().shape, Q2_K if name == "w2" else IQ2_XXS
        if form == "unlike" and name == "w3":
            format = Q4_K
        one.weight.set_value(normal(seed, *shape) if form == "float" else format.from_bytes(random_blocks(format, shape)))
    rows = [((64, 256), "float32"), ((64, 2), "int32"), ((64, 2), "float32")]
    return made, tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in rows)


@pytest.mark.parametrize(("device", "stored"), [("NVIDIA H200", 2), ("NVIDIA A100-SXM4-80GB", 0)])
def test_experts_of_many_rows_are_read_as_stored_on_hopper(monkeypatch, device, stored):
    made, arguments = experts("quantised")
    monkeypatch.setattr(jax, "devices", lambda *_: [types.SimpleNamespace(device_kind=device, core_count=132)])
    text = lowered_for_cuda(jax.jit(made), *arguments)
    assert text.count("custom_call @mosaic_gpu") == stored
    assert kernel_calls(text, experts_prefill.GATE_UP) == (0 if stored else 1)


@pytest.mark.parametrize(
    ("form", "strict", "opt_out", "grouped"),
    [
        ("quantised", False, "0", 1),
        ("unlike", False, "0", 1),
        ("quantised", True, "0", 0),
        ("quantised", False, "1", 0),
        ("float", False, "0", 0),
    ],
)
def test_experts_of_many_rows_are_grouped(monkeypatch, form, strict, opt_out, grouped):
    monkeypatch.setenv(OPT_OUT, opt_out)
    made, arguments = experts(form)
    jitted = jax.jit(functools.partial(made, strict=strict))
    text = lowered_for_cuda(jitted, *arguments)
    assert kernel_calls(text, experts_prefill.GATE_UP) == kernel_calls(text, experts_prefill.DOWN) == grouped
    assert pallas_calls(jitted.lower(*arguments).as_text()) == 0

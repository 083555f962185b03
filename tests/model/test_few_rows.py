"""The layers of a decode step by kernels: equal to the modules, chosen when they should be, and counted in the lowered step."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import executed_calls, kernel_calls, lowered_for_cuda, pallas_calls
from flax import nnx
from numerics import assert_bits_equal

from ds4jax import cache as caches
from ds4jax import decode
from ds4jax.bench import synthetic
from ds4jax.bench.programs import randomised
from ds4jax.cache import LayerCache, Rows
from ds4jax.config import Config
from ds4jax.decode import Limits
from ds4jax.depth import Policy
from ds4jax.drafter import MTPDrafter
from ds4jax.model import few_rows
from ds4jax.model.block import Block
from ds4jax.model.parameters import build
from ds4jax.model.transformer import Transformer
from ds4jax.sampling import Sampling
from pallas_kernels import attention, compressor, expert_matmul, float_matmul, hyper_connections, indexer, latent, router, swiglu
from pallas_kernels.dispatch import OPT_OUT
from pallas_kernels.formats import Q8_0
from pallas_kernels.narrow import NarrowKeys, NarrowRows, expanded
from pallas_kernels.q8_matmul import NAME as SHARE_WARP

# One layer of each kind; the first chooses its experts by token.
KINDS = dataclasses.replace(synthetic.SMALL_Q2, n_layers=3, n_hash_layers=1, compress_ratios=(0, 4, 128, 0))
# Of the largest value: seen are sums in another order, and no value that rounds to the other side.
CLOSE = 3e-6


def assert_close(made: jax.Array, expected: jax.Array, name: str) -> None:
    np.testing.assert_allclose(made, expected, rtol=0, atol=CLOSE * float(jnp.abs(expected).max()), err_msg=name)


@pytest.mark.long
@pytest.mark.parametrize("part", ["layers", "mtp"])
def test_kernels_equal_the_modules(part):
    """Two live rows and a clone; the first closes a block of each ratio, and sixty-four are seen where eight are chosen."""
    model = synthetic.synthetic(synthetic.checkpoint(KINDS, "small-q2"))
    blocks = list(model.layers if part == "layers" else model.mtp)
    rows, ids = Rows.following(jnp.int32(255), 3, 2), jnp.array([3, 77, 77], jnp.int32)
    held = caches.empty(KINDS, 512, slack=3).layers if part == "layers" else (caches.empty_mtp(KINDS, 512, slack=3),)
    held = randomised(held, part)
    h_TND = synthetic.spread_numbers((3, KINDS.hc_mult, KINDS.dim), jnp.dtype("float32"), 1.0, jnp.uint32(5))
    h_TND = h_TND.at[2].set(h_TND[1])

    @jax.jit
    def modules(h_TND: jax.Array, held: tuple[LayerCache, ...]) -> Any:
        done = []
        for block, cache in zip(blocks, held, strict=True):
            h_TND, cache = block(h_TND, ids, rows, cache)
            done.append(cache)
        return h_TND, tuple(done)

    assert few_rows.serves(KINDS, blocks, rows, few_rows.room(KINDS, held))
    with jax.default_matmul_precision("highest"):
        streams, made = few_rows.layers(KINDS, blocks, h_TND, ids, rows, held, interpret=True)
        expected, expected_caches = modules(h_TND, held)
    assert_close(streams, expected, "streams")
    assert jax.tree.structure(made) == jax.tree.structure(expected_caches)
    for (path, array), want in zip(jax.tree_util.tree_leaves_with_path(made), jax.tree.leaves(expected_caches), strict=True):
        assert_close(array, want, f"cache {jax.tree_util.keystr(path)}")


def widened(tree: Any) -> Any:
    """Narrow rows and keys as float32."""
    return jax.tree.map(lambda leaf: jax.jit(expanded)(leaf) if is_narrow(leaf) else leaf, tree, is_leaf=is_narrow)


def is_narrow(node: Any) -> bool:
    return isinstance(node, NarrowRows | NarrowKeys)


@pytest.mark.slow
def test_kernels_of_a_narrow_cache_have_the_same_bits():
    """A layer with compressed rows and an indexer that closes a block of each; the caches agree too, array by array."""
    config = dataclasses.replace(KINDS, cache="narrow", n_layers=1, n_hash_layers=0, compress_ratios=(4, 0))
    rows, ids = Rows.following(jnp.int32(255), 2, 2), jnp.array([3, 77], jnp.int32)
    held = randomised(caches.empty(config, 512, slack=2).layers, "narrow")
    h_TND = synthetic.spread_numbers((2, config.hc_mult, config.dim), jnp.dtype("float32"), 1.0, jnp.uint32(5))
    found = []
    for kind, cache in (("narrow", held), ("float32", widened(held))):
        config = dataclasses.replace(config, cache=kind)
        model = synthetic.synthetic(synthetic.checkpoint(config, "small-q2"))
        assert few_rows.serves(config, list(model.layers), rows, few_rows.room(config, cache))
        found.append(few_rows.layers(config, list(model.layers), h_TND, ids, rows, cache, interpret=True))
    (streams, made), (expected, expected_caches) = found
    assert sum(map(is_narrow, jax.tree.leaves(made, is_leaf=is_narrow))) == 2
    assert_bits_equal(streams, expected)
    for array, want in zip(jax.tree.leaves(widened(made)), jax.tree.leaves(expected_caches), strict=True):
        assert_bits_equal(array, want)


@functools.cache
def abstract(config: Config = synthetic.SMALL_Q2) -> Transformer:
    """The model with shapes and types for values."""
    tensors = synthetic.checkpoint(config, "small-q2").tensors
    return build(config, ((tensor.name, jax.eval_shape(tensor.read)) for tensor in tensors))


ROWS = Rows.following(jnp.int32(0), 3, 3)
SEQUENCES = dataclasses.replace(ROWS, start=jnp.zeros(2, jnp.int32), end=jnp.ones(2, jnp.int32))


@pytest.mark.parametrize(
    ("rows", "served"),
    [
        (ROWS, True),
        (Rows.following(jnp.int32(0), few_rows.MOST_ROWS, 1), True),
        (Rows.following(jnp.int32(0), few_rows.MOST_ROWS + 1, 1), False),
        (dataclasses.replace(ROWS, strict=True), False),
        (SEQUENCES, False),
    ],
    ids=["three rows", "eight rows", "nine rows", "strict", "two sequences"],
)
def test_few_rows_of_one_sequence_are_served(rows, served):
    model = abstract(KINDS)
    assert few_rows.serves(KINDS, [*model.layers, *model.mtp], rows, few_rows.MOST_ROWS) is served
    if rows.start.shape[0] == 1:
        head = model.head.weight.get_value()
        assert few_rows.scores(KINDS, head, rows.position.shape[0], strict=rows.strict) is served


@pytest.mark.parametrize(("slack", "ring", "served"), [(3, True, True), (2, True, False), (3, False, False)])
def test_rings_have_room_for_the_rows(slack, ring, served):
    model, held = abstract(KINDS), caches.empty(KINDS, 64, slack=slack, ring=ring).layers
    assert few_rows.serves(KINDS, list(model.layers), ROWS, few_rows.room(KINDS, held)) is served


def number(*shape: int, dtype: Any = jnp.float16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


EXPERTS = number(8, 256, 256)
STORED = jax.eval_shape(functools.partial(synthetic._blocks, Q8_0, (256, 256), 1.0), jax.ShapeDtypeStruct((), jnp.uint32))
REASONS = {
    "width": ({"dim": 768}, {}, "a width is not a power of two"),
    "streams": ({"hc_mult": 2}, {}, "a width is not a power of two"),
    "narrow": ({"dim": 128}, {}, "a width is smaller than a block"),
    "dense": ({}, {"attn.wq_b": number(512, 64)}, "a dense weight is not Q8_0"),
    "shared": ({}, {"ffn.shared_experts.w2": number(256, 256)}, "a dense weight is not Q8_0"),
    "experts": ({}, {"ffn.experts.w2": EXPERTS}, "an expert weight is not quantised"),
    "all experts": ({}, {f"ffn.experts.w{i}": EXPERTS for i in (1, 2, 3)}, "an expert weight is not quantised"),
    "compressor": ({}, {"attn.compressor.wkv": STORED}, "compressor, indexer and router weights are not floats of one type"),
    "two types": (
        {}, {"attn.compressor.wkv": number(256, 256, dtype=jnp.float32)},
        "compressor, indexer and router weights are not floats of one type",
    ),
    "router": ({}, {"ffn.gate": STORED}, "compressor, indexer and router weights are not floats of one type"),
}  # fmt: skip


@pytest.mark.parametrize("name", REASONS)
def test_why_not(name):
    fields, weights, reason = REASONS[name]
    block = abstract(KINDS).layers[1]
    own = few_rows.weights_of(block)
    assert few_rows.why_not(KINDS, own) is None
    assert set(weights) <= set(own)
    assert few_rows.why_not(dataclasses.replace(KINDS, **fields), {**own, **weights}) == reason


def test_the_opt_out_is_a_reason(monkeypatch):
    monkeypatch.setenv(OPT_OUT, "1")
    model = abstract(KINDS)
    assert few_rows.why_not(KINDS, few_rows.weights_of(model.layers[0])) == f"{OPT_OUT}=1"
    assert not few_rows.serves(KINDS, list(model.layers), ROWS, few_rows.MOST_ROWS)
    assert not few_rows.scores(KINDS, model.head.weight.get_value(), 1, strict=False)


def test_a_block_that_is_not_served_leaves_the_others_to_the_modules():
    blocks: list[Block] = list(build_with(KINDS, "layers.1.attn.wq_b.weight", number(512, 64)).layers)
    assert few_rows.serves(KINDS, [blocks[0], blocks[2]], ROWS, few_rows.MOST_ROWS)
    assert not few_rows.serves(KINDS, blocks, ROWS, few_rows.MOST_ROWS)


def build_with(config: Config, name: str, value: Any) -> Transformer:
    tensors = synthetic.checkpoint(config, "small-q2").tensors
    return build(config, ((one.name, value if one.name == name else jax.eval_shape(one.read)) for one in tensors))


def step(max_draft: int, *, strict: bool = False, cache: str = "float32") -> str:
    """The compiled loop's program for CUDA, of a small model with the published file's types."""
    config, drafter = dataclasses.replace(synthetic.SMALL_Q2, cache=cache), MTPDrafter() if max_draft else None
    graph, weights = nnx.split(abstract(config))
    state = jax.eval_shape(lambda: decode.start(config, 512, 0, drafter=drafter, max_draft=max_draft))
    limits = Limits(jnp.int32(1), jnp.int32(1), jnp.zeros(1, jnp.int32))
    policy = Policy(jnp.int32(0), jnp.ones(1 + max_draft, jnp.float32))

    # A function of its own: the gate is read while tracing, and a cached trace would hide what the environment says now.
    def fresh(*arguments: Any, **options: Any) -> Any:
        return decode.run.__wrapped__.__wrapped__(*arguments, **options)

    jitted = jax.jit(fresh, static_argnums=0, static_argnames=("strict", "drafter", "max_draft"))
    arguments = (graph, weights, state, limits, Sampling().arrays(), policy)
    return lowered_for_cuda(jitted, *arguments, strict=strict, drafter=drafter, max_draft=max_draft)


def expected_calls(config: Config, blocks: int, heads: int) -> dict[str, int]:
    """Launches of a step, those of MTP projections aside: `blocks` are run in all, and the head so often."""
    compressed, indexed = (sum(map(wanted, config.layer_ratios)) for wanted in (bool, (4).__eq__))
    each = (
        latent.NAME, attention.SPLIT_NAME, attention.COMBINE_NAME, router.NAME, expert_matmul.GATE_UP, expert_matmul.DOWN,
        swiglu.NAME,
    )  # fmt: skip
    return {
        **dict.fromkeys(each, blocks),
        # q_a + kv, q_b, o_a, o_b, shared gate + up, shared down.
        SHARE_WARP: 6 * blocks + heads,
        # Into attention, into the experts, and before the head.
        hyper_connections.MIX: 2 * blocks + heads,
        hyper_connections.ENTER: 2 * blocks + heads,
        # The router's product, those of the normed input together, and the indexer's queries.
        float_matmul.NAME: blocks + compressed + indexed,
        compressor.NAME: compressed + indexed,
        **{name: indexed for name in indexer.NAMES if name != "index_chunks"},
    }


@pytest.mark.parametrize("cache", ["float32", "narrow"])
def test_the_kernels_of_a_plain_step(cache):
    text, config = step(0, cache=cache), synthetic.SMALL_Q2
    expected = expected_calls(config, config.n_layers, 1)
    assert {name: executed_calls(text, name) for name in expected} == expected
    # Layers of all kinds share what looks alike: starting a program of many layers takes no longer than one of few.
    assert kernel_calls(text, expert_matmul.DOWN) == kernel_calls(text, swiglu.NAME) == 1


@pytest.mark.long
def test_the_kernels_of_draft_verify_and_commit():
    """The first draft needs the head alone; those after it are a loop over the MTP block and the head."""
    text, config, rows = step(2), synthetic.SMALL_Q2, 3
    expected = expected_calls(config, config.n_layers + 2, 3)
    # e_proj and h_proj, the latter with a row for each stream and at most eight rows a launch.
    expected[SHARE_WARP] += sum(1 + math.ceil(config.hc_mult * m / few_rows.MOST_ROWS) for m in (rows, 1))
    assert {name: executed_calls(text, name) for name in expected} == expected


@pytest.mark.parametrize("max_draft", [0, 2])
def test_strict_has_no_pallas_kernel_at_all(max_draft):
    assert pallas_calls(step(max_draft, strict=True)) == 0


def test_the_opt_out_removes_every_kernel(monkeypatch):
    monkeypatch.setenv(OPT_OUT, "1")
    assert pallas_calls(step(0)) == 0


def test_calls_are_counted_along_the_graph_of_functions():
    launch = '    %0 = stablehlo.custom_call @__gpu$xla.gpu.triton(%1) {mhlo.backend_config = {ir = "{x}", name = "NAME"}}\n'
    inner = "  func.func private @inner(%arg0: i32) -> i32 {\n" + launch.replace("NAME", "a_8__b") + "  }\n"
    outer = "  func.func private @outer(%arg0: i32) -> i32 {\n" + 2 * "    %1 = call @inner(%0) : i32\n" + "  }\n"
    body = 3 * "    %2:2 = func.call @outer(%0) : i32\n" + launch.replace("NAME", "ab")
    text = f"module {{\n  func.func public @main(%arg0: i32) -> i32 {{\n{body}  }}\n{inner}{outer}}}\n"
    assert {name: executed_calls(text, name) for name in ("a", "b", "ab", "c")} == {"a": 6, "b": 6, "ab": 1, "c": 0}

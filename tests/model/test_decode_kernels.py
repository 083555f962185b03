"""Decode kernels of a layer: equal to the modules, chosen by the gate, and counted in the lowered step."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import executed_calls, kernel_calls, lowered_for_cuda, pallas_calls
from flax import nnx
from numerics import assert_bits_equal

from ds4jax.bench.programs import randomised
from ds4jax.cache import state as caches
from ds4jax.cache.state import LayerCache, Rows
from ds4jax.config import Config
from ds4jax.decode import loop as decode
from ds4jax.decode.depth import Policy
from ds4jax.decode.drafters.mtp import MTPDrafter
from ds4jax.decode.loop import Limits
from ds4jax.decode.sampling import Filters, Sampling
from ds4jax.decode.width import rows_needed
from ds4jax.model import decode_kernels, paths
from ds4jax.model.parameters import build
from ds4jax.model.transformer import Transformer
from ds4jax.random_models import checkpoint as synthetic
from ds4jax.random_models import layouts
from pallas_kernels.attention import decode as attention
from pallas_kernels.attention import qkv
from pallas_kernels.attention.stored_rows import NarrowKeys, NarrowRows, widen
from pallas_kernels.compressor import decode as compressor
from pallas_kernels.core.dispatch import OPT_OUT
from pallas_kernels.core.limits import MAX_ROWS
from pallas_kernels.experts import decode as experts
from pallas_kernels.experts import many_rows, router, swiglu
from pallas_kernels.hyper_connections import decode as hyper_connections
from pallas_kernels.indexer import decode as indexer
from pallas_kernels.linear import matrices
from pallas_kernels.linear.q8_matmul import NAME as SHARE_WARP

# One layer of each kind; the first chooses its experts by token.
KINDS = dataclasses.replace(layouts.SMALL_Q2, n_layers=3, n_hash_layers=1, compress_ratios=(0, 4, 128, 0))
# Relative to the largest value: sums have another order, and no value rounds to the other side.
CLOSE = 3e-6


def assert_close(made: jax.Array, expected: jax.Array, name: str) -> None:
    np.testing.assert_allclose(made, expected, rtol=0, atol=CLOSE * float(jnp.abs(expected).max()), err_msg=name)


def assert_same(streams: jax.Array, made: Any, expected: jax.Array, expected_caches: Any) -> None:
    assert_close(streams, expected, "streams")
    assert jax.tree.structure(made) == jax.tree.structure(expected_caches)
    for (path, array), want in zip(jax.tree_util.tree_leaves_with_path(made), jax.tree.leaves(expected_caches), strict=True):
        assert_close(array, want, f"cache {jax.tree_util.keystr(path)}")


@pytest.mark.long
@pytest.mark.parametrize("part", ["layers", pytest.param("mtp", marks=pytest.mark.slow)])
def test_kernels_equal_the_modules(part):
    """Two live rows and a clone; the first closes a block of each ratio. 64 blocks are visible, the indexer chooses 8."""
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

    assert paths.why_not_step(KINDS, map(decode_kernels.weights_of, blocks), rows, held) is None
    with jax.default_matmul_precision("highest"):
        streams, made, _ = decode_kernels.layers(KINDS, blocks, h_TND, ids, rows, held, interpret=True)
        expected, expected_caches = modules(h_TND, held)
    assert_same(streams, made, expected, expected_caches)


def sequences(s: slice) -> tuple[np.ndarray, ...]:
    """Rows of a long sequence and of a short one: streams, ids, rows before the call, and how many of two are live."""
    # With seed 5 the two differ at ratio 128 as by one activation rounded to the other side; with 6, 7 and 8 they agree.
    config, rows = KINDS, slice(2 * s.start, 2 * s.stop)
    h_TND = synthetic.spread_numbers((4, config.hc_mult, config.dim), jnp.dtype("float32"), 1.0, jnp.uint32(6))
    h_TND = h_TND.at[3].set(h_TND[2])
    return np.asarray(h_TND)[rows], *(
        np.array(x, np.int32)[part] for x, part in (([3, 77, 5, 5], rows), ([255, 31], s), ([2, 1], s))
    )


@pytest.mark.parametrize("ratio", [0, *(pytest.param(ratio, marks=pytest.mark.slow) for ratio in (4, 128))])
def test_rows_of_two_sequences_do_not_see_each_other(ratio):
    """Two rows of a long sequence, a row and a clone of a short one: equal to the modules, and the same bits in separate calls.

    Both close a block of four. The long one also closes a block of 128 and has an indexer. The other sequence's cache is NaN.
    """
    config = dataclasses.replace(KINDS, n_layers=1, n_hash_layers=0, compress_ratios=(ratio, 0))
    [block] = synthetic.synthetic(synthetic.checkpoint(config, "small-q2")).layers
    two = randomised(caches.empty(config, 512, sequences=2, slack=2).layers, "two")
    h_TND, ids, start, count = sequences(slice(0, 2))

    @jax.jit
    def kernels(h_TND: jax.Array, count: jax.Array, held: Any) -> Any:
        return decode_kernels.layers(config, [block], h_TND, ids, Rows.step(jnp.asarray(start), 2, count), held, interpret=True)[
            :2
        ]

    @jax.jit
    def modules(h_TND: jax.Array, held: Any) -> Any:
        h_TND, cache = block(h_TND, ids, Rows.step(jnp.asarray(start), 2, jnp.asarray(count)), held[0])
        return h_TND, (cache,)

    with jax.default_matmul_precision("highest"):
        streams, made = kernels(h_TND, count, two)
        assert_same(streams, made, *modules(h_TND, two))
        for s in range(2):
            mine = np.arange(2) == s
            own, live = slice(2 * s, 2 * s + 2), count[s]
            held = jax.tree.map(lambda x, s=s: x.at[1 - s].set(jnp.nan), two)
            alone, alone_made = kernels(np.where(mine.repeat(2)[:, None, None], h_TND, np.nan), count * mine, held)
            assert_bits_equal(alone[own][:live], streams[own][:live])
            for array, one in zip(jax.tree.leaves(made), jax.tree.leaves(alone_made), strict=True):
                assert_bits_equal(one[s], array[s])
                assert np.isnan(one[1 - s]).all()


@pytest.mark.long
def test_rows_that_see_both_ways_and_taps():
    """Three rows of a long sequence and three of a short one, each seeing the later ones of its own; and the streams' means.

    The window is full: a row sees all of it and the three rows, which are beyond the window of a row that looks back alone.
    """
    config = dataclasses.replace(KINDS, n_layers=1, n_hash_layers=0, compress_ratios=(0, 0))
    [block] = synthetic.synthetic(synthetic.checkpoint(config, "small-q2")).layers
    held = randomised(caches.empty_rings(config, 1, sequences=2, slack=3), "both ways")
    h_TND = synthetic.spread_numbers((6, config.hc_mult, config.dim), jnp.dtype("float32"), 1.0, jnp.uint32(5))
    ids, rows = jnp.arange(6, dtype=jnp.int32), Rows.step(jnp.array([255, 31], jnp.int32), 3, jnp.array([3, 3], jnp.int32))
    both_ways = dataclasses.replace(rows, both_ways=True)

    @jax.jit
    def modules(h_TND: jax.Array, held: Any) -> Any:
        h_TND, cache = block(h_TND, ids, both_ways, held[0])
        return h_TND, (cache,)

    with jax.default_matmul_precision("highest"):
        streams, made, [mean] = decode_kernels.layers(config, [block], h_TND, ids, both_ways, held, taps=(0,), interpret=True)
        assert_same(streams, made, *modules(h_TND, held))
    assert_close(mean, jnp.mean(streams, axis=1), "mean")


@pytest.mark.parametrize("interpret", [pytest.param(True, marks=pytest.mark.slow), pytest.param(False, marks=pytest.mark.gpu)])
def test_rows_of_two_sequences_have_the_bits_of_one_sequence(interpret):
    """Layers of all kinds, each sequence in its own cache."""
    model = synthetic.synthetic(synthetic.checkpoint(KINDS, "small-q2"))
    two = randomised(caches.empty(KINDS, 512, sequences=2, slack=2).layers, "two")

    @jax.jit
    def kernels(h_TND: jax.Array, ids: jax.Array, start: jax.Array, count: jax.Array, held: Any) -> Any:
        return decode_kernels.layers(
            KINDS, list(model.layers), h_TND, ids, Rows.step(start, 2, count), held, interpret=interpret
        )[:2]

    with jax.default_matmul_precision("highest"):
        streams, made = kernels(*sequences(slice(0, 2)), two)
        for s, live in enumerate([2, 1]):
            held = jax.tree.map(lambda x, s=s: x[s : s + 1], two)
            alone, alone_made = kernels(*sequences(slice(s, s + 1)), held)
            assert_bits_equal(streams[2 * s : 2 * s + live], alone[:live])
            for array, one in zip(jax.tree.leaves(made), jax.tree.leaves(alone_made), strict=True):
                assert_bits_equal(array[s], one[0])


def widened(tree: Any) -> Any:
    """Narrow rows and keys as float32."""
    return jax.tree.map(lambda leaf: jax.jit(widen)(leaf) if is_narrow(leaf) else leaf, tree, is_leaf=is_narrow)


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
        assert paths.why_not_step(config, map(decode_kernels.weights_of, model.layers), rows, cache) is None
        found.append(decode_kernels.layers(config, list(model.layers), h_TND, ids, rows, cache, interpret=True)[:2])
    (streams, made), (expected, expected_caches) = found
    assert sum(map(is_narrow, jax.tree.leaves(made, is_leaf=is_narrow))) == 2
    assert_bits_equal(streams, expected)
    for array, want in zip(jax.tree.leaves(widened(made)), jax.tree.leaves(expected_caches), strict=True):
        assert_bits_equal(array, want)


@functools.cache
def abstract(config: Config = layouts.SMALL_Q2) -> Transformer:
    """The model with shapes and types for values."""
    tensors = synthetic.checkpoint(config, "small-q2").tensors
    return build(config, ((tensor.name, jax.eval_shape(tensor.read)) for tensor in tensors))


def step(max_draft: int, *, strict: bool = False, cache: str = "float32", drafts: bool = True) -> str:
    """The compiled loop's program for CUDA, of a small model with the published types. Without `drafts`, nobody drafts."""
    config, drafter = dataclasses.replace(layouts.SMALL_Q2, cache=cache), MTPDrafter() if max_draft and drafts else None
    graph, weights = nnx.split(abstract(config))
    state = jax.eval_shape(lambda: decode.start(config, 512, [0], drafter=drafter, max_draft=max_draft))
    limits = Limits.of([1], [1], [[0]])
    policy = Policy(jnp.zeros(1, jnp.int32), jnp.ones(1 + max_draft, jnp.float32))

    # A new function: the gate reads the environment while tracing, and a cached trace would hide a change.
    def fresh(*arguments: Any, **options: Any) -> Any:
        return decode.run.__wrapped__.__wrapped__(*arguments, **options)

    jitted = jax.jit(fresh, static_argnums=0, static_argnames=("strict", "drafter", "max_draft"))
    arguments = (graph, weights, state, limits, Filters.of([Sampling()]), policy)
    return lowered_for_cuda(jitted, *arguments, strict=strict, drafter=drafter, max_draft=max_draft)


def expected_calls(config: Config, blocks: int, heads: int) -> dict[str, int]:
    """Launches of a step, those of MTP projections aside: `blocks` are run in all, and the head so often."""
    compressed, indexed = (sum(map(wanted, config.layer_ratios)) for wanted in (bool, (4).__eq__))
    each = (
        qkv.NAME, attention.SPLIT_NAME, attention.COMBINE_NAME, router.NAME, many_rows.GATE_UP, experts.DOWN,
        swiglu.NAME,
    )  # fmt: skip
    return {
        **dict.fromkeys(each, blocks),
        # q_a + kv, q_b, o_a, o_b, shared gate + up, shared down.
        SHARE_WARP: 6 * blocks + heads,
        # Into attention, into the experts, and before the head.
        hyper_connections.MIX: 2 * blocks + heads,
        hyper_connections.ENTER: 2 * blocks + heads,
        # The router's product, the products of the normed input in one launch, and the indexer's queries.
        matrices.NAME: blocks + compressed + indexed,
        compressor.NAME: compressed + indexed,
        **{name: indexed for name in indexer.NAMES if name != "index_chunks"},
    }


@pytest.mark.long
@pytest.mark.parametrize("cache", [pytest.param("float32", marks=pytest.mark.slow), "narrow"])
def test_layers_of_two_sequences_lower_for_cuda(cache):
    """As many launches as for one sequence."""
    config = dataclasses.replace(KINDS, cache=cache)
    graph, weights = nnx.split(abstract(config))
    held = jax.eval_shape(lambda: caches.empty(config, 512, sequences=2, slack=2).layers)
    h_TND = jax.ShapeDtypeStruct((4, config.hc_mult, config.dim), jnp.float32)
    two = jax.ShapeDtypeStruct((2,), jnp.int32)

    def layers(weights: nnx.State, h_TND: jax.Array, start: jax.Array, count: jax.Array, held: Any) -> Any:
        blocks = list(nnx.merge(graph, weights).layers)
        return decode_kernels.layers(config, blocks, h_TND, jnp.zeros(4, jnp.int32), Rows.step(start, 2, count), held)

    text = lowered_for_cuda(jax.jit(layers), weights, h_TND, two, two, held)
    expected = {attention.SPLIT_NAME: 3, qkv.NAME: 3, compressor.NAME: 3, indexer.NAMES[1]: 1, indexer.NAMES[3]: 1}
    assert {name: executed_calls(text, name) for name in expected} == expected


@pytest.mark.parametrize("cache", ["float32", pytest.param("narrow", marks=pytest.mark.slow)])
@pytest.mark.long
def test_the_kernels_of_a_plain_step(cache):
    text, config = step(0, cache=cache), layouts.SMALL_Q2
    expected = expected_calls(config, config.n_layers, 1)
    assert {name: executed_calls(text, name) for name in expected} == expected
    # Layers of one kind share a function: lowering many layers takes no longer than lowering few.
    assert kernel_calls(text, experts.DOWN) == kernel_calls(text, swiglu.NAME) == 1


@pytest.mark.long
def test_the_kernels_of_draft_verify_and_commit():
    """The first draft needs the head alone; those after it are a loop over the MTP block and the head."""
    text, config, rows = step(2), layouts.SMALL_Q2, 3
    expected = expected_calls(config, config.n_layers + 2, 3)
    # e_proj and h_proj, the latter with a row for each stream and at most eight rows a launch.
    expected[SHARE_WARP] += sum(1 + math.ceil(config.hc_mult * m / MAX_ROWS) for m in (rows, 1))
    assert {name: executed_calls(text, name) for name in expected} == expected


def test_a_step_by_kernels_has_no_clones(monkeypatch):
    """Four drafts are verified in five rows on a GPU. On a CPU, and in modules on a GPU, there are eight."""
    config = layouts.SMALL_Q2
    model, cache = abstract(), jax.eval_shape(lambda: caches.empty(config, 512, slack=8))
    cache = dataclasses.replace(cache, length=jnp.zeros(1, jnp.int32))
    assert rows_needed(model, cache, 4, strict=False) == 8
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [rows_needed(model, cache, 4, strict=strict) for strict in (False, True)] == [5, 8]
    launches = [line for line in step(4, drafts=False).splitlines() if "@__gpu$xla.gpu.triton" in line]
    streams = rf"tensor<(\d+)x{config.hc_mult}x{config.dim}xf32>"
    assert {rows for line in launches for rows in re.findall(streams, line)} == {"5"}
    monkeypatch.setenv(OPT_OUT, "1")
    assert rows_needed(model, cache, 4, strict=False) == 8


@pytest.mark.slow
@pytest.mark.parametrize("max_draft", [0, 2])
def test_strict_has_no_pallas_kernel_at_all(max_draft):
    assert pallas_calls(step(max_draft, strict=True)) == 0


@pytest.mark.slow
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

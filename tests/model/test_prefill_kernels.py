"""Attention of a prefill by kernels: equal to the modules, chosen by the gate, and in the lowered program."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda import executed_calls, lowered_for_cuda
from flax import nnx
from numerics import assert_bits_equal

from ds4jax.bench.programs import randomised
from ds4jax.cache import state as caches
from ds4jax.cache.state import Rows
from ds4jax.model import attention, prefill_kernels
from ds4jax.model.indexer import Queries
from ds4jax.model.rope import inverse_frequencies, rotate
from ds4jax.random_models import checkpoint as synthetic
from ds4jax.random_models import layouts
from pallas_kernels.attention import meaning
from pallas_kernels.attention import prefill as attention_prefill
from pallas_kernels.core.norm import rms_scale
from pallas_kernels.indexer import decode as indexer

KINDS = dataclasses.replace(layouts.SMALL_Q2, n_layers=3, n_hash_layers=1, compress_ratios=(0, 4, 128, 0))
# Queries, rows and weights are rounded to float16, half a unit of 2⁻¹⁰ each; scores of size 3 carry that into the weights.
CLOSE = 3 * 2.0**-10


@pytest.fixture(scope="module")
def layers() -> list[attention.Attention]:
    model = synthetic.synthetic(synthetic.checkpoint(KINDS, "small-q2"))
    return [block.attn for block in model.layers]


@pytest.mark.parametrize("start", [0, pytest.param(300, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "layer", [0, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 2))], ids=["window", "ratio 4", "ratio 128"]
)
def test_kernels_equal_the_modules(layers, layer, start):
    """Nineteen live rows and padding; after 300 rows there are more blocks than the indexer chooses."""
    check(layers, layer, start, interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize("start", [0, 300])
@pytest.mark.parametrize("layer", [0, 1, 2], ids=["window", "ratio 4", "ratio 128"])
def test_kernels_equal_the_modules_on_a_gpu(layers, layer, start):
    check(layers, layer, start, interpret=False)


def check(layers: list[attention.Attention], layer: int, start: int, *, interpret: bool) -> None:
    random = np.random.default_rng(layer)
    x_TD, q_low_TL, kv_TQ = (random.standard_normal((24, n), np.float32) for n in (KINDS.dim, KINDS.q_lora_rank, KINDS.head_dim))
    q_THQ = random.standard_normal((24, KINDS.n_heads, KINDS.head_dim), np.float32)
    graph, weights = nnx.split(layers[layer])
    with jax.default_matmul_precision("highest"):
        results = both(graph, weights, np.int32(start), x_TD, q_low_TL, kv_TQ, q_THQ, held(layer), interpret=interpret)
    made, wanted = map(np.asarray, results)
    np.testing.assert_allclose(made[:19], wanted[:19], rtol=0, atol=CLOSE * np.abs(wanted).max())


@functools.partial(jax.jit, static_argnames="layer")
def held(layer: int) -> caches.LayerCache:
    return randomised(caches.empty(KINDS, 512).layers[layer], "held")


@functools.partial(jax.jit, static_argnames=("graph", "interpret"))
def both(
    graph: nnx.GraphDef, weights: nnx.State, start: jax.Array, x_TD: jax.Array, q_low_TL: jax.Array, kv_TQ: jax.Array,
    q_THQ: jax.Array, held: caches.LayerCache, *, interpret: bool,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Outputs of the kernels and of the modules for the rows after `start`."""
    attend, rows = nnx.merge(graph, weights), Rows.following(start, 24, 19)
    frequencies = inverse_frequencies(KINDS, compressed=attend.ratio > 0)
    rotated_THQ = rotate(q_THQ * rms_scale(q_THQ, KINDS.norm_eps), rows.position, frequencies)
    cache = attend._append(x_TD, kv_TQ, rows, held, attention.ignore)
    index = attend.indexer.queries(x_TD, q_low_TL, rows) if cache.indexer is not None else None
    segments = [attend._window(kv_TQ, rows, held.window, cache.window)]
    segments += attend._compressed(index, rows, cache, False, attention.ignore)
    sink, scale = attend.attn_sink.get_value().astype(jnp.float32), KINDS.head_dim**-0.5
    wanted = rotate(meaning.attend(rotated_THQ, segments, sink, scale)[0], rows.position, frequencies, inverse=True)
    kernels = functools.partial(prefill_kernels.attend, KINDS, attend.ratio, sink, kv_TQ, index, rows, held.window, cache)
    return kernels(q_THQ, interpret=interpret), wanted


@pytest.mark.parametrize("layer", [1, pytest.param(2, marks=pytest.mark.slow)], ids=["ratio 4", "ratio 128"])
@pytest.mark.long
def test_a_chunk_of_one_of_two_sequences_is_that_of_the_sequence_alone(layer):
    """The bits do not depend on the other sequence's cache."""
    random = np.random.default_rng(layer)
    q_THQ = random.standard_normal((24, KINDS.n_heads, KINDS.head_dim), np.float32)
    kv_TQ = random.standard_normal((24, KINDS.head_dim), np.float32)
    shapes = (24, KINDS.index_heads * KINDS.index_dim), (24, KINDS.index_heads)
    index = Queries(*(random.standard_normal(shape, np.float32) for shape in shapes)) if layer == 1 else None
    alone = held(layer)
    two = jax.tree.map(lambda one: np.concatenate([np.full_like(one, np.nan), one]), alone)
    sink_H = np.zeros(KINDS.n_heads, np.float32)

    @jax.jit
    def run(cache: caches.LayerCache, rows: Rows) -> jax.Array:
        given = kv_TQ, index, rows, cache.window, cache, q_THQ
        return prefill_kernels.attend(KINDS, KINDS.layer_ratios[layer], sink_H, *given, interpret=True)

    made = run(two, Rows.following(np.array([7, 300], np.int32), 24, 19, slot=1))
    assert_bits_equal(made, run(alone, Rows.following(np.int32(300), 24, 19)))


@pytest.mark.parametrize(
    ("strict", "kind"),
    [(False, "float32"), *(pytest.param(*one, marks=pytest.mark.long) for one in ((True, "float32"), (False, "narrow")))],
)
def test_in_the_lowered_prefill(layers, strict, kind):
    attend = layers[1]
    cache = jax.eval_shape(lambda: caches.empty(dataclasses.replace(KINDS, cache=kind), 512).layers[1])
    text = lowered_for_cuda(
        jax.jit(lambda x, cache: attend(x, Rows.following(jnp.int32(0), 32, 32, strict=strict), cache)),
        jax.ShapeDtypeStruct((32, KINDS.dim), jnp.float32),
        cache,
    )
    assert executed_calls(text, attention_prefill.NAME) == (0 if strict else 1)
    assert executed_calls(text, indexer.NAMES[-1]) == (0 if strict else 1)

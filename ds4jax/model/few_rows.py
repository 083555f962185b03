"""The layers of a decode or verify step on an NVIDIA GPU: the same parameters, the same cache, and kernels in place of XLA.

XLA's norms, products and attention change bits with the number of rows, and a layer of the modules in this folder is some sixty
small kernels there. Here a layer is about two dozen launches, each with a fixed order of sums and one row's work independent of
the others'. What every launch means is said by the modules; tests hold the two to each other.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ds4jax.cache import CompressorCache, LayerCache, Rows
from ds4jax.config import Config
from ds4jax.model.rope import inverse_frequencies
from pallas_kernels import activation, attention, compressor, expert_matmul, hyper_connections, indexer, latent, router, swiglu
from pallas_kernels.activation import Activation
from pallas_kernels.activation_k import ActivationK
from pallas_kernels.bundle import Part, launch
from pallas_kernels.dispatch import OPT_OUT
from pallas_kernels.float_matmul import float_matmul, float_part
from pallas_kernels.formats import BLOCK, Q8_0, Quantized
from pallas_kernels.hyper_connections import Entered
from pallas_kernels.ops import quantized_part, quantized_products

if TYPE_CHECKING:
    from ds4jax.model.block import Block

MOST_ROWS = 8
DENSE = ("attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_a", "attn.wo_b")
SHARED = ("ffn.shared_experts.w1", "ffn.shared_experts.w2", "ffn.shared_experts.w3")
# Products of one input in one launch.
COMPRESSED = (
    "attn.compressor.wkv",
    "attn.compressor.wgate",
    "attn.indexer.compressor.wkv",
    "attn.indexer.compressor.wgate",
    "attn.indexer.weights_proj",
    "attn.indexer.wq_b",
)
FLOATS = ("float16", "bfloat16", "float32")

Weights = Mapping[str, Any]
# Post [T, N] and comb [T, N, N].
Mixing = list[jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Streams:
    """The streams before the last sub-layer's output is written back to them.

    Attributes:
        h: float32 [T, N, D].
        outputs: float32 [T, D] each, whose sum is written back; none at the first layer.
        post, comb: float32 [T, N] and [T, N, N], with which it is.
    """

    h: jax.Array
    outputs: tuple[jax.Array, ...]
    post: jax.Array
    comb: jax.Array

    @classmethod
    def of(cls, h_TND: jax.Array) -> Streams:
        """Streams to which nothing is to be written."""
        t, n, _ = h_TND.shape
        return cls(h_TND, (), jnp.zeros((t, n), jnp.float32), jnp.zeros((t, n, n), jnp.float32))

    def written(self) -> jax.Array:
        """The streams [T, N, D] with everything in them."""
        if not self.outputs:
            return self.h
        return hyper_connections.expand(self.h, outputs=self.outputs, post=self.post, comb=self.comb)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
    """What all layers of a step need to know of its rows.

    Attributes:
        rows: where they stand.
        ids: int32 [T].
        angles: cos and sin float32 [T, R/2] by a layer's kind: "plain", "compressed", and by ratio at the first token of the
            block that a row closes.
    """

    rows: Rows
    ids: jax.Array
    angles: dict[str, tuple[jax.Array, jax.Array]]

    @classmethod
    def of(cls, config: Config, rows: Rows, ids: jax.Array) -> Steps:
        """Compute every angle once."""

        ratios = sorted({ratio for ratio in config.compress_ratios if ratio})
        kinds = {"plain": (0, False), "compressed": (0, True), **{str(ratio): (ratio - 1, True) for ratio in ratios}}
        # All together: a kernel of the compiler for each would take as long as the computation of all.
        back = jnp.array([steps for steps, _ in kinds.values()], jnp.int32)
        frequencies = jnp.asarray(np.stack([inverse_frequencies(config, compressed) for _, compressed in kinds.values()]))
        angle = (rows.position - back[:, None]).astype(jnp.float32)[..., None] * frequencies[:, None, :]
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return cls(rows, ids, {kind: (cos[i], sin[i]) for i, kind in enumerate(kinds)})


def weights_of(block: nnx.Module) -> Weights:
    """Parameters of a block by their dotted names."""
    state = nnx.to_flat_state(nnx.state(block, nnx.Param))
    return {".".join(map(str, path)).removesuffix(".weight"): leaf.get_value() for path, leaf in state}


def why_not(config: Config, weights: Weights) -> str | None:
    """Why a block cannot be run by the kernels, in a few words; None when it can."""
    if os.environ.get(OPT_OUT) == "1":
        return f"{OPT_OUT}=1"
    widths = (config.dim, config.head_dim, config.rope_dim, config.q_lora_rank, config.moe_dim, config.index_dim)
    if not all(width & (width - 1) == 0 for width in widths) or config.hc_mult != 4:
        return "a width is not a power of two"
    if config.dim % 256 or config.moe_dim % 256 or config.head_dim % 64 or config.index_dim % 32:
        return "a width is smaller than a block"
    if not all(isinstance(weights[name], Q8_0) for name in (*DENSE, *SHARED)):
        return "a dense weight is not Q8_0"
    w1, w2, w3 = (weights[f"ffn.experts.{name}"] for name in ("w1", "w2", "w3"))
    if not isinstance(w1, Quantized) or not isinstance(w2, Quantized) or type(w1) is not type(w3):
        return "an expert weight is not quantised"
    floats = {str(weights[name].dtype) if hasattr(weights[name], "dtype") else "" for name in COMPRESSED if name in weights}
    if len(floats) > 1 or not floats <= set(FLOATS) or isinstance(weights["ffn.gate"], Quantized):
        return "compressor, indexer and router weights are not floats of one type"
    return None


def room(config: Config, caches: tuple[LayerCache, ...]) -> int:
    """The most rows that the caches' rings take in without losing one that the first of them still sees."""
    return min(cache.window.shape[1] for cache in caches) - config.window


def serves(config: Config, blocks: list[Block], rows: Rows, room: int) -> bool:
    """Whether a call of these rows is run by the kernels where it is lowered for CUDA.

    They write the rings before they read them, which is why there has to be `room` for all rows.
    """
    if rows.strict or rows.position.shape[0] > min(MOST_ROWS, room) or rows.start.shape[0] > 1:
        return False
    return all(why_not(config, weights_of(block)) is None for block in blocks)


def layers(
    config: Config, blocks: list[Block], h_TND: jax.Array, ids_T: jax.Array, rows: Rows, caches: tuple[LayerCache, ...],
    *, interpret: bool = False,
) -> tuple[jax.Array, tuple[LayerCache, ...]]:  # fmt: skip
    """Run float32 [T, N, D] through blocks and their caches; T at most 8, all of one sequence."""
    steps, streams, done = Steps.of(config, rows, ids_T), Streams.of(h_TND), []
    for block, cache in zip(blocks, caches, strict=True):
        streams, cache = _block(
            weights_of(block), streams, steps, cache, config=config, ratio=block.attn.ratio, interpret=interpret
        )
        done.append(cache)
    return streams.written(), tuple(done)


@functools.partial(jax.jit, static_argnames=("config", "ratio", "interpret"))
def _block(
    weights: Weights, streams: Streams, steps: Steps, cache: LayerCache, *, config: Config, ratio: int, interpret: bool
) -> tuple[Streams, LayerCache]:
    """One layer. A jitted function, so that the many layers of a kind are traced and lowered once."""
    entered = _enter(config, weights, "attn", streams, interpret)
    y, mixing, cache = _attention(config, weights, entered, steps, cache, ratio, interpret)
    entered = _enter(config, weights, "ffn", Streams(entered.h, (y,), *mixing), interpret)
    outputs, mixing = _experts(config, weights, entered, steps, interpret)
    return Streams(entered.h, outputs, *mixing), cache


def _enter(config: Config, weights: Weights, part: str, streams: Streams, interpret: bool) -> Entered:
    fn, scale, base = (weights[f"hc_{part}_{name}"] for name in ("fn", "scale", "base"))
    experts = type(weights["ffn.experts.w1"])
    format = experts if part == "ffn" and experts.BLOCK != BLOCK else None
    return hyper_connections.enter(
        streams.h, fn, scale, base, weights[f"{part}_norm"], outputs=streams.outputs, post=streams.post, comb=streams.comb,
        eps=config.hc_eps, norm_eps=config.norm_eps, format=format, interpret=interpret,
    )  # fmt: skip


def _mixing(config: Config, weights: Weights, part: str, entered: Entered) -> Part:
    scale, base = (weights[f"hc_{part}_{name}"] for name in ("scale", "base"))
    return hyper_connections.mixing_part(
        entered, scale, base, iterations=config.hc_iters, eps=config.hc_eps, norm_eps=config.norm_eps
    )


def _q8(x: Activation, *weights: Q8_0, interpret: bool) -> list[jax.Array]:
    return quantized_products(x, weights, interpret=interpret)


def _attention(
    config: Config, weights: Weights, entered: Entered, steps: Steps, cache: LayerCache, ratio: int, interpret: bool
) -> tuple[jax.Array, Mixing, LayerCache]:
    """The sub-layer's output, how it will be written back, and the cache with the rows in it."""
    parts = [
        _mixing(config, weights, "attn", entered),
        quantized_part(entered.quantized, (weights["attn.wq_a"], weights["attn.wkv"]), interpret=interpret),
    ]
    together = [weights[name] for name in COMPRESSED[:-1] if name in weights]
    if together:
        parts.append(float_part(entered.x, together, interpret=interpret))
    mixing, (q_low, kv), *projections = launch(parts, warps=1, interpret=interpret)
    quantized, q_low, cache = _take_in(config, weights, q_low, kv, projections, steps, cache, ratio, interpret)

    parts = [quantized_part(quantized, (weights["attn.wq_b"],), interpret=interpret)]
    if cache.indexer is not None:
        parts.append(float_part(q_low, [weights[COMPRESSED[-1]]], interpret=interpret))
    (q,), *index_queries = launch(parts, warps=1, interpret=interpret)
    rows, cos_sin = steps.rows, steps.angles["compressed" if ratio else "plain"]
    seen: attention.Compressed | None = None
    if cache.compressor is not None:
        visible = (rows.position + 1) // ratio
        seen = attention.Leading(cache.compressor.rows, visible)
        if cache.indexer is not None:
            keys = cache.indexer.rows
            index = indexer.index(
                index_queries[0][0], projections[0][4], *cos_sin, keys, visible,
                topk=min(config.index_topk, keys.shape[1]), qat=config.qat, interpret=interpret,
            )  # fmt: skip
            seen = attention.Chosen(cache.compressor.rows, index)
    _, out = attention.attend(
        q, weights["attn.attn_sink"], *cos_sin, cache.window, rows.position, rows.end, seen, window=config.window,
        groups=config.o_groups, scale=config.head_dim**-0.5, eps=config.norm_eps, interpret=interpret,
    )  # fmt: skip
    [low] = quantized_products(out, (weights["attn.wo_a"],), groups=config.o_groups, interpret=interpret)
    [y] = _q8(activation.quantize(low, interpret=interpret), weights["attn.wo_b"], interpret=interpret)
    return y, mixing, cache


def _take_in(
    config: Config, weights: Weights, q_low: jax.Array, kv: jax.Array, projections: list[list[jax.Array]], steps: Steps,
    cache: LayerCache, ratio: int, interpret: bool,
) -> tuple[Activation, jax.Array, LayerCache]:  # fmt: skip
    """The low-rank queries normed and quantised, and the cache with the rows' keys and the compressors' inputs in it."""
    rows, size = steps.rows, cache.window.shape[1]
    slot = jnp.where(rows.live, rows.position % size, size)
    cos_sin = steps.angles["compressed" if ratio else "plain"]
    parts = [
        latent.latent_part(
            q_low, kv, weights["attn.q_norm"], weights["attn.kv_norm"], *cos_sin, cache.window, slot,
            eps=config.norm_eps, qat=config.qat, interpret=interpret,
        )
    ]  # fmt: skip
    kinds: list[tuple[str, CompressorCache, compressor.Finish]] = []
    if cache.compressor is not None:
        kinds.append(("attn.compressor", cache.compressor, "fp8" if config.qat else "none"))
    if cache.indexer is not None:
        kinds.append(("attn.indexer.compressor", cache.indexer, "fp4" if config.qat else "none"))
    for i, (name, held, finish) in enumerate(kinds):
        values, gates = projections[0][2 * i], projections[0][2 * i + 1]
        cos, sin = steps.angles[str(ratio)]
        part = compressor.compress_part(
            values, gates, weights[f"{name}.ape"], weights[f"{name}.norm"], cos, sin,
            held.values, held.gates, held.rows, rows.position, rows.live.astype(jnp.int32), rows.start,
            ratio=ratio, eps=config.norm_eps, finish=finish,
        )  # fmt: skip
        parts.append(part)
    (quants, scales, q_low, window), *made = launch(parts, warps=latent.WARPS, interpret=interpret)
    caches = [CompressorCache(*compressor.taken_in(arrays, held.rows)) for arrays, (_, held, _) in zip(made, kinds, strict=True)]
    return Activation(quants[:, None], scales[:, None]), q_low, LayerCache(window, *caches)


def _experts(
    config: Config, weights: Weights, entered: Entered, steps: Steps, interpret: bool
) -> tuple[tuple[jax.Array, ...], Mixing]:
    """Outputs of the routed experts and of the shared one, [T, D] each, and how their sum will be written back."""
    [logits] = float_matmul(entered.x, [weights["ffn.gate"]], interpret=interpret)
    if "ffn.gate.tid2eid" in weights:
        how = {"ids": steps.ids, "table": weights["ffn.gate.tid2eid"]}
    else:
        how = {"bias": weights["ffn.gate.bias"]}
    chosen, share = router.route(logits, active=config.n_active, scale=config.route_scale, **how, interpret=interpret)
    w1, w2, w3 = (weights[f"ffn.experts.{name}"] for name in ("w1", "w2", "w3"))
    x, limit = entered.quantized_k or entered.quantized, config.swiglu_limit
    parts = [
        _mixing(config, weights, "ffn", entered),
        expert_matmul.gate_up_part(x, chosen, share, w1, w3, limit=limit, interpret=interpret),
        quantized_part(entered.quantized, (weights[SHARED[0]], weights[SHARED[2]]), interpret=interpret),
    ]
    mixing, [hidden], (gate, up) = launch(parts, warps=1, interpret=interpret)
    quantized: Activation | ActivationK
    if type(w2).BLOCK == BLOCK:
        shared = swiglu.swiglu(gate, up, limit=limit, interpret=interpret)
        quantized = activation.quantize(hidden, interpret=interpret)
    else:
        shared, quantized = swiglu.swiglu_beside(gate, up, hidden, type(w2), limit=limit, interpret=interpret)
    parts = [
        expert_matmul.down_part(quantized, chosen, w2, interpret=interpret),
        quantized_part(shared, (weights[SHARED[1]],), interpret=interpret),
    ]
    [routed], [output] = launch(parts, warps=1, interpret=interpret)
    return (routed, output), mixing


def scores(config: Config, head: Any, rows: int, *, strict: bool) -> bool:
    """Whether the kernels compute the logits of so many rows where they are lowered for CUDA."""
    fits = isinstance(head, Q8_0) and rows <= MOST_ROWS and config.hc_mult == 4 and config.dim & (config.dim - 1) == 0
    return fits and config.dim >= 256 and not strict and os.environ.get(OPT_OUT) != "1"


def logits(
    config: Config, head: Q8_0, norm: jax.Array, *, fn: jax.Array, scale: jax.Array, base: jax.Array, h_TND: jax.Array,
    interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """Streams [T, N, D] after the last layer → logits float32 [T, V]."""
    nothing = Streams.of(h_TND)
    _, _, quantized = hyper_connections.leave(
        h_TND, fn, scale, base, norm, outputs=(), post=nothing.post, comb=nothing.comb,
        eps=config.hc_eps, norm_eps=config.norm_eps, interpret=interpret,
    )  # fmt: skip
    return _q8(quantized, head, interpret=interpret)[0]

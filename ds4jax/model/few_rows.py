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
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ds4jax.cache import CompressorCache, LayerCache, Rows
from ds4jax.config import Config
from ds4jax.model.block import Block
from ds4jax.model.rope import inverse_frequencies
from pallas_kernels import activation, attention, compressor, expert_matmul, hyper_connections, indexer, latent, router, swiglu
from pallas_kernels.activation import Activation
from pallas_kernels.activation_k import ActivationK
from pallas_kernels.dispatch import OPT_OUT
from pallas_kernels.float_matmul import float_matmul
from pallas_kernels.formats import BLOCK, Q8_0, Quantized
from pallas_kernels.hyper_connections import Entered
from pallas_kernels.ops import quantized_products

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

        def turn(position: jax.Array, compressed: bool) -> tuple[jax.Array, jax.Array]:
            angle = position.astype(jnp.float32)[:, None] * jnp.asarray(inverse_frequencies(config, compressed))
            return jnp.cos(angle), jnp.sin(angle)

        angles = {"plain": turn(rows.position, False), "compressed": turn(rows.position, True)}
        ratios = sorted({ratio for ratio in config.compress_ratios if ratio})
        return cls(rows, ids, angles | {str(ratio): turn(rows.position - (ratio - 1), True) for ratio in ratios})


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


def serves(config: Config, blocks: list[Block], rows: Rows) -> bool:
    """Whether a call of these rows is run by the kernels where it is lowered for CUDA."""
    if rows.strict or rows.position.shape[0] > MOST_ROWS or rows.start.shape[0] > 1:
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
    y, cache = _attention(config, weights, entered, steps, cache, ratio, interpret)
    entered = _enter(config, weights, "ffn", Streams(entered.h, (y,), entered.post, entered.comb), interpret)
    outputs = _experts(config, weights, entered, steps, interpret)
    return Streams(entered.h, outputs, entered.post, entered.comb), cache


def _enter(config: Config, weights: Weights, part: str, streams: Streams, interpret: bool) -> Entered:
    fn, scale, base = (weights[f"hc_{part}_{name}"] for name in ("fn", "scale", "base"))
    experts = type(weights["ffn.experts.w1"])
    format = experts if part == "ffn" and experts.BLOCK != BLOCK else None
    return hyper_connections.enter(
        streams.h, fn, scale, base, weights[f"{part}_norm"], outputs=streams.outputs, post=streams.post, comb=streams.comb,
        iterations=config.hc_iters, eps=config.hc_eps, norm_eps=config.norm_eps, format=format, interpret=interpret,
    )  # fmt: skip


def _q8(x: Activation, *weights: Q8_0, interpret: bool) -> list[jax.Array]:
    return quantized_products(x, weights, interpret=interpret)


def _attention(
    config: Config, weights: Weights, entered: Entered, steps: Steps, cache: LayerCache, ratio: int, interpret: bool
) -> tuple[jax.Array, LayerCache]:
    rows = steps.rows
    q_low, kv = _q8(entered.quantized, weights["attn.wq_a"], weights["attn.wkv"], interpret=interpret)
    cos, sin = steps.angles["compressed" if ratio else "plain"]
    size = cache.window.shape[1]
    slot = jnp.where(rows.live, rows.position % size, size)
    quantized, q_low, window = latent.latent(
        q_low, kv, weights["attn.q_norm"], weights["attn.kv_norm"], cos, sin, cache.window, slot,
        eps=config.norm_eps, qat=config.qat, interpret=interpret,
    )  # fmt: skip
    [q] = _q8(quantized, weights["attn.wq_b"], interpret=interpret)
    seen, cache = _compressed(config, weights, entered.x, q_low, steps, cache, ratio, interpret)
    _, out = attention.attend(
        q, weights["attn.attn_sink"], cos, sin, window, rows.position, rows.end, seen, window=config.window,
        groups=config.o_groups, scale=config.head_dim**-0.5, eps=config.norm_eps, interpret=interpret,
    )  # fmt: skip
    [low] = quantized_products(out, (weights["attn.wo_a"],), groups=config.o_groups, interpret=interpret)
    [y] = _q8(activation.quantize(low, interpret=interpret), weights["attn.wo_b"], interpret=interpret)
    return y, dataclasses.replace(cache, window=window)


def _compressed(
    config: Config, weights: Weights, x: jax.Array, q_low: jax.Array, steps: Steps, cache: LayerCache, ratio: int, interpret: bool
) -> tuple[attention.Compressed | None, LayerCache]:
    """What the layer's ratio lets it see beyond the window, and the cache with the rows taken in."""
    if cache.compressor is None:
        return None, cache
    together = [weights[name] for name in COMPRESSED[:-1] if name in weights]
    values, gates, *index = float_matmul(x, together, interpret=interpret)
    compress = functools.partial(_compress, config, weights, steps, ratio, interpret)
    main = compress("attn.compressor", values, gates, cache.compressor, "fp8" if config.qat else "none")
    cache = dataclasses.replace(cache, compressor=main)
    visible = (steps.rows.position + 1) // ratio
    if cache.indexer is None:
        return attention.Leading(main.rows, visible), cache
    keys = compress("attn.indexer.compressor", index[0], index[1], cache.indexer, "fp4" if config.qat else "none")
    [q] = float_matmul(q_low, [weights[COMPRESSED[-1]]], interpret=interpret)
    chosen = indexer.index(
        q, index[2], *steps.angles["compressed"], keys.rows, visible,
        topk=min(config.index_topk, keys.rows.shape[1]), qat=config.qat, interpret=interpret,
    )  # fmt: skip
    return attention.Chosen(main.rows, chosen), dataclasses.replace(cache, indexer=keys)


def _compress(
    config: Config, weights: Weights, steps: Steps, ratio: int, interpret: bool,
    name: str, values: jax.Array, gates: jax.Array, cache: CompressorCache, finish: compressor.Finish,
) -> CompressorCache:  # fmt: skip
    rows = steps.rows
    made = compressor.compress(
        values, gates, weights[f"{name}.ape"].astype(jnp.float32), weights[f"{name}.norm"], *steps.angles[str(ratio)],
        cache.values, cache.gates, cache.rows, rows.position, rows.live.astype(jnp.int32), rows.start,
        ratio=ratio, eps=config.norm_eps, finish=finish, interpret=interpret,
    )  # fmt: skip
    return CompressorCache(*made)


def _experts(config: Config, weights: Weights, entered: Entered, steps: Steps, interpret: bool) -> tuple[jax.Array, ...]:
    """Outputs of the routed experts and of the shared one, [T, D] each."""
    [logits] = float_matmul(entered.x, [weights["ffn.gate"]], interpret=interpret)
    if "ffn.gate.tid2eid" in weights:
        how = {"ids": steps.ids, "table": weights["ffn.gate.tid2eid"]}
    else:
        how = {"bias": weights["ffn.gate.bias"]}
    chosen, share = router.route(logits, active=config.n_active, scale=config.route_scale, **how, interpret=interpret)
    w1, w2, w3 = (weights[f"ffn.experts.{name}"] for name in ("w1", "w2", "w3"))
    x = entered.quantized_k or entered.quantized
    hidden = expert_matmul.gate_up(x, chosen, share, w1, w3, limit=config.swiglu_limit, interpret=interpret)
    gate, up = _q8(entered.quantized, weights[SHARED[0]], weights[SHARED[2]], interpret=interpret)
    limit = config.swiglu_limit
    quantized: Activation | ActivationK
    if type(w2).BLOCK == BLOCK:
        shared = swiglu.swiglu(gate, up, limit=limit, interpret=interpret)
        quantized = activation.quantize(hidden, interpret=interpret)
    else:
        shared, quantized = swiglu.swiglu_beside(gate, up, hidden, type(w2), limit=limit, interpret=interpret)
    [output] = _q8(shared, weights[SHARED[1]], interpret=interpret)
    return expert_matmul.down(quantized, chosen, w2, interpret=interpret), output


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

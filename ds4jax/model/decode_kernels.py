"""The layers of a decode or verify step on an NVIDIA GPU: parameters and cache of the modules, kernels in place of XLA.

XLA compiles a layer of the modules to about sixty small kernels, and their bits change with the number of rows. Here a layer is
about two dozen launches with a fixed order of sums, and each row is computed independently of the others. The modules define the
result of each launch; tests compare the two.

A launch computes the outputs of this device's rows of cut weights. Then four exchanges a layer gather outputs: after the two
output projections of attention, and after the hidden values and the outputs of routed and shared experts.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ds4jax.cache.state import CompressorCache, LayerCache, Rows
from ds4jax.config import Config
from ds4jax.model.paths import COMPRESSED, SHARED, Weights
from ds4jax.model.rope import inverse_frequencies
from pallas_kernels.attention import decode as attention
from pallas_kernels.attention import qkv
from pallas_kernels.compressor import decode as compressor
from pallas_kernels.core.launch import Part, launch
from pallas_kernels.experts import decode as expert_kernels
from pallas_kernels.experts import router, swiglu
from pallas_kernels.experts.many_rows import MANY_ROWS
from pallas_kernels.formats import BLOCK, Quantized
from pallas_kernels.hyper_connections import decode as hyper_connections
from pallas_kernels.hyper_connections.entered import Entered
from pallas_kernels.indexer import decode as indexer
from pallas_kernels.linear.activation import Activation
from pallas_kernels.linear.activation_k import ActivationK
from pallas_kernels.linear.cut import Cut, gathered, gathered_together, own_part, rows_of
from pallas_kernels.linear.float_matmul import apart, float_matmul, float_part
from pallas_kernels.linear.halves import FloatRows
from pallas_kernels.linear.lane_row import quantize_for
from pallas_kernels.ops import product_parts, quantized_products

if TYPE_CHECKING:
    from ds4jax.model.block import Block

# Post [T, N] and comb [T, N, N].
Mixing = list[jax.Array]
# Weights that multiply the input of a sub-layer.
READERS = {"attn": ("attn.wq_a", "attn.wkv"), "ffn": ("ffn.experts.w1", SHARED[0], SHARED[2])}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Streams:
    """Streams, and the last sub-layer's outputs that are not written back yet.

    Attributes:
        h: float32 [T, N, D].
        outputs: float32 [T, D] each. Their sum is written back; none at the first layer.
        post, comb: float32 [T, N] and [T, N, N], weights of writing back.
    """

    h: jax.Array
    outputs: tuple[jax.Array, ...]
    post: jax.Array
    comb: jax.Array

    @classmethod
    def of(cls, h_TND: jax.Array) -> Streams:
        """Streams without outputs to write back."""
        t, n, _ = h_TND.shape
        return cls(h_TND, (), jnp.zeros((t, n), jnp.float32), jnp.zeros((t, n, n), jnp.float32))

    def written(self) -> jax.Array:
        """The streams [T, N, D] after writing back."""
        if not self.outputs:
            return self.h
        return hyper_connections.write_back(self.h, outputs=self.outputs, post=self.post, comb=self.comb)

    def mean(self) -> jax.Array:
        """The mean [T, D] of the streams after writing back, without writing them back."""
        mixed_TD = jnp.sum(jnp.mean(self.comb, axis=2)[..., None] * self.h, axis=1)
        return mixed_TD + jnp.mean(self.post, axis=1)[:, None] * sum(self.outputs, jnp.zeros_like(mixed_TD))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepRows:
    """The rows of a step, with values that all layers share.

    Attributes:
        rows: positions and sequences.
        start, end: int32 [T], rows of each row's sequence before and after the call.
        ids: int32 [T], tokens.
        angles: cos and sin float32 [T, R/2] by name: "plain" and "compressed" of the layers' queries, and the ratio of a
            compressor, at the first position of the block that a row closes.
    """

    rows: Rows
    start: jax.Array
    end: jax.Array
    ids: jax.Array
    angles: dict[str, tuple[jax.Array, jax.Array]]

    @classmethod
    def of(cls, config: Config, rows: Rows, ids: jax.Array) -> StepRows:
        """Compute every angle once."""

        ratios = sorted({ratio for ratio in config.compress_ratios if ratio})
        kinds = {"plain": (0, False), "compressed": (0, True), **{str(ratio): (ratio - 1, True) for ratio in ratios}}
        # All in one array: separate kernels would each take as long as one for all.
        back = jnp.array([steps for steps, _ in kinds.values()], jnp.int32)
        frequencies = jnp.asarray(np.stack([inverse_frequencies(config, compressed) for _, compressed in kinds.values()]))
        angle = (rows.position - back[:, None]).astype(jnp.float32)[..., None] * frequencies[:, None, :]
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        angles = {kind: (cos[i], sin[i]) for i, kind in enumerate(kinds)}
        return cls(rows, rows.start[rows.sequence], rows.end[rows.sequence], ids, angles)


def weights_of(block: nnx.Module) -> Weights:
    """Parameters of a block by their dotted names."""
    state = nnx.to_flat_state(nnx.state(block, nnx.Param))
    return {".".join(map(str, path)).removesuffix(".weight"): leaf.get_value() for path, leaf in state}


def layers(
    config: Config, blocks: list[Block], h_TND: jax.Array, ids_T: jax.Array, rows: Rows, caches: tuple[LayerCache, ...],
    *, taps: tuple[int, ...] = (), interpret: bool = False,
) -> tuple[jax.Array, tuple[LayerCache, ...], list[jax.Array]]:  # fmt: skip
    """Run streams float32 [T, N, D] through blocks and their caches; T at most 64, of any number of sequences.

    Args:
        taps: static; indices of blocks.

    Returns:
        The streams, the caches, and the mean [T, D] of the streams after each block of `taps`.
    """
    steps, streams, done, means = StepRows.of(config, rows, ids_T), Streams.of(h_TND), [], {}
    for i, (block, cache) in enumerate(zip(blocks, caches, strict=True)):
        streams, cache = _block(
            weights_of(block), streams, steps, cache, config=config, ratio=block.attn.ratio, interpret=interpret
        )
        done.append(cache)
        if i in taps:
            means[i] = streams.mean()
    return streams.written(), tuple(done), [means[i] for i in taps]


@functools.partial(jax.jit, static_argnames=("config", "ratio", "interpret"))
def _block(
    weights: Weights, streams: Streams, steps: StepRows, cache: LayerCache, *, config: Config, ratio: int, interpret: bool
) -> tuple[Streams, LayerCache]:
    """One layer. Jitted, so that the layers of one kind are traced and lowered once."""
    entered = _enter(config, weights, "attn", streams, interpret)
    y, mixing, cache = _attention(config, weights, entered, steps, cache, ratio, interpret)
    entered = _enter(config, weights, "ffn", Streams(entered.h, (y,), *mixing), interpret)
    outputs, mixing = _experts(config, weights, entered, steps, interpret)
    return Streams(entered.h, outputs, *mixing), cache


def _enter(config: Config, weights: Weights, part: str, streams: Streams, interpret: bool) -> Entered:
    fn, scale, base = (weights[f"hc_{part}_{name}"] for name in ("fn", "scale", "base"))
    formats = tuple(type(rows_of(weights[name])) for name in READERS[part])
    return hyper_connections.enter(
        streams.h, fn, scale, base, weights[f"{part}_norm"], outputs=streams.outputs, post=streams.post, comb=streams.comb,
        eps=config.hc_eps, norm_eps=config.norm_eps, formats=formats, interpret=interpret,
    )  # fmt: skip


def _mixing(config: Config, weights: Weights, part: str, entered: Entered) -> Part:
    scale, base = (weights[f"hc_{part}_{name}"] for name in ("scale", "base"))
    return hyper_connections.mixing_part(
        entered, scale, base, iterations=config.hc_iters, eps=config.hc_eps, norm_eps=config.norm_eps
    )


def _entered_parts(entered: Entered, weights: Sequence[Quantized | Cut], interpret: bool) -> list[Part]:
    """Products of a sub-layer's input, one output for each weight in order; neighbours of one format may share a part."""
    parts = []
    for format, same in itertools.groupby(map(rows_of, weights), type):
        parts += product_parts(entered.quantized_for(format), list(same), interpret=interpret)
    return parts


def _beside_floats(
    parts: Sequence[Part], x: FloatRows, weights: Sequence[jax.Array], interpret: bool
) -> tuple[list[list[jax.Array]], list[jax.Array]]:
    """Results of parts, and products of x with float weights: in the same launch if their programs have one warp."""
    if not weights:
        return launch(parts, warps=1, interpret=interpret), []
    if apart(len(x.values), weights):
        return launch(parts, warps=1, interpret=interpret), float_matmul(x, weights, interpret=interpret)
    *made, products = launch([*parts, float_part(x, weights, interpret=interpret)], warps=1, interpret=interpret)
    return made, products


def _as_read(
    x: jax.Array, in_blocks: Activation, weight: Quantized, *, groups: int = 1, interpret: bool
) -> Activation | ActivationK:
    """Values [T, C·K], which their kernel quantised in blocks of 32, as the weight reads them: other blocks take a launch."""
    return in_blocks if weight.BLOCK == BLOCK else quantize_for(x, type(weight), groups, interpret=interpret)


def _attention(
    config: Config, weights: Weights, entered: Entered, steps: StepRows, cache: LayerCache, ratio: int, interpret: bool
) -> tuple[jax.Array, Mixing, LayerCache]:
    """The sub-layer's output, the weights of writing it back, and the cache with the rows."""
    dense = _entered_parts(entered, [weights[name] for name in READERS["attn"]], interpret)
    parts = [_mixing(config, weights, "attn", entered), *dense]
    together = [weights[name] for name in COMPRESSED[:-1] if name in weights]
    (mixing, *made), projections = _beside_floats(parts, entered.rows, together, interpret)
    q_low, kv = itertools.chain(*made)
    in_blocks, queries, cache = _append(config, weights, q_low, kv, projections, steps, cache, ratio, interpret)

    by_heads = weights["attn.wq_b"]
    quantized = _as_read(queries.values, in_blocks, rows_of(by_heads), interpret=interpret)
    parts = product_parts(quantized, [rows_of(by_heads)], interpret=interpret)
    indexed = [weights[COMPRESSED[-1]]] if cache.indexer is not None else []
    [[q]], index_queries = _beside_floats(parts, queries, indexed, interpret)
    rows, cos_sin = steps.rows, steps.angles["compressed" if ratio else "plain"]
    seen: attention.Compressed | None = None
    if cache.compressor is not None:
        visible = (rows.position + 1) // ratio
        seen = attention.Leading(cache.compressor.rows, visible)
        if cache.indexer is not None:
            keys = cache.indexer.rows
            index = indexer.index(
                index_queries[0], projections[4], *cos_sin, keys, rows.sequence, visible,
                topk=min(config.index_topk, keys.shape[1]), qat=config.qat, interpret=interpret,
            )  # fmt: skip
            seen = attention.Chosen(cache.compressor.rows, index)
    wo_a, wo_b = rows_of(weights["attn.wo_a"]), rows_of(weights["attn.wo_b"])
    groups = config.o_groups // (by_heads.devices if isinstance(by_heads, Cut) else 1)
    out, in_blocks = attention.attend(
        q, own_part(weights["attn.attn_sink"], by_heads), *cos_sin, cache.window, rows.sequence, rows.horizon, steps.end, seen,
        window=rows.reach(config.window), groups=groups, scale=config.head_dim**-0.5, eps=config.norm_eps, interpret=interpret,
    )  # fmt: skip
    quantized = _as_read(out, in_blocks, wo_a, groups=groups, interpret=interpret)
    [low] = quantized_products(quantized, [wo_a], groups=groups, interpret=interpret)
    low = gathered(low, weights["attn.wo_a"])
    [y] = quantized_products(quantize_for(low, type(wo_b), interpret=interpret), [wo_b], interpret=interpret)
    return gathered(y, weights["attn.wo_b"]), mixing, cache


def _append(
    config: Config, weights: Weights, q_low: jax.Array, kv: jax.Array, projections: list[jax.Array], steps: StepRows,
    cache: LayerCache, ratio: int, interpret: bool,
) -> tuple[Activation, FloatRows, LayerCache]:  # fmt: skip
    """The low-rank queries, quantised and normed, and the cache with the rows' keys and the compressors' inputs appended."""
    rows, size = steps.rows, cache.window.shape[1]
    slot = jnp.where(rows.live, rows.position % size, size)
    cos_sin = steps.angles["compressed" if ratio else "plain"]
    parts = [
        qkv.latent_part(
            q_low, kv, weights["attn.q_norm"], weights["attn.kv_norm"], *cos_sin, cache.window, rows.sequence, slot,
            eps=config.norm_eps, qat=config.qat, interpret=interpret,
        )
    ]  # fmt: skip
    kinds: list[tuple[str, CompressorCache, compressor.Finish]] = []
    if cache.compressor is not None:
        kinds.append(("attn.compressor", cache.compressor, "fp8" if config.qat else "none"))
    if cache.indexer is not None:
        kinds.append(("attn.indexer.compressor", cache.indexer, "fp4" if config.qat else "none"))
    for i, (name, held, finish) in enumerate(kinds):
        values, gates = projections[2 * i : 2 * i + 2]
        cos, sin = steps.angles[str(ratio)]
        part = compressor.compress_part(
            values, gates, weights[f"{name}.ape"], weights[f"{name}.norm"], cos, sin,
            held.values, held.gates, held.rows, rows.sequence, rows.position, rows.live.astype(jnp.int32), steps.start,
            ratio=ratio, eps=config.norm_eps, finish=finish, per_sequence=rows.per_sequence,
        )  # fmt: skip
        parts.append(part)
    (quants, scales, normed, halves, window), *made = launch(parts, warps=qkv.WARPS, interpret=interpret)
    caches = [CompressorCache(*compressor.taken_in(arrays, held.rows)) for arrays, (_, held, _) in zip(made, kinds, strict=True)]
    return Activation(quants[:, None], scales[:, None]), FloatRows(normed, halves), LayerCache(window, *caches)


def _experts(
    config: Config, weights: Weights, entered: Entered, steps: StepRows, interpret: bool
) -> tuple[tuple[jax.Array, ...], Mixing]:
    """Outputs of the routed experts and of the shared one, [T, D] each, and the weights of writing back their sum."""
    [logits] = float_matmul(entered.rows, [weights["ffn.gate"]], interpret=interpret)
    if "ffn.gate.tid2eid" in weights:
        how = {"ids": steps.ids, "table": weights["ffn.gate.tid2eid"]}
    else:
        how = {"bias": weights["ffn.gate.bias"]}
    chosen, share = router.route(logits, active=config.n_active, scale=config.route_scale, **how, interpret=interpret)
    w1, w2, w3 = (rows_of(weights[f"ffn.experts.{name}"]) for name in ("w1", "w2", "w3"))
    x, limit, shared_down = entered.quantized_for(type(w1)), config.swiglu_limit, rows_of(weights[SHARED[1]])
    routed_operands = x, chosen, share, w1, w3
    parts = [
        _mixing(config, weights, "ffn", entered),
        *_entered_parts(entered, [weights[SHARED[0]], weights[SHARED[2]]], interpret),
    ]
    if len(entered.x) < MANY_ROWS:
        routed_part = expert_kernels.gate_up_part(*routed_operands, limit=limit, interpret=interpret)
        mixing, [hidden], *made = launch([parts[0], routed_part, *parts[1:]], warps=1, interpret=interpret)
    else:
        hidden = expert_kernels.gate_up(*routed_operands, limit=limit, interpret=interpret)
        mixing, *made = launch(parts, warps=1, interpret=interpret)
    gate, up = itertools.chain(*made)
    gate, up, hidden = gathered_together([gate, up, hidden], weights[SHARED[0]])
    quantized: Activation | ActivationK
    if w2.BLOCK == BLOCK:
        shared = swiglu.swiglu(gate, up, type(shared_down), limit=limit, interpret=interpret)
        quantized = quantize_for(hidden, type(w2), interpret=interpret)
    else:
        formats = type(w2), type(shared_down)
        shared, quantized = swiglu.swiglu_beside(gate, up, hidden, *formats, limit=limit, interpret=interpret)
    parts = [
        expert_kernels.down_part(quantized, chosen, w2, interpret=interpret),
        *product_parts(shared, [shared_down], interpret=interpret),
    ]
    [routed], [output] = launch(parts, warps=1, interpret=interpret)
    return tuple(gathered_together([routed, output], weights[SHARED[1]])), mixing


def logits(
    config: Config, head: Quantized | Cut, norm: jax.Array, *, fn: jax.Array, scale: jax.Array, base: jax.Array, h_TND: jax.Array,
    interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """Streams [T, N, D] after the last layer → logits float32 [T, V]."""
    nothing = Streams.of(h_TND)
    _, _, quantized = hyper_connections.leave(
        h_TND, fn, scale, base, norm, outputs=(), post=nothing.post, comb=nothing.comb,
        eps=config.hc_eps, norm_eps=config.norm_eps, format=type(rows_of(head)), interpret=interpret,
    )  # fmt: skip
    return gathered(quantized_products(quantized, [rows_of(head)], interpret=interpret)[0], head)

"""Attention with a sink in plain jnp: what the modules compute, and what the kernels are held to.

Source: `Attention` of the reference inference code and the V4 report.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.attention.split import Chosen, Compressed, Leading
from pallas_kernels.attention.stored_rows import widen
from pallas_kernels.core import rotary, rounding
from pallas_kernels.core.norm import rms_norm, rms_scale
from pallas_kernels.linear import meaning as linear

Segment = tuple[jax.Array, jax.Array]


def ring_positions(size: int, length_N: jax.Array) -> jax.Array:
    """Positions int32 [N, size] in the rings of sequences that have `length` rows; -1 marks an empty slot."""
    slot = jnp.arange(size, dtype=jnp.int32)
    last = length_N[:, None] - 1
    return jnp.maximum(last - (last - slot) % max(size, 1), -1)


def in_window(position_T: jax.Array, held: jax.Array, window: int) -> jax.Array:
    """Which rows at positions `held`, int32 [1 or T, S] with -1 for none, each query sees, bool [T, S]."""
    age = position_T[:, None] - held
    return (age >= 0) & (age < window) & (held >= 0)


def round_rows(x: jax.Array, rope: int) -> jax.Array:
    """Rows [.., Q] with FP8 values, as training had them, but for the last `rope` columns, which rotate."""
    plain, rotates = jnp.split(x, [x.shape[-1] - rope], axis=-1)
    return jnp.concatenate([rounding.fp8_rows(plain), rotates], axis=-1)


def attend(q_THQ: jax.Array, segments: list[Segment], sink_H: jax.Array, scale: float) -> tuple[jax.Array, list[jax.Array]]:
    """Softmax attention with a sink over several sets of rows that are keys and values at once.

    Args:
        q_THQ: float32 [T, H, Q].
        segments: pairs of rows, [S, Q] shared by the queries or [T, S, Q] each query's own, and which of them each query sees,
            bool [T, S]. Every query must see at least one row.
        sink_H: one logit a head, which takes part in the denominator alone.

    Returns:
        float32 [T, H, Q], and the attention probabilities [T, H, S] of each segment, last those of the sink [T, H].
    """
    scores = []
    for rows, visible in segments:
        keys = "sq" if rows.ndim == 2 else "tsq"
        score = jnp.einsum(f"thq,{keys}->ths", q_THQ, rows, preferred_element_type=jnp.float32) * scale
        scores.append(jnp.where(visible[:, None, :], score, -jnp.inf))
    top = jnp.max(jnp.concatenate(scores, axis=-1), axis=-1, keepdims=True)
    top = jnp.maximum(top, sink_H[None, :, None])
    weights = [jnp.exp(score - top) for score in scores]
    total = jnp.exp(sink_H[None, :, None] - top) + sum(jnp.sum(w, axis=-1, keepdims=True) for w in weights)
    sink = (jnp.exp(sink_H[None, :, None] - top) / total)[..., 0]
    # On one device XLA makes this of a division, too, but not everywhere in a program of several devices.
    weights = [w * (1.0 / total) for w in weights]
    out = jnp.zeros_like(q_THQ)
    for (rows, _), weight in zip(segments, weights, strict=True):
        keys = "sq" if rows.ndim == 2 else "tsq"
        out += jnp.einsum(f"ths,{keys}->thq", weight, rows, preferred_element_type=jnp.float32)
    return out, [*weights, sink]


def decode(
    q: jax.Array, sink: jax.Array, cos: jax.Array, sin: jax.Array, ring: jax.Array, sequence: jax.Array, position: jax.Array,
    end: jax.Array, compressed: Compressed | None = None, *, window: int, scale: float, eps: float,
) -> jax.Array:  # fmt: skip
    """What `decode.attend` computes before it quantises, float32 [M, H·Q]; arguments as there."""
    q_MHQ = q.reshape(q.shape[0], sink.shape[0], -1)
    q_MHQ = rotary.rotate(q_MHQ * rms_scale(q_MHQ, eps), cos, sin)
    segments = [(ring[sequence], in_window(position, ring_positions(ring.shape[1], end), window))]
    if isinstance(compressed, Leading):
        block = jnp.arange(compressed.rows.shape[1], dtype=jnp.int32)
        segments.append((widen(compressed.rows)[sequence], block < compressed.visible[:, None]))
    elif isinstance(compressed, Chosen):
        chosen = widen(compressed.rows)[sequence[:, None], jnp.maximum(compressed.index, 0)]
        segments.append((chosen, compressed.index >= 0))
    out, _ = attend(q_MHQ, segments, sink, scale)
    return rotary.rotate(out, cos, sin, inverse=True).reshape(q.shape[0], -1)


def prefill(
    q: jax.Array, cos: jax.Array, sin: jax.Array, keys: jax.Array, start: jax.Array, sink: jax.Array,
    compressed: Compressed | None = None, visible: jax.Array | None = None, *, window: int, scale: float, eps: float,
) -> jax.Array:  # fmt: skip
    """What `prefill.attend_prefill` computes, float32 [T, H, Q]; arguments as there."""
    place, row = jnp.arange(keys.shape[0], dtype=jnp.int32), jnp.arange(q.shape[0], dtype=jnp.int32)[:, None]
    seen = (place > row) & (place <= row + window) & (place >= window - start)
    segments = [(keys.astype(jnp.float32), seen)]
    if isinstance(compressed, Leading):
        block = jnp.arange(compressed.rows.shape[1], dtype=jnp.int32)
        segments.append((widen(compressed.rows)[0].astype(jnp.float32), block < compressed.visible[:, None]))
    elif isinstance(compressed, Chosen) and visible is not None:
        chosen = widen(compressed.rows)[0, jnp.maximum(compressed.index, 0)]
        real = jnp.arange(chosen.shape[1], dtype=jnp.int32) < visible[:, None]
        segments.append((chosen.astype(jnp.float32), real))
    out, _ = attend(rotary.rotate(q * rms_scale(q, eps), cos, sin), segments, sink, scale)
    return rotary.rotate(out, cos, sin, inverse=True)


def qkv(
    q_low: jax.Array, kv: jax.Array, q_weight: jax.Array, kv_weight: jax.Array, cos: jax.Array, sin: jax.Array, ring: jax.Array,
    sequence: jax.Array, slot: jax.Array, *, eps: float, qat: bool,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array, jax.Array]:  # fmt: skip
    """What `qkv.latent` computes; arguments as there.

    Returns:
        the normed queries quantised, int8 [M, L/32, 32] and scales [M, L/32]; the same as float32 [M, L]; and the ring.
    """
    q_low = rms_norm(q_low, q_weight, eps)
    kv = rotary.rotate(rms_norm(kv, kv_weight, eps), cos, sin)
    kv = round_rows(kv, 2 * cos.shape[1]) if qat else kv
    return linear.quantize(q_low), q_low, ring.at[sequence, slot].set(kv.astype(ring.dtype), mode="drop")

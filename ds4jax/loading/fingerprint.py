"""Digests of a model: of its weights, computed on the device, and of its sizes and types."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.config import Config
from ds4jax.loading.contents import kind_of
from pallas_kernels.formats import Quantized

# Elements mixed at once. Bounds the temporary memory for a large array, however the compiler fuses.
PIECE = 1 << 24
# Odd constants with spread bits: a value counts differently at every index. Source: the 32-bit finaliser of MurmurHash3.
_INDEX, _FIRST, _SECOND = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35

# Fields of a configuration that change numbers and no size.
_NO_SIZES = {
    "route_scale", "swiglu_limit", "rope_theta", "compress_rope_theta", "rope_factor", "original_context", "beta_fast",
    "beta_slow", "hc_eps", "norm_eps", "max_context", "bos_id", "eos_id", "dspark_noise_id", "qat", "cache",
}  # fmt: skip


def of_shape(config: Config, weights: Any) -> str:
    """A digest of a model's sizes, and of how many tensors of each class have each type; 16 hexadecimal digits.

    A step of models with equal digests takes about the same time. `weights` may be `jax.ShapeDtypeStruct`.
    """
    sizes = {name: value for name, value in _fields(config).items() if name not in _NO_SIZES}
    leaves, _ = jax.tree_util.tree_flatten_with_path(weights, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    types = collections.Counter(
        (kind_of(jax.tree_util.keystr(path, simple=True, separator=".")), _type_of(leaf)) for path, leaf in leaves
    )
    return hashlib.sha256(json.dumps([sizes, sorted(types.items())], sort_keys=True).encode()).hexdigest()[:16]


def _type_of(leaf: Any) -> str:
    return type(leaf).__name__ if isinstance(leaf, Quantized) else str(leaf.dtype)


def of_weights(config: Config, weights: Any) -> str:
    """A digest of a configuration and of every bit of its weights, 64 hexadecimal digits; the same on every backend.

    Weights stay on the device. Each leaf is summed in integers, which is exact in any order.
    """
    digest = hashlib.sha256(json.dumps(_fields(config), sort_keys=True).encode())
    leaves, _ = jax.tree_util.tree_flatten_with_path(weights)
    for (path, leaf), total in zip(leaves, _totals([leaf for _, leaf in leaves]), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        digest.update(f"\n{name} {leaf.dtype} {list(leaf.shape)} {total}".encode())
    return digest.hexdigest()


def _totals(leaves: Sequence[jax.Array]) -> list[list[int]]:
    """`sums` of each array, from those of its parts in all processes."""
    found = [_parts(leaf) for leaf in leaves]
    own_n2 = np.array([_total(np.array(parts)) for parts in found], np.uint32)
    if jax.process_count() > 1:
        # Late, because few need it.
        from jax.experimental import multihost_utils

        all_Pn2 = multihost_utils.process_allgather(own_n2)
        cut_n1 = np.array([[not leaf.is_fully_replicated] for leaf in leaves])
        own_n2 = np.where(cut_n1, _total(all_Pn2), own_n2)
    totals: list[list[int]] = own_n2.tolist()
    return totals


def _total(parts: np.ndarray) -> np.ndarray:
    """The sums of a whole from those of its parts, uint32 [.., 2] from [P, .., 2]."""
    return np.stack([np.sum(parts[..., 0], axis=0, dtype=np.uint32), np.bitwise_xor.reduce(parts[..., 1], axis=0)], axis=-1)


def _parts(leaf: jax.Array) -> list[jax.Array]:
    """`sums` of each device's part of an array, which is cut along one axis; of one device's where all have the whole."""
    found = []
    for shard in {str(shard.index): shard for shard in leaf.addressable_shards}.values():
        place = EVERYWHERE
        for axis, span in enumerate(shard.index):
            if shard.data.shape[axis] < leaf.shape[axis]:
                row = math.prod(leaf.shape[axis + 1 :])
                place = Place(shard.data.shape[axis] * row, leaf.shape[axis] * row, (span.start or 0) * row)
        found.append(sums(shard.data, place))
    return found


def _fields(config: Config) -> dict[str, Any]:
    """The configuration's fields, without those that mean nothing for a model without DSpark."""
    fields = dataclasses.asdict(config)
    return {name: value for name, value in fields.items() if config.n_dspark or "dspark" not in name}


class Place(NamedTuple):
    """Where a part's elements lie in the whole array: runs of `run` elements, `step` apart, the first at index `first`."""

    run: int = 0
    step: int = 0
    first: int = 0


EVERYWHERE = Place()


@functools.partial(jax.jit, static_argnames=("place", "piece"))
def sums(leaf: jax.Array, place: Place = EVERYWHERE, piece: int = PIECE) -> jax.Array:
    """Sum and exclusive or over an array's elements, each mixed with its index: uint32 [2], whatever the size of a piece.

    Args:
        leaf: an array, or a part of one.
        place: static; where the part lies. Without runs the array is whole.
        piece: static; elements mixed at once.
    """
    word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[jnp.dtype(leaf.dtype).itemsize]
    words = leaf.astype(word) if leaf.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(leaf, word)
    words, size = words.reshape(-1), min(leaf.size, piece)

    def add(i: jax.Array, totals: jax.Array) -> jax.Array:
        # The last piece overlaps the one before, so that all have one size. Elements that were counted before are masked.
        begin = jnp.minimum(i * size, leaf.size - size)
        index = (begin + jnp.arange(size, dtype=jnp.int32)).astype(jnp.uint32)
        inside = index
        if place.run:
            run, step, first = map(jnp.uint32, place)
            inside = index // run * step + index % run + first
        mixed = _mixed(jax.lax.dynamic_slice(words, (begin,), (size,)).astype(jnp.uint32), inside)
        new = jnp.where(index >= (i * size).astype(jnp.uint32), mixed, jnp.uint32(0))
        both = jax.lax.reduce(new, jnp.uint32(0), jax.lax.bitwise_xor, (0,))
        return jnp.stack([totals[0] + jnp.sum(new, dtype=jnp.uint32), totals[1] ^ both])

    return jax.lax.fori_loop(0, -(-leaf.size // max(size, 1)), add, jnp.zeros(2, jnp.uint32))


def _mixed(bits: jax.Array, index: jax.Array) -> jax.Array:
    mixed = bits ^ (index * jnp.uint32(_INDEX))
    for shift, factor in ((16, _FIRST), (13, _SECOND)):
        mixed = (mixed ^ (mixed >> jnp.uint32(shift))) * jnp.uint32(factor)
    return mixed ^ (mixed >> jnp.uint32(16))

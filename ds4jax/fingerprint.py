"""Telling one set of weights from another without reading it off the device."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.config import Config

# Elements that are mixed together: what a large array takes beside itself is bounded, however the compiler fuses.
PIECE = 1 << 24
# Odd numbers with bits all over, so that a value counts differently at every index. Source: the 32-bit finaliser of MurmurHash3.
_INDEX, _FIRST, _SECOND = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35


def of_weights(config: Config, weights: Any) -> str:
    """A digest of a configuration and of every bit of its weights, 64 hexadecimal digits; the same on every backend.

    Weights are read where they lie, a leaf at a time, and summed as integers, exactly and in any order.
    """
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
    leaves, _ = jax.tree_util.tree_flatten_with_path(weights)
    totals = [sums(leaf) for _, leaf in leaves]
    for (path, leaf), total in zip(leaves, totals, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        digest.update(f"\n{name} {leaf.dtype} {list(leaf.shape)} {np.asarray(total).tolist()}".encode())
    return digest.hexdigest()


@functools.partial(jax.jit, static_argnames="piece")
def sums(leaf: jax.Array, piece: int = PIECE) -> jax.Array:
    """Sum and exclusive or over an array's elements, each mixed with its index: uint32 [2], whatever the size of a piece."""
    word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[jnp.dtype(leaf.dtype).itemsize]
    words = leaf.astype(word) if leaf.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(leaf, word)
    words, size = words.reshape(-1), min(leaf.size, piece)

    def add(i: jax.Array, totals: jax.Array) -> jax.Array:
        # The last piece begins where it has its full size, and what the one before it has counted counts as nothing.
        begin = jnp.minimum(i * size, leaf.size - size)
        index = (begin + jnp.arange(size, dtype=jnp.int32)).astype(jnp.uint32)
        mixed = _mixed(jax.lax.dynamic_slice(words, (begin,), (size,)).astype(jnp.uint32), index)
        new = jnp.where(index >= (i * size).astype(jnp.uint32), mixed, jnp.uint32(0))
        both = jax.lax.reduce(new, jnp.uint32(0), jax.lax.bitwise_xor, (0,))
        return jnp.stack([totals[0] + jnp.sum(new, dtype=jnp.uint32), totals[1] ^ both])

    return jax.lax.fori_loop(0, -(-leaf.size // max(size, 1)), add, jnp.zeros(2, jnp.uint32))


def _mixed(bits: jax.Array, index: jax.Array) -> jax.Array:
    mixed = bits ^ (index * jnp.uint32(_INDEX))
    for shift, factor in ((16, _FIRST), (13, _SECOND)):
        mixed = (mixed ^ (mixed >> jnp.uint32(shift))) * jnp.uint32(factor)
    return mixed ^ (mixed >> jnp.uint32(16))

"""Telling one set of weights from another without reading it off the device."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ds4jax.config import Config

# Odd numbers with bits all over, so that a value counts differently at every index. Source: the 32-bit finaliser of MurmurHash3.
_INDEX, _FIRST, _SECOND = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35


def of_weights(config: Config, weights: Any) -> str:
    """A digest of a configuration and of every bit of its weights, 64 hexadecimal digits; the same on every backend.

    Weights are read where they lie, a leaf at a time, and summed as integers, exactly and in any order.
    """
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
    leaves, _ = jax.tree_util.tree_flatten_with_path(weights)
    sums = [_sums(leaf) for _, leaf in leaves]
    for (path, leaf), total in zip(leaves, sums, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        digest.update(f"\n{name} {leaf.dtype} {list(leaf.shape)} {np.asarray(total).tolist()}".encode())
    return digest.hexdigest()


@jax.jit
def _sums(leaf: jax.Array) -> jax.Array:
    """Sum and exclusive or over a leaf's elements, each mixed with its index: uint32 [2]."""
    size = jnp.dtype(leaf.dtype).itemsize
    word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size]
    bits = (leaf if leaf.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(leaf, word)).astype(jnp.uint32).reshape(-1)
    mixed = bits ^ (jax.lax.iota(jnp.uint32, bits.shape[0]) * jnp.uint32(_INDEX))
    for shift, factor in ((16, _FIRST), (13, _SECOND)):
        mixed = (mixed ^ (mixed >> jnp.uint32(shift))) * jnp.uint32(factor)
    mixed = mixed ^ (mixed >> jnp.uint32(16))
    zero = jnp.uint32(0)
    return jnp.stack([jnp.sum(mixed, dtype=jnp.uint32), jax.lax.reduce(mixed, zero, jax.lax.bitwise_xor, (0,))])

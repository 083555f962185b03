"""Rewinds a decode state to an earlier position."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ds4jax.cache.state import CompressorCache, LayerCache
from ds4jax.decode.loop import DecodeState

Pair = tuple[jax.Array, jax.Array]
# Ring buffers of a layer: the window, then values and gates of the compressor and of the indexer.
Rings = tuple[jax.Array, Pair | None, Pair | None]


@dataclasses.dataclass(frozen=True)
class RewindPoint:
    """The parts of a state that later steps overwrite: ring buffers and drafter state.

    Attributes:
        length: rows in the cache at that position.
        rings: the ring buffers of each layer.
        drafting: the drafter's state.
    """

    length: int
    rings: tuple[Rings, ...]
    drafting: Any

    @classmethod
    def of(cls, state: DecodeState) -> RewindPoint:
        """Copy these parts of a state. The next step donates the state."""
        rings, drafting = jax.tree.map(jnp.copy, (tuple(map(rings_of, state.cache.layers)), state.drafting))
        return cls(int(state.cache.length[0]), rings, drafting)

    def restored(self, state: DecodeState) -> DecodeState:
        """Rewind a later state. Compressed rows need no copy, because each is written only once."""
        layers = tuple(with_rings(layer, rings) for layer, rings in zip(state.cache.layers, self.rings, strict=True))
        return dataclasses.replace(state, cache=dataclasses.replace(state.cache, layers=layers), drafting=self.drafting)


def rings_of(layer: LayerCache) -> Rings:
    """A layer's ring buffers."""

    def part(cache: CompressorCache | None) -> Pair | None:
        return (cache.values, cache.gates) if cache else None

    return layer.window, part(layer.compressor), part(layer.indexer)


def with_rings(layer: LayerCache, rings: Rings) -> LayerCache:
    """A layer with other ring buffers."""

    def part(cache: CompressorCache | None, ring: Pair | None) -> CompressorCache | None:
        return dataclasses.replace(cache, values=ring[0], gates=ring[1]) if cache and ring else None

    window, compressor, indexer = rings
    return LayerCache(window, part(layer.compressor, compressor), part(layer.indexer, indexer))

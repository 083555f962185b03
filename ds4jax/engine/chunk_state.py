"""The state that one chunk of a prompt leaves in a slot, so that an equal prompt need not compute it again.

Compressed rows are written once: each chunk has its own. Ring buffers and the drafter's state are overwritten: a prompt goes on
from those of its last chunk. The state is exact only at multiples of the chunk and only as the prefill made it, so no other is
kept.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from ds4jax.cache.state import Cache, CompressorCache, LayerCache
from ds4jax.cache.stored_rows import Stored
from ds4jax.config import Config
from ds4jax.decode import groups
from ds4jax.decode.groups import SLOTS, WHOLE, AnyMesh
from ds4jax.engine.rewind import rings_of, with_rings

RowPair = tuple[Stored | None, Stored | None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkState:
    """What a chunk leaves in a slot.

    Attributes:
        rows: of each layer, the compressed rows and indexer keys that begin in the chunk, [n, w].
        rings: the layers' ring buffers at its end, and all of the drafter's state.
    """

    rows: tuple[RowPair, ...]
    rings: Any

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


@functools.partial(jax.jit, static_argnames=("config", "chunk", "mesh"))
def taken(
    cache: Cache, drafting: Any, slot: jax.Array, start: jax.Array, *, config: Config, chunk: int, mesh: AnyMesh = None
) -> ChunkState:
    """Copy the state of the chunk that has just been appended to a slot. All groups of devices get the copy.

    Args:
        start: int32 [], its first row, a multiple of `chunk`.
        chunk: static; rows of a chunk.
        mesh: static; the model's, if it has groups.
    """

    def on_each(cache: Cache, drafting: Any, slot: jax.Array, start: jax.Array) -> ChunkState:
        layers, size = list(zip(cache.layers, config.layer_ratios, strict=True)), cache.length.shape[0]
        place = groups.local(slot, size, mesh)

        def own(array_B: jax.Array) -> jax.Array:
            return jax.lax.dynamic_index_in_dim(array_B, place, keepdims=False)

        def some(array_BSw: jax.Array, ratio: int) -> jax.Array:
            # One row more than the chunk closes where the ratio does not divide it; the next chunk's rows overwrite that.
            return jax.lax.dynamic_slice_in_dim(own(array_BSw), start // ratio, -(-chunk // ratio))

        rows = tuple(jax.tree.map(functools.partial(some, ratio=ratio), _rows_of(layer)) for layer, ratio in layers)
        rings = [jax.tree.map(own, rings_of(layer)) for layer, _ in layers]
        return groups.from_owner(ChunkState(rows, (rings, jax.tree.map(own, drafting))), slot, size, mesh)

    run = groups.over_groups(on_each, mesh, (SLOTS, SLOTS, WHOLE, WHOLE), WHOLE)
    found: ChunkState = run(cache, drafting, slot, start)
    return found


@functools.partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames=("cache", "drafting"))
def put_rows(
    cache: Cache,
    drafting: Any,
    slot: jax.Array,
    start: jax.Array,
    rows: tuple[RowPair, ...],
    *,
    config: Config,
    mesh: AnyMesh = None,
) -> tuple[Cache, Any]:
    """Write a chunk's rows into a slot; arguments as for `taken`, of which cache and drafter's state are donated."""

    def on_each(cache: Cache, slot: jax.Array, start: jax.Array, rows: tuple[RowPair, ...]) -> Cache:
        size = cache.length.shape[0]
        own = groups.local(slot, size, mesh)

        def put(held: jax.Array, new: jax.Array, ratio: int) -> jax.Array:
            place = (own, start // ratio, jnp.int32(0))
            if groups.count(mesh) > 1:
                # A slice past the end would be moved to the last slot.
                new = jnp.where(own < size, new, jax.lax.dynamic_slice(held, place, (1, *new.shape))[0])
            return jax.lax.dynamic_update_slice(held, new[None], place)

        layers = tuple(
            _with_rows(layer, jax.tree.map(functools.partial(put, ratio=ratio), _rows_of(layer), new))
            for layer, ratio, new in zip(cache.layers, config.layer_ratios, rows, strict=True)
        )
        return dataclasses.replace(cache, layers=layers)

    run = groups.over_groups(on_each, mesh, (SLOTS, WHOLE, WHOLE, WHOLE), SLOTS)
    return run(cache, slot, start, rows), drafting


@functools.partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames=("cache", "drafting"))
def put_rings(
    cache: Cache, drafting: Any, slot: jax.Array, length: jax.Array, rings: Any, *, config: Config, mesh: AnyMesh = None
) -> tuple[Cache, Any]:
    """Let a slot go on after row `length`, int32 []: write the rings of the chunk that ends there. Donates as `put_rows`."""

    def on_each(cache: Cache, drafting: Any, slot: jax.Array, length: jax.Array, rings: Any) -> tuple[Cache, Any]:
        place = groups.local(slot, cache.length.shape[0], mesh)

        def put(held: Any, new: Any) -> Any:
            return jax.tree.map(lambda array, own: array.at[place].set(own, mode="drop"), held, new)

        of_layers, of_drafter = rings
        layers = tuple(with_rings(layer, put(rings_of(layer), new)) for layer, new in zip(cache.layers, of_layers, strict=True))
        return dataclasses.replace(cache, layers=layers, length=put(cache.length, length)), put(drafting, of_drafter)

    run = groups.over_groups(on_each, mesh, (SLOTS, SLOTS, WHOLE, WHOLE, WHOLE), (SLOTS, SLOTS))
    made: tuple[Cache, Any] = run(cache, drafting, slot, length, rings)
    return made


def _rows_of(layer: LayerCache) -> RowPair:
    return layer.compressor.rows if layer.compressor else None, layer.indexer.rows if layer.indexer else None


def _with_rows(layer: LayerCache, rows: RowPair) -> LayerCache:
    def part(cache: CompressorCache | None, new: Stored | None) -> CompressorCache | None:
        return dataclasses.replace(cache, rows=new) if cache and new is not None else None

    return LayerCache(layer.window, part(layer.compressor, rows[0]), part(layer.indexer, rows[1]))
